"""Images as rows for `Loader`: decoded, transformed, and the same at every resumption."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .images import Files, Split
from .images_transforms import Augment, Preparation

IGNORE = -100  # cross_entropy's own default: the label of a row that counts nowhere


class ImageRows:
    """Rows {image [C, H, W], label, index, skipped} of a split; an index of -1 gives one that counts nowhere.

    With `augment` they are for training: what is random depends on seed, epoch and index alone, so neither the number
    of workers nor a resumption changes it. A corrupt image is an error that names the file or, with on_corrupt="skip",
    is replaced by the next one in training and counts nowhere otherwise; `skipped` is how many a row went past.
    """

    def __init__(
        self,
        split: Split,
        preparation: Preparation,
        augment: Augment | None = None,
        seed: int = 0,
        on_corrupt: Literal["error", "skip"] = "error",
    ) -> None:
        self.split, self.preparation, self.augment = split, preparation, augment
        self.seed, self.on_corrupt = seed, on_corrupt
        self.epoch = 0  # set by `Loader`
        self.transform = preparation.training(augment) if augment else preparation.evaluation()

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < 0:
            return self._nothing(0)
        for skipped in range(len(self.split)):
            at = (index + skipped) % len(self.split)
            try:
                image = self.split.load(at)
                with own_randomness(self.seed, self.epoch, index):
                    pixels = self.transform(image)
            except (OSError, ValueError, SyntaxError) as error:
                name = self.split.names[at]
                if self.on_corrupt == "error":
                    raise ValueError(
                        f"{name} is not a readable image ({error}); data.on_corrupt=skip goes on"
                    ) from error
                warnings.warn(f"skipped {name}: not a readable image ({error})", stacklevel=2)
                if self.augment is None:
                    return self._nothing(1)
                continue
            return {"image": pixels, "label": self.split.labels[at], "index": at, "skipped": skipped}
        raise ValueError(f"none of {len(self.split)} images is readable")

    def _nothing(self, skipped: int) -> dict[str, Any]:
        size = self.preparation.size
        image: Tensor = torch.zeros(self.preparation.channels, size, size)
        return {"image": image, "label": IGNORE, "index": -1, "skipped": skipped}


def real_rows(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows of a batch that count: others would compete for experts' places. All, where a process has no real one.

    What each process computes has to be some batch, since its part of the weights may be elsewhere.
    """
    real = batch["index"] >= 0
    return {name: rows[real] for name, rows in batch.items()} if bool(real.any()) else batch


def unlabelled(paths: Sequence[str]) -> Split:
    """Files without labels as a split."""
    return Split(Files(paths), paths, [0] * len(paths), range(len(paths)))


@contextmanager
def own_randomness(*key: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's generators by `key` inside the block, and put them back after it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
