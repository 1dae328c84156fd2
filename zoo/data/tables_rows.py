"""Encoded rows of a table in memory, and batches of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .tables_batch import TableBatch, keyed
from .tables_schema import Bag, Categorical, Schema
from .tables_schema import Sequence as History
from .tables_values import spans


@dataclass(frozen=True)
class Jagged:
    """Any number of ids a row: row i has values[offsets[i]:offsets[i + 1]], int32, each with a weight or not."""

    values: np.ndarray
    offsets: np.ndarray
    weights: np.ndarray | None = None

    def take(self, rows: np.ndarray, real: np.ndarray) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ids, their number a row and their weights, of rows [B]; rows that are not real have none."""
        starts = _gather(self.offsets[:-1], rows, real)
        lengths = _gather(np.diff(self.offsets), rows, real)
        at = spans(starts, lengths)
        weights = None if self.weights is None else torch.from_numpy(self.weights[at])
        return torch.from_numpy(self.values[at]), torch.from_numpy(lengths), weights


@dataclass(frozen=True)
class Rows:
    """N rows as `Preparation.encode` makes them, for `Loader` to take batches of.

    numbers [N] int64: of the rows in their source. dense [N, D] float32, ids [N, C] int32: of the C categorical
    features in order. jagged: bags and sequences by name. labels [N, K] float32, nan for none.
    """

    schema: Schema
    numbers: np.ndarray
    dense: np.ndarray
    ids: np.ndarray
    jagged: Mapping[str, Jagged]
    labels: np.ndarray
    group: np.ndarray | None = None
    weight: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def batch(self, indices: Sequence[int]) -> TableBatch:
        """The rows at `indices`; an index of -1 gives one that counts nowhere, without ids, labels or weight."""
        rows = np.asarray(indices, np.int64)
        real = rows >= 0
        ids = _gather(self.ids, rows, real)
        taken = {name: jagged.take(rows, real) for name, jagged in self.jagged.items()}
        ones = torch.ones(len(rows), dtype=torch.int64)
        for column, f in enumerate(self.schema.of(Categorical)):
            taken[f.name] = torch.from_numpy(ids[:, column]), ones, None
        parts: dict[str, list[str]] = {"ids": [], "weighted": [], "sequences": []}
        for f in self.schema.features:
            if isinstance(f, Categorical):
                weighted = isinstance(f, Bag) and f.weights is not None
                parts["sequences" if isinstance(f, History) else "weighted" if weighted else "ids"].append(f.name)
        return TableBatch(
            row=torch.from_numpy(_gather(self.numbers, rows, real, -1)),
            dense=torch.from_numpy(_gather(self.dense, rows, real)),
            labels=torch.from_numpy(_gather(self.labels, rows, real, np.nan)),
            group=None if self.group is None else torch.from_numpy(_gather(self.group, rows, real, -1)),
            weight=None if self.weight is None else torch.from_numpy(_gather(self.weight, rows, real)),
            **{kind: _keyed(names, taken) for kind, names in parts.items()},
        )

    def __getitems__(self, indices: Sequence[int]) -> TableBatch:
        """What a DataLoader calls for a whole batch."""
        return self.batch(indices)

    @staticmethod
    def collate(batch: TableBatch) -> TableBatch:
        """What `__getitems__` returns is a batch already."""
        return batch

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """Rows of several parts, one or more, one behind the other."""
        first = parts[0]
        arrays = {name: [getattr(part, name) for part in parts] for name in ("numbers", "dense", "ids", "labels")}
        arrays |= {n: [getattr(p, n) for p in parts] for n in ("group", "weight") if getattr(first, n) is not None}
        jagged = {name: _joined([part.jagged[name] for part in parts]) for name in first.jagged}
        joined: dict[str, Any] = {name: np.concatenate(found) for name, found in arrays.items()}
        return cls(schema=first.schema, jagged=jagged, **joined)


def _gather(source: np.ndarray, rows: np.ndarray, real: np.ndarray, otherwise: float = 0) -> np.ndarray:
    """source[rows], and `otherwise` for the rows that are not real."""
    if real.all():
        return source[rows]
    taken = np.full((len(rows), *source.shape[1:]), otherwise, source.dtype)
    taken[real] = source[rows[real]]
    return taken


def _joined(parts: Sequence[Jagged]) -> Jagged:
    lengths = np.concatenate([np.diff(part.offsets) for part in parts])
    weights = [part.weights for part in parts if part.weights is not None]
    return Jagged(
        np.concatenate([part.values for part in parts]),
        np.concatenate([[0], np.cumsum(lengths)]),
        np.concatenate(weights) if weights else None,
    )


def _keyed(names: Sequence[str], taken: Mapping[str, tuple[Tensor, Tensor, Tensor | None]]) -> Any:
    values, lengths, weights = zip(*(taken[name] for name in names)) if names else ((), (), ())
    weighted = bool(names) and weights[0] is not None
    return keyed(names, values, lengths, weights if weighted else None)
