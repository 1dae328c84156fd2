"""A model as a graph: what it predicts is what the model does, for any number of rows and ids."""

import pytest
import torch

import zoo
from zoo.data.tables import Preparation
from zoo.data.tables_batch import random_batch
from zoo.data.tables_schema import Schema
from zoo.data.tables_synthetic import synthetic_schema
from zoo.models.recommendation_export import GRAPH, export_graph, graph_inputs

SCHEMA = Schema.read(
    {
        "dim": 4,
        "features": {
            "item": {"kind": "categorical", "num_embeddings": 9},
            "shop.size": {"kind": "dense"},  # a dot may not be in a module's name
            "price": {"kind": "dense"},
            "tags": {"kind": "bag", "num_embeddings": 7, "weights": "shares", "dim": 3, "pooling": "mean"},
            "words": {"kind": "bag", "num_embeddings": 7, "pooling": "sum"},
            "h.1": {"kind": "sequence", "num_embeddings": 9, "table": "item", "pooling": "attention", "target": "item"},
            "h.2": {"kind": "sequence", "num_embeddings": 11, "dim": 2},
        },
        "tasks": {
            "click": {},
            "buy": {"given": "click"},
            "seconds": {"kind": "regression"},
            "stars": {"kind": "ordinal", "classes": 4},
        },
    }
)
# Many experts and few choices, so that the model itself computes only what gates ask for.
SPARSE = {"num_experts": 32, "router": {"name": "TopKRouter", "k": 1}}


@pytest.mark.parametrize(
    ("name", "schema", "arguments"),
    [
        ("mmoe", SCHEMA, SPARSE),
        ("single_task", SCHEMA, {}),
        ("dselect_k_mmoe", synthetic_schema(5), {}),
    ],
)
def test_the_graph_predicts_what_the_model_does(name, schema, arguments, tmp_path):
    torch.manual_seed(1)
    model = zoo.create_model(f"recommendation/{name}", schema=schema, **arguments).eval()
    export_graph(model, tmp_path / "graph")
    program = torch.export.load(tmp_path / "graph" / GRAPH)
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in operators if "fbgemm" in name or "zoo" in name]  # a server needs torch alone
    unknown = ("stable", "repeat_interleave", "searchsorted", "rshift")  # to ONNX
    assert not [name for name in operators if any(part in name for part in unknown)]
    graph = program.module()
    for rows, most in ((0, 4), (1, 0), (2, 4), (100, 9)):  # bags of one row may all be empty
        batch = random_batch(schema, rows, torch.Generator().manual_seed(rows), most=most)
        expected = model.predictions(model(batch))
        found = graph(*graph_inputs(schema, batch))
        assert found.keys() == expected.keys()
        for task, values in expected.items():
            torch.testing.assert_close(found[task], values, rtol=1e-5, atol=1e-6)


def test_the_preparation_goes_along_and_no_folder_is_overwritten(tmp_path):
    model = zoo.create_model("recommendation/shared_bottom", schema=synthetic_schema(3)).eval()
    model.preparation = Preparation(model.schema, {}, {})
    export_graph(model, tmp_path / "graph")
    assert Preparation.load(tmp_path / "graph") == model.preparation
    with pytest.raises(FileExistsError, match="not empty"):
        export_graph(model, tmp_path / "graph")
