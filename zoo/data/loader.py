"""Batches in an order that depends on the seed and the epoch alone, and that can be taken up again anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sized
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
            for at in range(self.rows_done, count, step):
                rows = list(range(at, min(at + step, count)))
                rows += [-1] * (-len(rows) % self.world_size)
                share = len(rows) // self.world_size
                yield rows[self.rank * share : (self.rank + 1) * share]
            return
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(count, generator=generator)
        for at in range(self.rows_done, count - step + 1, step):
            mine = at + self.rank * self.batch_size
            yield order[mine : mine + self.batch_size].tolist()

    def state_dict(self) -> dict[str, int]:
        """Where the running epoch stands."""
        return {"epoch": self.epoch, "rows_done": self.rows_done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from there at the next `iter`."""
        self.epoch, self.rows_done = state["epoch"], state["rows_done"]
        self._resumed = True
