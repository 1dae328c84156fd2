"""What a recommendation model sees of a batch: embeddings of its sparse features beside its dense ones.

Tables live in torchrec collections, which `zoo.parallel` can fuse and shard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor

from ..data.tables_batch import in_order
from ..data.tables_schema import Bag, Categorical, Dense, Schema, Sequence

if TYPE_CHECKING:
    from ..data.tables_batch import TableBatch

# Width of the hidden layer of the activation unit: Figure 2 of 1706.06978.
ATTENTION_HIDDEN = 36
# The fields of a TableBatch that hold ids.
_PARTS = ("ids", "weighted", "sequences")


class FeatureEncoder(nn.Module):
    """Rows of a table as vectors x [B, out_dim]: an embedding for every sparse feature, then the dense features.

    A table is in one of three places: `embeddings`, an EmbeddingBagCollection; `weighted`, another one, for tables that
    some weighted bag uses; `sequences`, an EmbeddingCollection a width, for tables that some feature with attention
    uses. Either is None or empty where no table is. `columns` says where in x a feature is.

    A sum or mean over no ids is 0; the mean of a weighted bag is sum_i w_i e_i / sum_i w_i. Tables start as DLRM's
    (1906.00091), uniform within 1 / sqrt(rows) of 0: the rows of a large table are seldom seen, and start small. In
    another precision than float32 a batch's dense features must be in it too, and torchrec still adds in float32.

    Raises ValueError for a table without a size, or that features want in two sizes or widths, and for names of tables,
    or of features with attention, that are the same once dots are underscores.
    """

    def __init__(self, schema: Schema) -> None:
        super().__init__()
        self.schema = schema
        self._places = _places(schema)
        self.embeddings = _bag_collection(self._places.get("embeddings"), False)
        self.weighted = _bag_collection(self._places.get("weighted"), True)
        self.sequences = nn.ModuleDict()
        self.attention = nn.ModuleDict()
        self.columns: dict[str, slice] = {}
        for place, tables in self._places.items():
            if place not in ("embeddings", "weighted"):
                self.sequences[place] = EmbeddingCollection([EmbeddingConfig(**t.config) for t in tables])
            for f in (f for table in tables for f in table.features):
                self._add_columns(f.name, f.dim or schema.dim)
                if _attends(f):
                    name = _module_name(f.name)
                    if name in self.attention:
                        raise ValueError(
                            f"feature {f.name!r}: another with attention has the same name once dots are underscores"
                        )
                    self.attention[name] = ActivationUnit(f.dim or schema.dim)
        for dense in schema.of(Dense):
            self._add_columns(dense.name, 1)

    @property
    def out_dim(self) -> int:
        """Width of x."""
        return max((where.stop for where in self.columns.values()), default=0)

    def _add_columns(self, name: str, width: int) -> None:
        self.columns[name] = slice(self.out_dim, self.out_dim + width)

    def forward(self, batch: TableBatch) -> Tensor:
        """x [B, out_dim] of a batch."""
        if not len(batch):  # torchrec cannot part the ids of no rows by feature
            return batch.dense.new_zeros(0, self.out_dim)
        ids = {place: self._ids_of(batch, place) for place in self._places}
        # All lookups start before the first is waited for: those of sharded tables travel.
        found = {place: self._collection(place)(ids[place]) for place in ids}
        bags = [place for place in found if place not in self.sequences]
        pieces = [self._pooled(place, ids[place], found[place]) for place in bags]
        pooled = torch.cat(pieces, 1) if pieces else batch.dense[:, :0]
        items = [item for place in found if place in self.sequences for item in self._items(place, found[place])]
        single = {f.name: embedded for f, _, embedded in items if type(f) is Categorical}

        def query(name: str) -> Tensor:
            return single[name] if name in single else pooled[:, self.columns[name]]

        return torch.cat([pooled, *(self._pool_items(batch, *item, query) for item in items), batch.dense], 1)

    def _ids_of(self, batch: TableBatch, place: str) -> KeyedJaggedTensor:
        """The ids that a place's features have; weights in the tables' own precision, as torch asks for."""
        ids = _ids(batch, self._places[place], place == "weighted")
        weights, dtype = ids.weights_or_none(), self._dtype(place)
        if weights is None or weights.dtype == dtype:
            return ids
        return KeyedJaggedTensor(ids.keys(), ids.values(), weights.to(dtype), ids.lengths(), stride=ids.stride())

    def _dtype(self, place: str) -> torch.dtype:
        """The precision of a place's tables; of sharded ones float32, whatever they are stored in."""
        collection = self._collection(place)
        whole = isinstance(collection, EmbeddingBagCollection | EmbeddingCollection)
        return next(collection.parameters()).dtype if whole else torch.float32

    def domain(self, batch: TableBatch) -> Tensor | None:
        """Which scenario each row [B] is of, as the schema's `domain` numbers them; None where it names none."""
        if self.schema.domain is None:
            return None
        assert batch.ids is not None
        return batch.ids[self.schema.domain].values()

    def tables(self) -> dict[str, nn.Parameter]:
        """The embedding table [rows, width] of each sparse feature; of tables that are neither fused nor sharded."""
        found: dict[str, nn.Parameter] = {}
        for place, tables in self._places.items():
            collection = self._collection(place)
            rows = collection.embeddings if place in self.sequences else collection.embedding_bags
            found |= {f.name: rows[table.config["name"]].weight for table in tables for f in table.features}
        return found

    def unit(self, name: str) -> ActivationUnit:
        """The activation unit of a feature with attention."""
        return cast(ActivationUnit, self.attention[_module_name(name)])

    def _collection(self, place: str) -> Any:
        return self.sequences[place] if place in self.sequences else getattr(self, place)

    def _pooled(self, place: str, ids: KeyedJaggedTensor, found: Any) -> Tensor:
        """The sums [B, width of all] of a place's bags, and means where asked for."""
        features = [f for table in self._places[place] for f in table.features]
        names = [f.name for f in features]
        in_order = list(found.keys()) == names  # sharded tables come in the order of their pieces
        sums: Tensor = found.values() if in_order else torch.cat([found[name] for name in names], 1)
        sums = sums.to(self._dtype(place))
        if not any(_is_mean(f) for f in features):
            return sums
        # Sums of row-wise sharded tables are whole, their means would not be: so the tables sum, and we divide.
        total = _totals(ids).view(len(features), -1, 1)
        each = sums.split([f.dim or self.schema.dim for f in features], 1)
        return torch.cat([x / total[i] if _is_mean(f) else x for i, (f, x) in enumerate(zip(features, each))], 1)

    def _items(self, place: str, found: Any) -> list[tuple[Categorical, Tensor, Tensor]]:
        """Of each feature of a collection of sequences: lengths [B] and embeddings [ids of all rows, width]."""
        features = [f for table in self._places[place] for f in table.features]
        return [(f, found[f.name].lengths(), found[f.name].values().to(self._dtype(place))) for f in features]

    def _pool_items(
        self, batch: TableBatch, f: Categorical, lengths: Tensor, embedded: Tensor, query: Callable[[str], Tensor]
    ) -> Tensor:
        """One feature [B, width] from the embeddings of its ids."""
        if type(f) is Categorical:
            return embedded
        rows = torch.repeat_interleave(lengths.long(), output_size=embedded.shape[0])
        total: Tensor = lengths
        if _attends(f):
            queries = query(cast(Sequence, f).target or "").index_select(0, rows)
            embedded = embedded * self.unit(f.name)(embedded, queries)
        elif _part(f) == "weighted":
            weights = batch.weighted[f.name].weights().to(embedded.dtype)  # type: ignore[index]
            embedded = embedded * weights[:, None]
            total = weights.new_zeros(lengths.shape[0]).index_add(0, rows, weights)
        pooled = embedded.new_zeros(lengths.shape[0], embedded.shape[1]).index_add(0, rows, embedded)
        return pooled / _nonzero(total)[:, None] if _is_mean(f) else pooled


