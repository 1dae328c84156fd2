"""Models over several processes learn what one process with the whole batch learns, on every mesh."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import zoo
from zoo.data.tables_batch import TableBatch, keyed
from zoo.models.contrastive import contrastive_loss
from zoo.moe import Experts, balance, record
from zoo.parallel import Mesh, Sizes, clip_grad_norm_, parallelize
from zoo.parallel.parts import whole_state
from zoo.parallel.spread import blocks, spreadable

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 64, "initializer_range": 0.2}
GLOBAL = {"global_batch": 0.5, "z": 0.1}
BY_SEQUENCE = {"name": "TopKRouter", "k": 2, "group_size": "sequence"}
ENTROPIES = {
    "local_entropy": {"weight": 0.1, "global_batch": True, "only": [1]},
    "global_entropy": {"weight": 0.1, "global_batch": True, "only": [0, 1], "minimum": 3.9},
}
CONTRASTED = {"name": "TopKRouter", "k": 2, "noise": None, "losses": ENTROPIES, "capacity": None}
TOWER = {"num_experts": 4, "embed_dim": 16, "depth": 2}
PLAIN_GATE = {"name": "TopKRouter", "k": 2, "noise": None, "capacity": None, "losses": GLOBAL}


SCHEMA = {
    "dim": 4,
    "features": {
        "item": {"kind": "categorical", "num_embeddings": 7},
        "words": {"kind": "bag", "num_embeddings": 5, "pooling": "mean"},
        "price": {"kind": "dense"},
        "age": {"kind": "dense"},
    },
    "tasks": {"click": {}, "stars": {"kind": "ordinal", "classes": 4}, "seconds": {"kind": "regression"}},
}


def language(name: str, **options: Any) -> Any:
    return zoo.create_model(f"language/{name}_tiny", **{**SMALL, "losses": GLOBAL, **options})


def vision(name: str, **options: Any) -> Any:
    model = zoo.create_model(f"vision/{name}_tiny_test", num_classes=5, **options)
    for parameter in model.parameters():  # the published initialisation of the head is zero
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


# Capacity is counted within a sequence, which processes do not cut.
DROPS = {"capacity": 1.0, "losses": {"load_balance": {"weight": 0.3, "global_batch": True}}}
ZERO = {"num_experts": 8, "experts": "ZeroComputationExperts", "router": {"name": "MoEPlusPlusRouter", "k": 2}}
PEER = {
    "num_local_experts": 16,
    "experts": {"name": "NeuronExperts", "bias": True},
    "router": {"name": "ProductKeyRouter", "k": 2, "heads": 2},
    "losses": None,
}
MODELS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: language("mixtral"),
    "mixtral with drops": lambda: language("mixtral", router=BY_SEQUENCE, **DROPS),
    "mixtral, merged experts": lambda: language("mixtral", router="LoryRouter", losses=None),
    "mixtral, 3 experts": lambda: language("mixtral", num_local_experts=3),
    # Over 4 processes parts of 2, 2, 2 and 1.
    "mixtral, 7 experts": lambda: language("mixtral", num_local_experts=7),
    # Experts of one neuron: they have no rows that processes could share out, and of biases one number.
    "mixtral, PEER": lambda: language("mixtral", **PEER),
    "olmoe": lambda: language("olmoe"),
    "olmoe, MoE++": lambda: language("olmoe", **ZERO),
    "qwen2_moe": lambda: language("qwen2_moe"),
    "qwen3_moe": lambda: language("qwen3_moe"),
    "deepseek_v3": lambda: language("deepseek_v3"),
    "LIMoE": lambda: zoo.create_model(
        "vision_language/limoe_tiny", router=CONTRASTED, num_experts=4, embed_dim=16, depth=2
    ),
    "V-MoE": lambda: vision("vmoe", router=PLAIN_GATE),
    "Soft MoE": lambda: vision("soft_moe"),
    # Each of the gates asks for 2 experts of 16, so that not all are computed.
    "MMoE": lambda: zoo.create_model("recommendation/mmoe", schema=SCHEMA, router=PLAIN_GATE, num_experts=16),
    "PLE": lambda: zoo.create_model("recommendation/ple", schema=SCHEMA),
}
MESHES: dict[int, dict[str, Sizes]] = {
    2: {
        "replicate": Sizes(replicate=2),
        "shard": Sizes(shard=2),
        "expert": Sizes(expert=2),
        "tensor": Sizes(tensor=2),
        "places": Sizes(expert=2),
    },
    4: {
        "shard, expert": Sizes(shard=2, expert=2),
        "replicate, expert": Sizes(replicate=2, expert=2),
        "expert, tensor": Sizes(expert=2, tensor=2),
        "shard, tensor": Sizes(shard=2, tensor=2),
        "expert": Sizes(expert=4),
        "places, tensor": Sizes(expert=2, tensor=2),
    },
}
# Two nodes of two processes, and tokens on their way in two parts.
OPTIONS = {(4, "expert"): {"within": 2, "chunks": 2}}
# Room for all that any process sends to an expert.
OPTIONS |= {key: {"places": 80} for key in ((2, "places"), (4, "places, tensor"))}
FEW = ("mixtral with drops", "deepseek_v3", "V-MoE")
CASES = [
    (world, mesh, name)
    for world, meshes in MESHES.items()
    for mesh in meshes
    for name in MODELS
    if name in FEW
    or (name, mesh) in (("mixtral, 7 experts", "expert"), ("LIMoE", "expert, tensor"))
    or (name == "mixtral, PEER" and mesh in ("shard", "shard, expert", "expert, tensor"))
    or (world == 2 and mesh in ("expert", "tensor") and "7" not in name)
    or (name == "MMoE" and mesh != "expert")
    # A recommendation model has nothing to split.
    if not (name in ("MMoE", "PLE") and "tensor" in mesh)
]


def build(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().train()


def batch(name: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    if name == "LIMoE":
        return torch.randn(8, 1, 16, 16), torch.randint(0, 64, (8, 8))
    if name in ("MMoE", "PLE"):  # ids of an item and of two words, then numbers; labels of the tasks
        ids = torch.stack([torch.randint(7, (8,)), *torch.randint(5, (2, 8))], 1)
        labels = torch.stack([torch.randint(2, (8,)), torch.randint(4, (8,)), torch.randn(8)], 1)
        return torch.cat([ids, torch.randn(8, 2)], 1), labels
    if "MoE" in name and "mixtral" not in name and "olmoe" not in name:
        return torch.randn(8, 3, 32, 32), torch.randint(0, 5, (8,))
    ids = torch.randint(0, 64, (8, 10))
    return ids, ids.roll(-1, 1)


def learn(model: Any, x: Tensor, y: Tensor, processes: Any = None) -> dict[str, Any]:
    """Two steps with clipping and the update of gates' biases; loss and gradients are those of the first."""
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.5), {}
    for step in range(2):
        optimizer.zero_grad()
        with record(model) as recorded:
            loss = task_loss(model, x, y, processes)
        loss = loss + sum(recorded.losses().values())
        loss.backward()
        if step == 0:
            seen = {"loss": loss.detach(), "gradients": gradients(model)}
        seen[f"norm {step}"] = clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        balance.update_biases(model)
    return seen


