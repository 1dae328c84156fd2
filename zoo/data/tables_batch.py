"""Rows of a table as a recommendation model takes them."""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .tables_schema import Bag, Dense, Schema, Sequence

if TYPE_CHECKING:
    from torchrec import KeyedJaggedTensor

# The largest group number that `random_batch` draws: small, so that groups have several rows.
RANDOM_GROUPS = 8


@dataclass
class TableBatch:
    """B rows with N dense features and K tasks.

    row [B] int64: the number of each row in its source, -1 where it only fills up a batch and counts nowhere.
    dense [B, N] float32: the schema's dense features in order, transformed. ids: its categorical features and bags
    without weights; weighted: its bags with weights; sequences: its sequences; each keyed by the features' names in
    order, with int64 values, or None where there are none. labels [B, K] float32: in the order of the tasks, nan where
    a row has none. group [B] int64 and weight [B] float32: where the schema names them.
    """

    row: Tensor
    dense: Tensor
    ids: KeyedJaggedTensor | None
    weighted: KeyedJaggedTensor | None
    sequences: KeyedJaggedTensor | None
    labels: Tensor
    group: Tensor | None = None
    weight: Tensor | None = None

    def __len__(self) -> int:
        return len(self.row)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TableBatch:
        """The same rows on another device."""
        return self._each(lambda part: part.to(torch.device(device), non_blocking=non_blocking))

    def pin_memory(self) -> TableBatch:
        """The same rows in memory from which a GPU copies on its own; what a DataLoader calls."""
        return self._each(lambda part: part.pin_memory())

    def record_stream(self, stream: Any) -> None:
        """Keep the memory until what `stream` does with it is done; what torchrec's pipelines call."""
        for part in self._parts().values():
            part.record_stream(stream)

    def _each(self, change: Any) -> TableBatch:
        return replace(self, **{name: change(part) for name, part in self._parts().items()})

    def _parts(self) -> dict[str, Any]:
        return {f.name: part for f in fields(self) if (part := getattr(self, f.name)) is not None}


def keyed(
    keys: Several[str], values: Several[Tensor], lengths: Several[Tensor], weights: Several[Tensor] | None = None
) -> KeyedJaggedTensor | None:
    """Features as torchrec takes them, or None for no feature.

    Of each feature, values [ids of all rows], lengths [B] (how many of them a row has) and, if any, weights of the ids.
    """
    if not keys:
        return None
    from torchrec import KeyedJaggedTensor

    return KeyedJaggedTensor(
        list(keys),
        torch.cat(list(values)).long(),
        None if weights is None else torch.cat(list(weights)).float(),
        lengths=torch.cat(list(lengths)).long(),
        stride=len(lengths[0]),
    )


def in_order(ids: KeyedJaggedTensor, names: Several[str]) -> KeyedJaggedTensor:
    """The features of `names`, in this order."""
    if ids.keys() == names:
        return ids
    where = {key: i for i, key in enumerate(ids.keys())}
    return ids.permute([where[name] for name in names])


def random_batch(
    schema: Schema, size: int, generator: torch.Generator | None = None, most: int = 4, unlabelled: float = 0.0
) -> TableBatch:
    """`size` rows of a schema whose tables all have a size, for measurements, tracing and tests.

    Bags and sequences have 0 to `most` ids; a share `unlabelled` of labels is nan. Raises ValueError for a table
    without a size.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def below(limit: int, count: int) -> Tensor:
        return torch.randint(limit, (count,), generator=generator)

    parts: dict[str, list[list[Any]]] = {kind: [[], [], [], []] for kind in ("ids", "weighted", "sequences")}
    for f in schema.features:
        if isinstance(f, Dense):
            continue
        if f.num_embeddings is None:
            raise ValueError(f"feature {f.name!r}: num_embeddings is open; expected a schema fitted to data")
        several = isinstance(f, Bag | Sequence)
        longest = min(most, f.max_length) if isinstance(f, Sequence) else most
        lengths = below(longest + 1, size) if several else torch.ones(size, dtype=torch.int64)
        count = int(lengths.sum())
        weighted = isinstance(f, Bag) and f.weights is not None
        kind = "sequences" if isinstance(f, Sequence) else "weighted" if weighted else "ids"
        for column, part in zip(parts[kind], (f.name, below(f.num_embeddings, count), lengths, uniform(count))):
            column.append(part)
    labels = torch.stack([_random_labels(task, size, generator) for task in schema.tasks], 1)
    labels[uniform(*labels.shape) < unlabelled] = torch.nan
    return TableBatch(
        torch.arange(size),
        torch.randn(size, len(schema.of(Dense)), generator=generator),
        keyed(*parts["ids"][:3]),
        keyed(*parts["weighted"]),
        keyed(*parts["sequences"][:3]),
        labels,
        below(RANDOM_GROUPS, size) if schema.group else None,
        uniform(size) + 0.5 if schema.weight else None,
    )


def _random_labels(task: Any, size: int, generator: torch.Generator | None) -> Tensor:
    if task.kind == "regression":
        return torch.randn(size, generator=generator)
    return torch.randint(task.classes or 2, (size,), generator=generator).float()
