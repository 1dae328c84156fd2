"""A recommendation model as a graph of torch's own operators, for serving without torchrec or this library.

    export_graph(zoo.from_pretrained("my-model"), "served")
    predictions = torch.export.load("served/model.pt2").module()(dense, ids)
    torch.onnx.export(torch.export.load("served/model.pt2"), f="served/model.onnx", dynamo=True)

dense [B, N] are the schema's dense features in order, transformed; ids is a mapping by feature: of a categorical one
the ids [B], of a bag or sequence (values, lengths), of a weighted bag (values, lengths, weights): the ids of all rows
one behind the other, how many of them each row has [B], and a weight for each id. `graph_inputs` makes both of a batch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..data.tables_batch import TableBatch, random_batch
from ..data.tables_schema import Bag, Categorical, Dense, Schema, Sequence
from ..moe import portable
from ..pretrained.staging import staged

GRAPH = "model.pt2"
_EXAMPLE_ROWS = 16  # enough that no size is 0 or 1, which would not count as any size


class Graph(nn.Module):
    """The inference of a model with plain lookups in its tables: predictions by name, [B] each."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.schema: Schema = model.schema
        inputs = model.inputs
        several = isinstance(getattr(inputs, "each", None), nn.ModuleList)  # a model whose tasks share nothing
        self.inputs = nn.ModuleList(_Lookup(self.schema, part) for part in (inputs.each if several else [inputs]))
        self.several = several
        self.sharing, self.towers, self.predictions = model.sharing, model.towers, model.predictions

    def forward(self, dense: Tensor, ids: Mapping[str, Any]) -> dict[str, Tensor]:
        """Predictions by name of inputs as this module describes them."""
        vectors = [lookup(dense, ids) for lookup in self.inputs]
        x = torch.stack(vectors) if self.several else vectors[0]
        domain = None if self.schema.domain is None else ids[self.schema.domain]
        return self.predictions(self.towers(self.sharing(x, domain), domain))


def rows_of(lengths: Tensor, count: int) -> Tensor:
    """The row of each of `count` ids, int64, of how many of them every row [B] has: how often a row has ended by then.

    torch.repeat_interleave, which ONNX does not know.
    """
    ends = lengths.cumsum(0)
    return torch.zeros(count + 1, dtype=torch.int64).scatter_add(0, ends, torch.ones_like(ends)).cumsum(0)[:count]


class _Lookup(nn.Module):
    """What `FeatureEncoder` makes of rows, without torchrec: x [B, out_dim]."""

    def __init__(self, schema: Schema, inputs: Any) -> None:
        super().__init__()
        self.schema = schema
        self.names: list[str] = list(inputs.columns)  # in the order of x
        self.dense = {f.name: i for i, f in enumerate(schema.of(Dense))}
        tables: dict[str, nn.Parameter] = inputs.tables() if len(self.dense) < len(self.names) else {}
        own = list({id(table): table for table in tables.values()}.values())  # once where features share one
        self.tables = nn.ParameterList(own)
        self.table_of = {name: [id(t) for t in own].index(id(table)) for name, table in tables.items()}
        attentive = [name for name in tables if getattr(schema[name], "pooling", None) == "attention"]
        self.units = nn.ModuleList(inputs.unit(name) for name in attentive)
        self.unit_of = {name: i for i, name in enumerate(attentive)}

    def forward(self, dense: Tensor, ids: Mapping[str, Any]) -> Tensor:
        pieces = []
        for name in self.names:
            f = self.schema[name]
            pieces.append(self._embedded(f, ids) if isinstance(f, Categorical) else dense[:, self.dense[name], None])
        return torch.cat(pieces, 1)

    def _embedded(self, f: Categorical, ids: Mapping[str, Any]) -> Tensor:
        """A feature [B, width]."""
        table = self.tables[self.table_of[f.name]]
        if not isinstance(f, Bag | Sequence):
            return nn.functional.embedding(ids[f.name], table)
        values, lengths, *weights = ids[f.name]
        embedded = nn.functional.embedding(values, table)
        rows = rows_of(lengths, values.shape[0])
        total = lengths.to(table.dtype)
        if weights:
            embedded = embedded * weights[0].unsqueeze(1)
            total = torch.zeros_like(total).index_add(0, rows, weights[0])
        elif f.pooling == "attention":
            query = self._embedded(cast(Categorical, self.schema[cast(Sequence, f).target or ""]), ids)
            embedded = embedded * self.units[self.unit_of[f.name]](embedded, query.index_select(0, rows))
        pooled = embedded.new_zeros(lengths.shape[0], table.shape[1]).index_add(0, rows, embedded)
        return pooled / torch.where(total == 0, 1, total).unsqueeze(1) if f.pooling == "mean" else pooled


def graph_inputs(schema: Schema, batch: TableBatch) -> tuple[Tensor, dict[str, Any]]:
    """A batch as the graph takes it: (dense, ids)."""
    ids: dict[str, Any] = {}
    for part in (batch.ids, batch.weighted, batch.sequences):
        # torchrec cannot part the ids of no rows by feature; all of it is then what each has.
        by_name = {} if part is None else part.to_dict() if len(batch) else dict.fromkeys(part.keys(), part)
        for name, found in by_name.items():
            weights = found.weights_or_none()
            several = (found.values(), found.lengths(), *([] if weights is None else [weights]))
            ids[name] = several if isinstance(schema[name], Bag | Sequence) else found.values()
    return batch.dense, ids


@torch.no_grad()
def export_graph(model: Any, folder: str | os.PathLike[str]) -> torch.export.ExportedProgram:
    """Trace a model's inference into FOLDER/model.pt2, for any number of rows and ids.

    The model's preparation.json goes beside it, where it has one. Raises FileExistsError for a folder that is not
    empty, ValueError for another kind of model.
    """
    if not hasattr(model, "schema"):
        raise ValueError(f"export_graph: expected a recommendation model, got a {type(model).__name__}")
    example = random_batch(model.schema, _EXAMPLE_ROWS, torch.Generator().manual_seed(0))
    dense, ids = graph_inputs(model.schema, example)
    graph = Graph(model).eval()
    rows = torch.export.Dim("rows")
    sizes: dict[str, Any] = {
        name: {0: rows} if isinstance(given, Tensor) else _jagged_sizes(name, rows, len(given))
        for name, given in ids.items()
    }
    with portable():
        program = torch.export.export(graph, (dense, ids), dynamic_shapes=({0: rows}, sizes))
    with staged(folder) as staging:
        torch.export.save(program, staging / GRAPH)
        if getattr(model, "preparation", None) is not None:
            model.preparation.save(staging)
    return program


def _jagged_sizes(name: str, rows: Any, parts: int) -> tuple[dict[int, Any], ...]:
    count = torch.export.Dim(f"ids_{''.join(c if c.isalnum() else '_' for c in name)}")
    return ({0: count}, {0: rows}, {0: count})[:parts]
