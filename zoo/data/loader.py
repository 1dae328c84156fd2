"""Batches in an order that depends on the seed and the epoch alone, and that can be taken up again anywhere."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sized
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import DataLoader


class Loader:
    """Iterate over a map-style data set, rank's share of every global batch at a time.

    A data set with `__getitems__` and `collate` makes a batch of a list of row numbers itself.

    Global batch j is the same rows for any number of ranks: rank r of W takes rows r*B..(r+1)*B of its W*B.
    `state_dict` counts the rows handed out in the running epoch, so a run continues with the next one, with any number
    of workers, and on another number of ranks. When shuffled, rows that do not fill a global batch are left for the
    next epoch; otherwise none are left, and index -1 stands in where ranks would differ in length.
    A place among other rows means nothing: with another number of them, another seed, or where the data set's `facts`
    (names and plain values, if it has any) differ, the epoch begins anew, with a warning that names the difference.
    """

    def __init__(
        self,
        data: Sized,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        self.data, self.batch_size, self.shuffle, self.seed = data, batch_size, shuffle, seed
        self.rank, self.world_size, self.num_workers = rank, world_size, num_workers
        self.epoch, self.rows_done = 0, 0
        self._resumed = True  # a fresh loader starts where a loaded one does: at epoch and rows_done as they are
        if shuffle and len(data) < batch_size * world_size:
            raise ValueError(
                f"{len(data)} rows do not fill one batch of {batch_size} on {world_size} process(es); "
                "give more data, or make the batch (or a text's sequences) smaller"
            )

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        per_batch = self.batch_size * self.world_size
        return len(self.data) // per_batch if self.shuffle else -(-len(self.data) // per_batch)

    @property
    def batches_done(self) -> int:
        """Batches of the running epoch that are no longer to come; another batch size, or other ranks, made some."""
        return len(self) - len(range(self.rows_done, self._stop, self.batch_size * self.world_size))

    @property
    def _stop(self) -> int:
        """A batch begins before this row."""
        count, step = len(self.data), self.batch_size * self.world_size
        return count - step + 1 if self.shuffle else count

    @cached_property
    def _facts(self) -> dict[str, Any]:
        return {"rows": len(self.data), "seed": self.seed, **getattr(self.data, "facts", {})}

    def __iter__(self) -> Iterator[Any]:
        if not self._resumed:
            self.epoch, self.rows_done = self.epoch + 1, 0
        self._resumed = False
        if hasattr(self.data, "epoch"):  # what is random in its rows differs between epochs
            self.data.epoch = self.epoch
        loader: DataLoader[Any] = DataLoader(
            self.data,  # type: ignore[arg-type]
            batch_sampler=list(self._batches()),
            num_workers=self.num_workers,
            collate_fn=getattr(self.data, "collate", None),
            pin_memory=torch.cuda.is_available(),
            # Its own generator: starting workers must not draw from the one that dropout draws from.
            generator=torch.Generator().manual_seed(self.seed),
        )
        for batch in loader:
            # Before it is handed out: a checkpoint made while it is in use counts it as done.
            self.rows_done += self.batch_size * self.world_size
            yield batch

    def _batches(self) -> Iterator[list[int]]:
        """Row numbers of the batches that are left in this epoch."""
        count, step = len(self.data), self.batch_size * self.world_size
        if not self.shuffle:
            for at in range(self.rows_done, self._stop, step):
                rows = list(range(at, min(at + step, count)))
                rows += [-1] * (-len(rows) % self.world_size)
                share = len(rows) // self.world_size
                yield rows[self.rank * share : (self.rank + 1) * share]
            return
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(count, generator=generator)
        for at in range(self.rows_done, self._stop, step):
            mine = at + self.rank * self.batch_size
            yield order[mine : mine + self.batch_size].tolist()

    def state_dict(self) -> dict[str, Any]:
        """Where the running epoch stands, and of which rows."""
        return {"epoch": self.epoch, "rows_done": self.rows_done, "facts": self._facts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there at the next `iter`."""
        self.epoch, self.rows_done = state["epoch"], state["rows_done"]
        self._resumed = True
        before = state.get("facts", self._facts)  # which those of older checkpoints do not tell
        changed = [n for n in dict.fromkeys([*before, *self._facts]) if before.get(n) != self._facts.get(n)]
        if changed and self.rows_done:
            told = ", ".join(f"{name} was {before.get(name)} and is {self._facts.get(name)}" for name in changed)
            warnings.warn(
                f"the data are not those that the checkpoint was in: {told}; their epoch begins anew", stacklevel=2
            )
            self.rows_done = 0

    def next_epoch(self) -> None:
        """Leave the rest of the epoch out at the next `iter`."""
        self.epoch, self.rows_done, self._resumed = self.epoch + 1, 0, True
