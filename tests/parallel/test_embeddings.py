"""Tables that learn in backward, whole and in pieces on 2 and 4 processes, do what a plain optimizer does to them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection
from torchrec.optim import RowWiseAdagrad

import zoo
from zoo.data.tables_batch import TableBatch, random_batch
from zoo.data.tables_schema import Schema
from zoo.parallel import Mesh, Sizes, parallelize
from zoo.parallel.embeddings import fuse_embeddings, fused_names, unfuse_embeddings

SCHEMA = Schema.read(
    {
        "dim": 8,
        "features": {
            "item": {"kind": "categorical", "num_embeddings": 13},
            "price": {"kind": "dense"},
            "shop": {"kind": "categorical", "num_embeddings": 3, "dim": 16},
            "words": {"kind": "bag", "num_embeddings": 17, "pooling": "sum"},
            "marks": {"kind": "bag", "num_embeddings": 17, "table": "words", "pooling": "mean"},
            "tags": {"kind": "bag", "num_embeddings": 7, "weights": "shares", "dim": 4, "pooling": "mean"},
            "h1": {"kind": "sequence", "num_embeddings": 13, "table": "item", "pooling": "attention", "target": "item"},
            "h2": {"kind": "sequence", "num_embeddings": 11, "pooling": "mean"},
        },
        "tasks": {"click": {}, "seconds": {"kind": "regression"}},
    }
)
OPTIMIZERS: dict[str, Any] = {"rowwise_adagrad": RowWiseAdagrad, "adagrad": torch.optim.Adagrad, "sgd": torch.optim.SGD}
LR, EPS, STEPS, ROWS = 0.1, 1e-6, 3, 6
# What several processes train; each way to split tables with an optimizer that it goes with.
RUNS = [
    ("auto", "rowwise_adagrad"),
    ("table_wise", "adagrad"),
    ("row_wise", "rowwise_adagrad"),
    ("row_wise", "sgd"),
    ("column_wise", "adagrad"),
]
# Those whose other parameters lie in parts too, by FSDP2.
BESIDE_SHARDS = [("auto", "rowwise_adagrad"), ("row_wise", "sgd")]


def build() -> Any:
    torch.manual_seed(5)
    return zoo.create_model("recommendation/mmoe", schema=SCHEMA, num_experts=2, expert_dims=[8])


def batch(step: int, rank: int) -> TableBatch:
    return random_batch(SCHEMA, ROWS, torch.Generator().manual_seed(100 * step + rank))


def loss(model: Any, outputs: dict[str, torch.Tensor], rows: TableBatch) -> torch.Tensor:
    return sum(model.task_losses(outputs, rows).values(), torch.zeros(()))


def tables_of(model: nn.Module) -> list[nn.Parameter]:
    """Of a plain model."""
    kinds = EmbeddingBagCollection | EmbeddingCollection
    return [p for module in model.modules() if isinstance(module, kinds) for p in module.parameters()]


def plain_optimizers(model: nn.Module, optimizer: str) -> tuple[Any, Any]:
    """Of the tables, and of the rest: a dense optimizer of torch or torchrec in Python."""
    arguments = {} if optimizer == "sgd" else {"eps": EPS}
    own = tables_of(model)
    rest = [p for p in model.parameters() if not any(p is table for table in own)]
    return OPTIMIZERS[optimizer](own, lr=LR, **arguments), torch.optim.SGD(rest, lr=LR)


def plain(optimizer: str, world: int, steps: int = STEPS, rate: float = 1.0) -> tuple[list[float], Any]:
    """Losses and model of whole tables that train on the mean over `world` batches; `rate` is a factor a step."""
    model = build()
    tables, rest = plain_optimizers(model, optimizer)
    losses = []
    for step in range(steps):
        batches = [batch(step, rank) for rank in range(world)]
        mean = sum((loss(model, model(rows), rows) for rows in batches), torch.zeros(())) / world
        tables.zero_grad()
        rest.zero_grad()
        mean.backward()
        tables.param_groups[0]["lr"] = LR * rate**step
        tables.step()
        rest.step()
        losses.append(float(mean.detach()))
    model.tables = tables
    return losses, model


def fused_step(model: Any, run: Any, tables: Any, rest: Any, rows: TableBatch) -> float:
    tables.zero_grad()
    rest.zero_grad()
    found = loss(model, run(rows), rows)
    found.backward()
    tables.step()
    rest.step()
    return float(found.detach())


def rest_of(model: nn.Module) -> Any:
    """An optimizer of what is not a table."""
    own = set(fused_names(model))
    return torch.optim.SGD([p for name, p in model.named_parameters() if name not in own], lr=LR)


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.detach().abs().max()) if value.numel() else 0.0
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")


def whole(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A copy of a state, parts put together."""
    return {name: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for name, v in state.items()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_process_learns_as_a_plain_optimizer_does(optimizer: str) -> None:
    expected, reference = plain(optimizer, 1, rate=0.5)
    model = build()
    tables = fuse_embeddings(model, optimizer, lr=LR, eps=EPS)  # type: ignore[arg-type]
    rest = rest_of(model)
    losses = []
    for step in range(STEPS):
        tables.param_groups[0]["lr"] = LR * 0.5**step
        losses.append(fused_step(model, model, tables, rest, batch(step, 0)))
    assert losses == pytest.approx(expected, rel=1e-5)
    same(model.state_dict(), reference.state_dict())


def test_rows_that_no_id_asks_for_are_not_touched() -> None:
    model = build()
    before = copy.deepcopy(model.state_dict())
    tables = fuse_embeddings(model, "adagrad", lr=LR)
    rows = batch(0, 0)
    fused_step(model, model, tables, rest_of(model), rows)
    assert rows.sequences is not None
    asked = set(rows.sequences["h2"].values().tolist())
    (key,) = (name for name in before if ".h2.weight" in name)
    moved = (model.state_dict()[key] != before[key]).any(1).nonzero().flatten().tolist()
    assert set(moved) == asked
    assert len(asked) < 11


def test_no_other_optimizer_is_given_the_tables() -> None:
    model = build()
    names = {name for name, _ in model.named_parameters()}
    own = {id(p) for p in tables_of(model)}
    expected = {name for name, p in model.named_parameters() if id(p) in own}
    fuse_embeddings(model)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == expected
    assert {name for name, _ in model.named_parameters()} == names
    assert set(fused_names(model)) == expected


def test_a_copy_of_a_fused_model_trains_apart_from_it() -> None:
    model = build()
    tables = fuse_embeddings(model, lr=LR)
    twin = copy.deepcopy(model)
    before = copy.deepcopy(twin.state_dict())
    fused_step(model, model, tables, rest_of(model), batch(0, 0))
    same(twin.state_dict(), before)


def test_tables_put_back_are_plain_and_the_same() -> None:
    model = build()
    tables = fuse_embeddings(model, lr=LR)
    fused_step(model, model, tables, rest_of(model), batch(0, 0))
    expected, outputs = copy.deepcopy(model.state_dict()), model(batch(1, 0))
    unfuse_embeddings(model, tables)
    same(model.state_dict(), expected)
    assert not fused_names(model)
    assert len(tables_of(model)) == len(tables_of(build()))
    same(model(batch(1, 0)), outputs)
    loss(model, model(batch(1, 0)), batch(1, 0)).backward()
    assert all(table.grad is not None for table in tables_of(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": "adagard"}, "adagrad"),
        ({"sharding": "row_wies"}, "row_wise"),
        ({"sharding": "column_wise"}, "one step size"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fuse_embeddings(build(), **arguments)


def test_a_model_without_tables_is_an_error() -> None:
    with pytest.raises(ValueError, match="no torchrec collection"):
        fuse_embeddings(nn.Linear(2, 2))


def test_a_width_that_is_no_multiple_of_4_is_an_error() -> None:
    config = EmbeddingBagConfig(name="shop", num_embeddings=3, embedding_dim=18, feature_names=["shop"])
    model = nn.ModuleDict({"bags": EmbeddingBagCollection(tables=[config])})
    with pytest.raises(ValueError, match=r"a multiple of 4 wide, got bags\.shop of 18"):
        fuse_embeddings(model)


def test_the_state_of_another_optimizer_is_an_error() -> None:
    state = fuse_embeddings(build(), "adagrad").state_dict()
    tables = fuse_embeddings(build(), "rowwise_adagrad")
    with pytest.raises(ValueError, match=r"shop: expected \[3\] of rowwise_adagrad, found \[3, 16\]"):
        tables.load_state_dict(state)


def worker(rank: int, world: int, folder: str) -> None:
    """Train every run; keep losses, state, and the losses of what another layout goes on with."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    found: dict[Any, Any] = {}
    for sharding, optimizer in RUNS:
        model = build()
        if rank:  # what others start from does not count
            for table in tables_of(model):
                nn.init.zeros_(table)
        tables = fuse_embeddings(model, optimizer, lr=LR, eps=EPS, sharding=sharding)  # type: ignore[arg-type]
        run: Any = model
        if (sharding, optimizer) in BESIDE_SHARDS:
            parallelize(model, Mesh(Sizes(shard=world)))
        else:
            model._ddp_params_and_buffers_to_ignore = fused_names(model)
            run = DistributedDataParallel(model)
        rest = rest_of(model)
        losses = [fused_step(model, run, tables, rest, batch(step, rank)) for step in range(STEPS)]
        state, sums = whole(model.state_dict()), copy.deepcopy(tables.state_dict())
        went_on = fused_step(model, run, tables, rest, batch(STEPS, rank))

        again = build()
        tables = fuse_embeddings(again, optimizer, lr=LR, eps=EPS, sharding=sharding)  # type: ignore[arg-type]
        again.load_state_dict(state)
        tables.load_state_dict(sums)
        resumed = fused_step(again, again, tables, rest_of(again), batch(STEPS, rank))
        last = copy.deepcopy(again.state_dict())
        unfuse_embeddings(again, tables)
        with torch.no_grad():
            put_back = loss(again, again(batch(9, rank)), batch(9, rank))
        found[sharding, optimizer] = {
            "losses": [*losses, went_on],
            "state": state,
            "sums": sums,
            "resumed": resumed,
            "last": last,
            "put_back": float(put_back),
        }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def processes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.start_processes(worker, (request.param, str(folder)), nprocs=request.param, start_method="fork")
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize(("sharding", "optimizer"), RUNS)
def test_several_processes_learn_as_one_with_whole_tables(processes: list, sharding: str, optimizer: str) -> None:
    expected, _ = plain(optimizer, len(processes), STEPS + 1)
    _, model = plain(optimizer, len(processes))
    runs = [found[sharding, optimizer] for found in processes]
    means = [sum(each) / len(runs) for each in zip(*(run["losses"] for run in runs))]
    assert means == pytest.approx(expected, rel=1e-5)
    for run in runs:
        same(run["state"], model.state_dict())


@pytest.mark.parametrize(("sharding", "optimizer"), RUNS)
def test_a_checkpoint_goes_on_with_several_processes_and_with_one(
    processes: list, sharding: str, optimizer: str
) -> None:
    runs = [found[sharding, optimizer] for found in processes]
    for run in runs:
        assert run["resumed"] == pytest.approx(run["losses"][-1], rel=1e-5)
    _, expected = plain(optimizer, len(runs), STEPS)
    model = build()
    tables = fuse_embeddings(model, optimizer, lr=LR, eps=EPS)  # type: ignore[arg-type]
    for run in runs:  # every process has the whole of both
        model.load_state_dict(run["state"])
        tables.load_state_dict(run["sums"])
        same(model.state_dict(), expected.state_dict())
        same(by_name(tables.state_dict()["sums"]), sums_of(optimizer, len(runs)))


def by_name(sums: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {f"{path}.{table}": found for path, tables in sums.items() for table, found in tables.items()}


def sums_of(optimizer: str, world: int) -> dict[str, torch.Tensor]:
    """The sums of squares of a plain optimizer, by path and table."""
    _, model = plain(optimizer, world)
    if optimizer == "sgd":
        return {}
    found = {}
    for name, parameter in model.named_parameters():
        if (state := model.tables.state.get(parameter)) is not None:
            path, _, table, _ = name.rsplit(".", 3)
            found[f"{path}.{table}"] = state["sum"].squeeze(-1) if optimizer == "rowwise_adagrad" else state["sum"]
    return found


@pytest.mark.parametrize(("sharding", "optimizer"), RUNS)
def test_tables_put_back_by_several_processes_are_whole(processes: list, sharding: str, optimizer: str) -> None:
    model = build()
    for rank, found in enumerate(processes):
        run = found[sharding, optimizer]
        model.load_state_dict(run["last"])
        assert run["put_back"] == pytest.approx(float(loss(model, model(batch(9, rank)), batch(9, rank)).detach()))