class ActivationUnit(nn.Module):
    """How much an item of a history counts for a query: an MLP of [key, query, key - query, key * query].

    Deep Interest Network (1706.06978), section 4.3; the weights are not normalised, so that how strongly a history
    speaks is kept. (The paper's unit takes an outer product of the two; its published code, as here, these four.)
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4 * width, ATTENTION_HIDDEN), nn.PReLU(), nn.Linear(ATTENTION_HIDDEN, 1))

    def forward(self, key: Tensor, query: Tensor) -> Tensor:
        """Weights [A, 1] of keys [A, width] for the queries [A, width] beside them."""
        return self.layers(torch.cat([key, query, key - query, key * query], 1))


@dataclass
class _Table:
    """Rows of embeddings and the features that look there."""

    config: dict[str, Any]
    features: list[Categorical] = field(default_factory=list)


def _part(f: Categorical) -> str:
    """The field of a TableBatch that holds a feature's ids."""
    if isinstance(f, Sequence):
        return "sequences"
    return "weighted" if isinstance(f, Bag) and f.weights is not None else "ids"


def _attends(f: Categorical) -> bool:
    return isinstance(f, Sequence) and f.pooling == "attention"


def _is_mean(f: Categorical) -> bool:
    return isinstance(f, Bag | Sequence) and f.pooling == "mean"


