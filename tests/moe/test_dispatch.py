"""Experts spread over processes give every process what whole experts would, and learn from all tokens."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parent / "routers"))
from gate_cases import DIM, GATES, HIDDEN, Gate, layer, tokens

from zoo.moe import Blend, ExpertParallel, Experts, MoE, Routing
from zoo.moe.routers import TopKRouter

# Processes, and how many sequences each has: uneven, and one without any token.
WORLDS = {3: [3, 0, 5], 4: [2, 4, 1, 3]}
# Parts of 3, 3 and 2 experts; of 2, 2, 1 and none.
EXPERTS = {3: 8, 4: 5}
FEW = ("dense", "top-1", "top-2 with capacity")


def inputs(gate: Gate, sequences: int, rank: int) -> tuple[Tensor, dict[str, Any]]:
    torch.manual_seed(100 + rank)
    x, cluster = tokens(sequences, dtype=torch.float64)
    return x, gate.context(x, cluster)


def step(moe: MoE, x: Tensor, context: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Output and gradient of the tokens; gradients of parameters add up."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    y = moe(x, **context)
    (y * torch.linspace(-1, 1, DIM, dtype=y.dtype)).sum().backward()
    return y.detach(), x.grad


def spread(moe: MoE) -> ExpertParallel:
    """Keep this process's part of the experts."""
    holder: Any = moe.experts if isinstance(moe.experts, Experts) else moe.experts.mlp
    parallel = ExpertParallel(holder.num_experts)
    holder.keep_own(parallel)
    return parallel


def merges(gate: Gate) -> bool:
    x, context = inputs(gate, 1, 0)
    return isinstance(layer(gate, torch.float64).router(x, **context), Blend)


NAMES = [name for name, gate in GATES.items() if not merges(gate)]
CASES = [(3, name) for name in NAMES] + [(4, name) for name in FEW]


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    saved: dict[str, Any] = {}
    for name in (name for size, name in CASES if size == world):
        gate = GATES[name]
        moe = layer(gate, torch.float64, num_experts=EXPERTS[world])
        spread(moe)
        x, context = inputs(gate, WORLDS[world][rank], rank)
        y, gradient = step(moe, x, context)
        own = {name: p.grad for name, p in moe.named_parameters()}
        saved[name] = y, gradient, own
    saved["traffic"] = counted(world)
    torch.save(saved, f"{folder}/{world}-{rank}.pt")
    dist.destroy_process_group()


def counted(world: int) -> tuple[int, int]:
    """Bytes of rows that a forward and a backward count, and what the closed form says."""
    torch.manual_seed(7 + dist.get_rank())
    router = TopKRouter(DIM, EXPERTS[world], 3)
    moe = MoE(router, Experts(EXPERTS[world], DIM, HIDDEN))
    parallel = spread(moe)
    x = torch.randn(11, DIM, requires_grad=True)
    chosen = (x @ router.weight.T).topk(3).indices.tolist()
    part = -(-EXPERTS[world] // world)
    there = sum(len({e // part for e in experts} - {dist.get_rank()}) for experts in chosen)
    arrived = torch.zeros(world, dtype=torch.long)
    for experts in chosen:
        for holder in {e // part for e in experts} - {dist.get_rank()}:
            arrived[holder] += 1
    dist.all_reduce(arrived)
    moe(x).sum().backward()
    # Rows there and gradients there; results back and gradients back are sent by those that hold the experts.
    return parallel.traffic.rows, 2 * (there + int(arrived[dist.get_rank()])) * DIM * 4


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    folder, saved = tmp_path_factory.mktemp("ranks"), {}
    for world in WORLDS:
        mp.start_processes(worker, args=(world, str(folder)), nprocs=world, start_method="fork")
        saved[world] = [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]
    return saved


def close(found: Tensor, expected: Tensor, what: str) -> None:
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * scale, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize(("world", "name"), CASES)
def test_every_gate_gives_what_it_gives_with_whole_experts(ranks: Any, world: int, name: str) -> None:
    gate, summed = GATES[name], {}
    for rank, sequences in enumerate(WORLDS[world]):
        moe, (x, context) = layer(gate, torch.float64, num_experts=EXPERTS[world]), inputs(gate, sequences, rank)
        y, gradient = step(moe, x, context)
        found, found_gradient, parameters = ranks[world][rank][name]
        close(found, y, f"outputs of process {rank}")
        close(found_gradient, gradient, f"gradients of tokens of process {rank}")
        for parameter, p in moe.named_parameters():
            if p.grad is None:
                continue
            if is_spread(moe, parameter):
                summed[parameter] = summed.get(parameter, torch.zeros_like(p)) + p.grad
            elif p.grad.any():
                close(parameters[parameter], p.grad, parameter)
    assert summed
    for parameter, total in summed.items():
        for rank, part in enumerate(total.split(-(-total.shape[0] // world))):
            close(ranks[world][rank][name][2][parameter], part, f"{parameter} of process {rank}")


def is_spread(moe: nn.Module, parameter: str) -> bool:
    """Whether a parameter is of experts that processes share out."""
    holder = "experts." if isinstance(moe.experts, Experts) else "experts.mlp."
    return parameter.startswith(holder)


@pytest.mark.parametrize("world", list(WORLDS))
def test_bytes_sent_are_those_of_the_closed_form(ranks: Any, world: int) -> None:
    for rank in ranks[world]:
        found, expected = rank["traffic"]
        assert found == expected > 0


def lone(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
    with pytest.raises(ValueError, match="num_experts must be at least 1, got 0"):
        ExpertParallel(0)
    parallel, experts = ExpertParallel(3), Experts(3, 4, 5)
    with pytest.raises(ValueError, match="4 whole experts cannot be spread as 3"):
        Experts(4, 4, 5).keep_own(parallel)
    experts.keep_own(parallel)
    with pytest.raises(ValueError, match="spread over processes already"):
        experts.keep_own(parallel)
    x, one = torch.randn(2, 4), torch.zeros(2, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="3 experts are spread, but the router routes 4"):
        experts(x, Routing.from_choices(one, torch.ones(2, 1), 4))
    assert experts(x, Routing.from_choices(one, torch.ones(2, 1), 3)).shape == x.shape
    assert parallel.traffic.rows == 0
    dist.destroy_process_group()


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    mp.start_processes(lone, args=(str(tmp_path),), nprocs=1, start_method="fork")
