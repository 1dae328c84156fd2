"""What a model in parts gathers of its weights: the root's once a step, and never those of before a step."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F

import zoo
from zoo.moe import MoE
from zoo.parallel import Mesh, Sizes, parallelize

LOOKS = ("never", "between backward and step", "before a forward")


def made() -> Any:
    torch.manual_seed(0)
    options = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 64, "initializer_range": 0.2}
    model = zoo.create_model("language/mixtral_tiny", **options).to(torch.bfloat16)
    for layer in (module for module in model.modules() if isinstance(module, MoE)):
        layer.router.float()  # a unit of its own
    return model


def losses(model: nn.Module, ids: Tensor, looks: str) -> list[float]:
    """Of four steps, with a forward without gradients somewhere in each."""
    optimizer, told = torch.optim.SGD(model.parameters(), lr=0.5, foreach=False), []

    def look(when: str) -> None:
        if when == looks:
            with torch.no_grad():
                model(ids)

    for _ in range(4):
        optimizer.zero_grad()
        look("before a forward")
        loss = F.cross_entropy(model(ids).logits.float().flatten(0, -2), ids.roll(-1, 1).flatten())
        loss.backward()
        look("between backward and step")
        optimizer.step()
        told.append(float(loss))
    return told


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    ids = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(3))
    told: dict[str, Any] = {}
    for looks in LOOKS:
        told[looks] = losses(parallelize(made(), Mesh(Sizes(shard=2))), ids, looks)
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    gather, sizes = getattr(dist, name), []

    def count(*args: Any, **options: Any) -> Any:
        sizes.append((options.get("output_tensor", args[0] if args else None)).nbytes)
        return gather(*args, **options)

    model = parallelize(made(), Mesh(Sizes(shard=2)))
    setattr(dist, name, count)
    for _ in range(2):
        sizes.clear()
        model(ids).logits.float().sum().backward()
    setattr(dist, name, gather)
    told["gathered"] = sizes
    torch.save(told, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("gathered")
    mp.start_processes(worker, args=(str(folder),), nprocs=2, start_method="fork")
    return torch.load(folder / "0.pt")


def test_the_weights_of_the_root_are_gathered_once_a_step(told: dict[str, Any]) -> None:
    model = made()
    root = sum(p.nbytes for p in (model.model.embed_tokens.weight, model.model.norm.weight, model.lm_head.weight))
    gates = [sum(p.nbytes for p in layer.router.parameters()) for layer in model.modules() if isinstance(layer, MoE)]
    blocks = sum(p.nbytes for p in model.model.layers.parameters()) - sum(gates)
    assert sum(told["gathered"]) == root + 2 * blocks + sum(gates)
    assert told["gathered"].count(root) == 1


@pytest.mark.parametrize("looks", LOOKS[1:])
def test_a_forward_without_gradients_changes_no_step(told: dict[str, Any], looks: str) -> None:
    assert told["never"][0] != told["never"][-1]
    assert told[looks] == told["never"]
