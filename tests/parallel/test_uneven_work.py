"""Processes with different work in a layer: runs of a block of which some have fewer, and draws of random numbers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import zoo
from zoo.parallel import Mesh, Sizes, parallelize

MESHES = {"expert": Sizes(expert=2), "shard": Sizes(shard=2)}
SMALL = {"hidden_size": 32, "vocab_size": 64, "num_hidden_layers": 4, "initializer_range": 0.2}


def depths() -> Any:
    torch.manual_seed(0)
    options = {"capacity": 0.3, "sampling": "predictor"}
    model = zoo.create_model("language/mixtral_tiny", **SMALL, mixture_of_depths=options)
    with torch.no_grad():
        for router in (m for m in model.modules() if isinstance(m, zoo.moe.DepthRouter)):
            router.predictor[-1].weight.normal_(std=3.0)
    return model.eval()


def shares() -> list[Tensor]:
    """Sequences of every process; one of the first chooses other numbers of tokens, and the second has one alone."""
    ids = torch.randint(0, 64, (4, 9), generator=torch.Generator().manual_seed(2))
    return [ids[:3], ids[3:]]


def dropped() -> Any:
    """A model whose experts drop units, in every layer after the first, with gates that draw noise."""
    torch.manual_seed(0)
    gate = {"name": "TopKRouter", "k": 2, "noise": "fixed"}
    model = zoo.create_model(
        "vision/vmoe_tiny_test", num_classes=5, depth=4, moe_layers=[1, 2, 3], expert_dropout=0.3, router=gate
    )
    torch.nn.init.normal_(model.head.weight)
    return model.train()


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    told = {}
    for name, sizes in MESHES.items():
        model = parallelize(depths(), Mesh(sizes))
        logits = model(shares()[rank], use_cache=False).logits
        (logits.square().sum() * 2).backward()  # the mean of what processes have is then the sum
        gradients = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
        told[name] = logits.detach(), gradients
    model = parallelize(dropped(), Mesh(Sizes(tensor=2)))
    torch.manual_seed(7)
    image = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    told["dropped"] = model(image).detach(), torch.rand(5)
    torch.save(told, f"{folder}/told-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    depths(), dropped()  # imports everything before the processes are copied
    mp.start_processes(work, args=(str(folder),), nprocs=2, start_method="fork")
    return [torch.load(folder / f"told-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("mesh", MESHES)
def test_processes_whose_sequences_skip_other_tokens_meet_at_every_exchange(
    told: list[dict[str, Any]], mesh: str
) -> None:
    model = depths()
    with zoo.moe.record(model) as step:
        found = [model(ids, use_cache=False).logits for ids in shares()]
    chosen = [r.token_index.numel() for name, calls in step.routings.items() if name.endswith("depth") for r in calls]
    assert len(set(chosen)) > 1  # of uneven numbers of tokens
    sum(logits.square().sum() for logits in found).backward()
    for rank, logits in enumerate(found):
        theirs, gradients = told[rank][mesh]
        assert float((theirs - logits).detach().abs().max()) < 1e-5 * float(logits.detach().abs().max())
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and parameter.grad.any():
                error = float((gradients[name] - parameter.grad).norm() / parameter.grad.norm())
                assert error < 1e-4, name


def test_a_tensor_group_draws_alike_after_experts_that_drop_units(told: list[dict[str, Any]]) -> None:
    (first, drawn), (second, theirs) = (rank["dropped"] for rank in told)
    assert torch.equal(drawn, theirs)
    assert float((first - second).abs().max()) < 1e-6 * float(first.abs().max())


def test_a_depth_that_chooses_nothing_passes_tokens_by_and_learns(tmp_path: Path) -> None:
    router = zoo.moe.DepthRouter(4, 0.5, sampling="predictor").eval()
    with torch.no_grad():
        router.predictor[-1].bias.fill_(-100.0)
    x = torch.randn(2, 3, 4, requires_grad=True)
    layer = zoo.moe.MixtureOfDepths(torch.nn.Linear(4, 4), router)
    y = layer(x)
    assert torch.equal(y, x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(router.weight.grad, torch.zeros_like(router.weight))
