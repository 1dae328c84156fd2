"""Pictures with texts as batches: decoded, tokenised, the same at every resumption; and shards as a stream of them.

n pictures, m >= n texts, S tokens of the longest text.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .images_rows import own_randomness
from .images_transforms import Augment, Preparation
from .pairs import PairSource
from .shards import Sample, Shards, count_samples, read_shard
from .tokenizer import Tokenizer


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """ids [m, S] and mask [m, S], False for padding: start, tokens and end, at most `length` of them a text.

    Of a longer text the first tokens are kept, and the end. Raises ValueError as `check_text_length`.
    """
    check_text_length(tokenizer, length)
    last = [] if tokenizer.end is None else [tokenizer.end]
    room = length - 1 - len(last)
    rows = [[tokenizer.start, *ids[:room].tolist(), *last] for ids, _ in tokenizer.encode(list(texts))]
    longest = max(map(len, rows), default=1)
    ids = torch.tensor([row + [tokenizer.pad] * (longest - len(row)) for row in rows]).view(len(rows), longest).long()
    sizes = torch.tensor([len(row) for row in rows]).view(-1, 1)
    return ids, torch.arange(longest) < sizes


def check_text_length(tokenizer: Tokenizer, length: int) -> None:
    """Raise ValueError for texts so short that no token finds a place beside start and end."""
    least = 2 if tokenizer.end is None else 3
    if length < least:
        raise ValueError(f"text_length must be at least {least}, start and end among the tokens, got {length}")


class PairRows:
    """Batches of a split for `Loader`: image [n, C, H, W], ids and mask [m, S], group [n], text_group [m], index [n].

    In training (with `augment`) each picture comes with one of its texts, m = n, and what is random depends on seed,
    epoch and index alone; otherwise with all of them, text j being true of the pictures of the same group. An index of
    -1 gives nothing. An image that cannot be read is a ValueError that names it.
    """

    def __init__(
        self,
        source: PairSource,
        preparation: Preparation,
        tokenizer: Tokenizer,
        text_length: int,
        augment: Augment | None = None,
        seed: int = 0,
    ) -> None:
        self.source, self.tokenizer, self.text_length = source, tokenizer, text_length
        self.augment, self.seed = augment, seed
        self.epoch = 0  # set by `Loader`
        self.preparation = preparation
        self.transform = preparation.training(augment) if augment else preparation.evaluation()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        if index < 0:
            return None
        with own_randomness(self.seed, self.epoch, index):
            texts = self.source.texts(index)
            if self.augment is not None:
                texts = [random.choice(texts)]
            pixels = _pixels(self.transform, self.source.name(index), lambda: self.source.load(index))
        return {"image": pixels, "texts": texts, "group": self.source.group(index), "index": index}

    def collate(self, rows: Sequence[dict[str, Any] | None]) -> dict[str, Tensor]:
        """A batch of rows."""
        real = [row for row in rows if row is not None]
        texts = [(text, row["group"]) for row in real for text in row["texts"]]
        ids, mask = encode_texts(self.tokenizer, [text for text, _ in texts], self.text_length)
        size = self.preparation.size
        images = [row["image"] for row in real]
        return {
            "image": torch.stack(images) if images else torch.zeros(0, self.preparation.channels, size, size),
            "ids": ids,
            "mask": mask,
            "group": torch.tensor([row["group"] for row in real], dtype=torch.long),
            "text_group": torch.tensor([group for _, group in texts], dtype=torch.long),
            "index": torch.tensor([row["index"] for row in real], dtype=torch.long),
        }


def _pixels(transform: Any, name: str, load: Any) -> Tensor:
    try:
        return transform(load())
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{name} is not a readable image ({error})") from error


class ShardLoader:
    """Training batches streamed from .tar shards for ever, as `PairRows` makes them (group is 0 throughout).

    Every process and worker reads shards of its own, in an order that depends on the seed and the pass, and mixes
    `buffer` samples at a time. `state_dict` counts the batches handed out; a run continues with the next one as long as
    processes, workers and shards are as many, and reads again what was read of the last pass. Raises ValueError where
    there are fewer shards than readers.
    """

    def __init__(
        self,
        shards: Shards,
        rows: PairRows,
        batch_size: int,
        *,
        buffer: int = 1000,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        readers = world_size * max(num_workers, 1)
        if len(shards.paths) < readers:
            raise ValueError(
                f"{len(shards.paths)} shards do not go round {world_size} process(es) with {max(num_workers, 1)} "
                "worker(s) each; make more shards, or take fewer workers"
            )
        self.stream = _Stream(shards.paths, rows, batch_size, buffer, rank, world_size)
        self.batch_size, self.num_workers, self.done = batch_size, num_workers, 0

    def __len__(self) -> int:
        """A number out of reach: of a loader without one Lightning takes a batch ahead, which would count as done."""
        return 10**9

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.stream.skip = self.done
        loader = DataLoader(
            self.stream,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            # Its own generator: starting workers must not draw from the one that dropout draws from.
            generator=torch.Generator().manual_seed(0),
        )
        for batch in loader:
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """How many batches were handed out."""
        return {"batches": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from there at the next `iter`."""
        self.done = state["batches"]


class _Stream(IterableDataset[dict[str, Tensor]]):
    def __init__(
        self, paths: Sequence[str], rows: PairRows, batch_size: int, buffer: int, rank: int, world_size: int
    ) -> None:
        self.paths, self.rows, self.batch_size, self.buffer = list(paths), rows, batch_size, buffer
        self.rank, self.world_size, self.skip = rank, world_size, 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        # Batches come from the workers in turn: after a resumption the first is from whose turn it was.
        worker = (worker + self.skip) % workers
        skip = self.skip // workers + (worker < self.skip % workers)
        samples = self._samples(self.rank * workers + worker, self.world_size * workers, skip * self.batch_size)
        while True:
            yield self.rows.collate([next(samples) for _ in range(self.batch_size)])

    def _samples(self, reader: int, readers: int, skip: int) -> Iterator[dict[str, Any]]:
        """This reader's rows after the first `skip`, for ever."""
        mine = self.paths[reader::readers]
        # Passes do not depend on each other: of those that are over only the shards' tables of contents are read.
        size = sum(count_samples(path) for path in mine)
        if not size:
            raise ValueError(f"{', '.join(mine)}: no sample in these shards")
        for number in itertools.count(skip // size):
            first = skip % size if number == skip // size else 0
            for place, sample in enumerate(self._mixed(mine, reader, number)):
                if place >= first:
                    yield self._row(sample, reader, number, place)

    def _mixed(self, paths: Sequence[str], reader: int, number: int) -> Iterator[Sample]:
        """Every sample of the shards once: shards in random order, samples mixed in a buffer."""
        generator = np.random.default_rng([self.rows.seed, reader, number])
        kept: list[Sample] = []
        for shard in generator.permutation(len(paths)):
            for sample in read_shard(paths[shard]):
                kept.append(sample)
                if len(kept) >= self.buffer:
                    yield kept.pop(int(generator.integers(len(kept))))
        for place in generator.permutation(len(kept)):
            yield kept[place]

    def _row(self, sample: Sample, *key: int) -> dict[str, Any]:
        with own_randomness(self.rows.seed, *key):
            pixels = _pixels(self.rows.transform, sample.name, sample.load)
        return {"image": pixels, "texts": sample.texts[:1], "group": 0, "index": key[-1]}