def task_loss(model: Any, x: Tensor, y: Tensor, processes: Any) -> Tensor:
    if hasattr(model, "text_head"):
        out = model(x, y)
        return contrastive_loss(out.image, out.text, out.scale, processes)
    if hasattr(model, "task_losses"):
        lengths = torch.ones(len(x), dtype=torch.long)
        ids = keyed(["item", "words"], [x[:, 0], x[:, 1:3].flatten()], [lengths, 2 * lengths])
        rows = TableBatch(torch.arange(len(x)), x[:, 3:], ids, None, None, y)
        return sum(model.task_losses(model(rows), rows).values(), torch.zeros(()))
    out = model(x)
    return F.cross_entropy(getattr(out, "logits", out).flatten(0, -2), y.flatten())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {n: (g.full_tensor() if isinstance(g, DTensor) else g).clone() for n, g in found.items()}


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    saved: dict[Any, Any] = {}
    for label, sizes in MESHES[world].items():
        mesh = Mesh(sizes)
        for name in (name for size, other, name in CASES if (size, other) == (world, label)):
            model, (x, y) = parallelize(build(name), mesh, **OPTIONS.get((world, label), {})), batch(name)
            share = len(x) // sizes.data
            mine = slice(mesh.data_rank * share, (mesh.data_rank + 1) * share)
            seen = learn(model, x[mine], y[mine], mesh.data_group)
            dist.all_reduce(seen["loss"])
            seen["loss"] /= world
            saved[label, name] = seen, whole_state(model)
    if rank == 0:
        torch.save(saved, f"{folder}/{world}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What one process with the whole batch learns."""
    found = {}
    for name in MODELS:
        model = build(name)
        found[name] = learn(model, *batch(name)), model.state_dict()
    return found


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory, alone: Any) -> dict[int, Any]:
    """What the processes learn; they begin as copies of this one, which has imported everything by then."""
    folder = tmp_path_factory.mktemp("processes")
    for world in MESHES:
        mp.start_processes(worker, args=(world, str(folder)), nprocs=world, start_method="fork")
    return {world: torch.load(folder / f"{world}.pt") for world in MESHES}


