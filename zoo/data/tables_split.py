"""A table: what its columns mean, and readers of its rows by split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np

from .corpus import SPLITS
from .tables_encode import Preparation, columns_needed
from .tables_files import Chunk, Part, Reader
from .tables_rows import Rows
from .tables_schema import Categorical, Dense, Schema
from .tables_values import uniform

HELD_OUT = 0.1  # of the rows, for val and for test each


@dataclass(frozen=True)
class Table:
    """Readers of rows by split, and what their columns mean; sizes of vocabularies may still be open."""

    origin: str
    schema: Schema
    splits: Mapping[str, Reader]

    @property
    def description(self) -> str:
        """What it is, in one line."""
        dense, ids = len(self.schema.of(Dense)), sum(isinstance(f, Categorical) for f in self.schema.features)
        tasks = ", ".join(task.name for task in self.schema.tasks)
        return f"{self.origin}: {dense} numbers and {ids} features of ids a row; tasks {tasks}"

    def check(self) -> None:
        """Raise ValueError when a split lacks a column of the schema, naming the nearest."""
        for reader in self.splits.values():
            with _naming(reader):
                columns_needed(self.schema, reader.names)

    def split(self, name: str) -> Reader:
        """The reader of "train", "val" or "test"; raises ValueError where there is none."""
        if name not in self.splits:
            raise ValueError(f"{self.origin} has no rows to {name} on")
        return self.splits[name]

    def fit(self) -> Preparation:
        """Learn from the rows to train on; raises ValueError when there are none, or they cannot be encoded."""
        reader = self.split("train")
        with _naming(reader):
            wanted = columns_needed(self.schema, reader.names)
            return Preparation.fit(self.schema, _some(reader.chunks(wanted), "train"))

    def encode(self, name: str, preparation: Preparation) -> Rows:
        """All rows of a split in memory; raises ValueError when there are none, or they cannot be encoded."""
        reader = self.split(name)
        with _naming(reader):
            wanted = columns_needed(preparation.schema, reader.names)
            chunks = _some(reader.chunks(wanted), name)
            return Rows.joined([preparation.encode(columns, rows) for rows, columns in chunks])


@contextmanager
def _naming(reader: Reader) -> Iterator[None]:
    """Put where rows are from before what is wrong with them."""
    try:
        yield
    except ValueError as error:
        origin = reader.origin
        raise ValueError(str(error) if str(error).startswith(origin) else f"{origin}: {error}") from error


def _some(chunks: Iterator[Chunk], split: str) -> Iterator[Chunk]:
    empty = True
    for chunk in chunks:
        empty = False
        yield chunk
    if empty:
        raise ValueError(f"expected rows to {split} on, got none")


def held_out_of(readers: Mapping[str, Reader], held_out: float = HELD_OUT) -> dict[str, Reader]:
    """The splits as they are, and those that are missing as shares of the rows to train on.

    A hash of its number decides where a row goes, so that a split depends neither on the machine nor on a seed.
    """
    missing = [split for split in SPLITS if split not in readers] if held_out else []
    if not missing:
        return dict(readers)
    train, kept = readers["train"], 1 - held_out * len(missing)
    bounds = {split: kept + held_out * place for place, split in enumerate(missing)}
    made = {split: Part(train, partial(between, low, low + held_out)) for split, low in bounds.items()}
    return {**readers, "train": Part(train, partial(between, 0.0, kept)), **made}


def between(low: float, high: float, rows: np.ndarray) -> np.ndarray:
    """Whether the hashes of row numbers [B] are from low to high; of all rows a share of high - low are."""
    at = uniform(rows)
    return (at >= low) & (at < high)
