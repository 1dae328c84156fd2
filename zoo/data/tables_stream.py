"""Batches of a table that need not fit into memory, in order, for prediction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .tables_batch import TableBatch
from .tables_encode import Preparation, columns_needed
from .tables_files import TableFiles


@dataclass(frozen=True)
class Stream:
    """Rows of files without labels, from row number `skip` on, as batches of batch_size rows on each rank.

    Rank r of W has the r-th share of every W * batch_size rows, as in `Loader`; rows that only make ranks' batches
    equally long have the number -1. A batch is shorter where a file ends. Raises ValueError for a column that is not
    there and for values that cannot be encoded, naming file or row, and for a batch_size below 1.
    """

    files: TableFiles
    preparation: Preparation
    batch_size: int
    skip: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    def check(self) -> None:
        """Raise ValueError when the first file lacks a column of a feature."""
        self._columns()

    def __iter__(self) -> Iterator[TableBatch]:
        columns = self._columns()
        for numbers, values in self.files.chunks(columns, self.batch_size * self.world_size, self.skip):
            share = -(-len(numbers) // self.world_size)
            mine = slice(self.rank * share, (self.rank + 1) * share)
            try:
                rows = self.preparation.encode({n: v[mine] for n, v in values.items()}, numbers[mine], labels=False)
            except ValueError as error:
                raise ValueError(f"{self.files.origin}: {error}") from error
            yield rows.batch([*range(len(rows)), *[-1] * (share - len(rows))])

    def _columns(self) -> list[str]:
        try:
            return columns_needed(self.preparation.schema, self.files.names, labels=False)
        except ValueError as error:
            raise ValueError(f"{self.files.origin}: {error}") from error