def close(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-5) -> None:
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize(("world", "mesh", "name"), CASES)
def test_every_mesh_learns_what_one_process_learns(
    processes: Any, alone: Any, world: int, mesh: str, name: str
) -> None:
    (seen, state), (expected, expected_state) = processes[world][mesh, name], alone[name]
    close(seen["loss"], expected["loss"], "loss")
    assert {n for n, g in seen["gradients"].items() if g.any()} == {
        n for n, g in expected["gradients"].items() if g.any()
    }
    for parameter, gradient in expected["gradients"].items():
        if gradient.any():
            close(seen["gradients"][parameter], gradient, parameter)
    close(seen["norm 0"], expected["norm 0"], "norm")
    assert state.keys() == expected_state.keys()
    for parameter, value in expected_state.items():
        close(state[parameter], value, f"{parameter} after two steps", 1e-4)


def test_blocks_and_experts_are_found() -> None:
    model = build("deepseek_v3")
    assert blocks(model) == list(model.model.layers)
    assert [name for name, _ in spreadable(model)] == ["model.layers.1.mlp.experts"]
    vit = build("V-MoE")
    assert blocks(vit) == list(vit.blocks)
    assert not list(spreadable(build("mixtral, merged experts")))


@pytest.mark.parametrize(
    ("world", "given", "expected"),
    [
        (8, {}, Sizes(1, 8, 1, 1)),
        (8, {"expert": 4}, Sizes(1, 2, 4, 1)),
        (8, {"shard": 1, "expert": 2}, Sizes(4, 1, 2, 1)),
        (8, {"replicate": 2, "tensor": 2}, Sizes(2, 2, 1, 2)),
        (8, {"replicate": 2, "shard": 2, "expert": 2}, Sizes(2, 2, 2, 1)),
    ],
)
def test_sizes_fill_the_world(world: int, given: dict[str, int], expected: Sizes) -> None:
    assert Sizes.of_world(world, **given) == expected
    assert expected.world == world


@pytest.mark.parametrize(
    ("world", "given", "told"),
    [
        (6, {"expert": 4}, "6 processes cannot be split as expert 4 .* tensor 1: that needs a multiple of 4"),
        (4, {"replicate": 2, "shard": 1}, "4 processes cannot be split as replicate 2 .* tensor 1: that needs 2"),
        (2, {"expert": 0}, "expert: expected a number of processes of at least 1, got 0"),
    ],
)
def test_sizes_that_do_not_make_the_world_are_named(world: int, given: dict[str, int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Sizes.of_world(world, **given)


class Lone:
    """A mesh as far as the checks look at it."""

    def __init__(self, **sizes: int) -> None:
        self.sizes = Sizes(**sizes)


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"expert": 4}, "experts: 5 experts in parts of 2 leave some of 4 processes without any"),
        ({"shard": 3}, "rows do not divide into shard \\* tensor = 3 parts"),
    ],
)
def test_experts_that_cannot_be_spread_are_named(sizes: dict[str, int], told: str) -> None:
    mesh: Any = Lone(**sizes)
    with pytest.raises(ValueError, match=told):
        parallelize(nn.ModuleDict({"experts": Experts(5, 4, 8)}), mesh)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"shadows": 1, "within": 2}, "shadows=1: experts are lent in flat groups only, not with within=2"),
        ({"places": 9, "chunks": 2}, "places=9: rows go in flat groups, at once, to experts that are not lent; got"),
        ({"places": 9, "shadows": 1}, "places=9: .*'shadows': 1"),
        ({"places": 9, "within": 2}, "places=9: .*'within': 2"),
    ],
)
def test_ways_to_travel_that_exclude_each_other_are_named(options: dict[str, int], told: str) -> None:
    mesh: Any = Lone(expert=4)
    with pytest.raises(ValueError, match=told):
        parallelize(nn.ModuleDict({"experts": Experts(8, 4, 8)}), mesh, **options)


def test_a_model_with_nothing_to_split_is_not_given_to_a_tensor_group() -> None:
    mesh: Any = Lone(tensor=2)
    with pytest.raises(
        ValueError, match="tensor=2: RecommendationModel has no layers that can be split and no experts"
    ):
        parallelize(build("PLE"), mesh)


def lone(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
    with pytest.raises(ValueError, match=r"a mesh of 2 processes, .* in a world of 1"):
        Mesh(Sizes(shard=2))
    model = parallelize(build("mixtral"), Mesh(Sizes()))
    (x, y), whole = batch("mixtral"), build("mixtral")
    close(learn(model, x, y)["loss"], learn(whole, x, y)["loss"], "loss")
    dist.destroy_process_group()


def test_a_mesh_is_of_the_world_and_may_be_of_one(alone: Any, tmp_path: Path) -> None:
    mp.start_processes(lone, args=(str(tmp_path),), nprocs=1, start_method="fork")