def _module_name(name: str) -> str:
    """A name that a module may have: without dots, and not that of a method of modules."""
    name = name.replace(".", "_")
    return f"{name}_" if hasattr(nn.ModuleDict, name) or name == "training" else name


def _places(schema: Schema) -> dict[str, list[_Table]]:
    """The tables of a schema in the order of their first feature, by the collection they are in."""
    tables: dict[str, _Table] = {}
    for f in schema.features:
        if not isinstance(f, Categorical):
            continue
        name = f.table or f.name
        if f.num_embeddings is None:
            raise ValueError(f"feature {f.name!r}: num_embeddings is open; expected a schema fitted to data")
        config = {"name": _module_name(name), "num_embeddings": f.num_embeddings, "embedding_dim": f.dim or schema.dim}
        table = tables.setdefault(name, _Table(config))
        if table.config != config:
            found, expected = ((c["num_embeddings"], c["embedding_dim"]) for c in (config, table.config))
            raise ValueError(f"feature {f.name!r} wants table {name!r} as {found}; other features as {expected}")
        table.features.append(f)
    names = [table.config["name"] for table in tables.values()]
    if len(set(names)) < len(names):
        raise ValueError(f"tables {', '.join(sorted(tables))}: some have the same name once dots are underscores")
    places: dict[str, list[_Table]] = {}
    for table in tables.values():
        table.config["feature_names"] = [f.name for f in table.features]
        place = "weighted" if any(_part(f) == "weighted" for f in table.features) else "embeddings"
        place = str(table.config["embedding_dim"]) if any(map(_attends, table.features)) else place
        places.setdefault(place, []).append(table)
    return {place: places[place] for place in sorted(places, key=lambda p: (p.isdigit(), p))}


def _bag_collection(tables: list[_Table] | None, is_weighted: bool) -> EmbeddingBagCollection | None:
    if not tables:
        return None
    return EmbeddingBagCollection([EmbeddingBagConfig(**t.config) for t in tables], is_weighted)


def _ids(batch: TableBatch, tables: list[_Table], weighted: bool) -> KeyedJaggedTensor:
    """The ids that the tables' features have, in the tables' order; with weights, 1 where a feature has none."""
    features = [f for table in tables for f in table.features]
    wanted = {_part(f) for f in features}
    parts: list[KeyedJaggedTensor] = [getattr(batch, part) for part in _PARTS if part in wanted]
    found = parts[0]
    if len(parts) > 1 or weighted != (found.weights_or_none() is not None):
        found = KeyedJaggedTensor(
            list(chain.from_iterable(part.keys() for part in parts)),
            torch.cat([part.values() for part in parts]),
            torch.cat([_weights(part) for part in parts]) if weighted else None,
            lengths=torch.cat([part.lengths() for part in parts]),
            stride=found.stride(),
        )
    return in_order(found, [f.name for f in features])


def _weights(ids: KeyedJaggedTensor) -> Tensor:
    weights = ids.weights_or_none()
    return ids.values().new_ones(ids.values().shape[0], dtype=torch.float32) if weights is None else weights


def _totals(ids: KeyedJaggedTensor) -> Tensor:
    """What the sums of bags [F * B] are divided by for their means: how many ids they have, or the ids' weights."""
    lengths, weights = ids.lengths(), ids.weights_or_none()
    if weights is None:
        return lengths.clamp(min=1)
    bags = torch.repeat_interleave(lengths.long(), output_size=weights.shape[0])
    return _nonzero(weights.new_zeros(lengths.shape[0]).index_add(0, bags, weights))


def _nonzero(totals: Tensor) -> Tensor:
    return torch.where(totals == 0, 1, totals)
