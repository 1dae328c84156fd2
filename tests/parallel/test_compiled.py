"""Compiled models in parts learn what one process without compilation learns: exchanges stay out of the graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import zoo
from zoo.moe import record
from zoo.parallel import Mesh, Sizes, parallelize

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 64, "initializer_range": 0.2}
LOSSES = {"global_batch": 0.5, "z": 0.1}


def language(name: str, **options: Any) -> Any:
    return zoo.create_model(f"language/{name}_tiny", **{**SMALL, "losses": LOSSES, **options})


MODELS: dict[str, Callable[[], Any]] = {
    "with shared experts": lambda: language("deepseek_v3"),
    "shortcut": lambda: language("mixtral", shortcut=True),
}
MESHES: dict[str, tuple[Sizes, dict[str, int]]] = {
    "expert": (Sizes(expert=2), {"chunks": 2}),
    "tensor": (Sizes(tensor=2), {}),
}
CASES = [("expert", "with shared experts"), ("tensor", "shortcut")]


def learn(name: str, mesh: Mesh | None = None, compiled: bool = False, **options: Any) -> dict[str, Tensor]:
    """Loss and gradients of two batches in a row, on this process's part of them."""
    torch.manual_seed(0)
    model = MODELS[name]().train()
    if mesh is not None:
        parallelize(model, mesh, **options)
    if compiled:
        model.compile(backend="aot_eager")
    share, first = (8, 0) if mesh is None else (8 // mesh.sizes.data, mesh.data_rank * (8 // mesh.sizes.data))
    seen = {}
    for batch in range(2):
        ids = torch.randint(0, 64, (8, 10), generator=torch.Generator().manual_seed(5 + batch))
        ids = ids[first : first + share]
        with record(model) as step:
            out = model(ids)
        loss = F.cross_entropy(out.logits.flatten(0, -2), ids.roll(-1, 1).flatten())
        total = loss + sum(step.losses().values())
        total.backward()
        seen[f"loss {batch}"] = total.detach()
    for parameter, value in model.named_parameters():
        if value.grad is not None:
            seen[parameter] = value.grad.full_tensor() if isinstance(value.grad, DTensor) else value.grad
    return seen


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for label, (sizes, options) in MESHES.items():
        for name in (name for other, name in CASES if other == label):
            torch.compiler.reset()
            seen = learn(name, Mesh(sizes), compiled=True, **options)
            for batch in range(2):
                dist.all_reduce(seen[f"loss {batch}"], op=dist.ReduceOp.SUM)
                seen[f"loss {batch}"] /= 2
            found[label, name] = seen
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    """What one process learns of the whole batch, uncompiled."""
    return {name: learn(name) for name in MODELS}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, alone: Any) -> Any:
    folder = tmp_path_factory.mktemp("compiled")
    mp.start_processes(worker, args=(str(folder),), nprocs=2, start_method="fork")
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize(("mesh", "name"), CASES)
def test_a_compiled_model_in_parts_learns_what_one_process_learns(
    compiled: Any, alone: Any, mesh: str, name: str
) -> None:
    found, expected = compiled[mesh, name], alone[name]
    assert found.keys() == expected.keys()
    for what, value in expected.items():
        scale = float(value.abs().max())
        assert float((found[what] - value).abs().max()) <= 2e-5 * scale, what
