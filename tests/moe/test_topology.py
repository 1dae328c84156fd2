"""The topology loss: balance at a price, with its least at what suits the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from zoo.moe import ExpertParallel, Experts, HierarchicalExpertParallel, MoE, balance, record
from zoo.moe.routers import TopKRouter
from zoo.moe.topology import expert_bounds, expert_links, target, topology

COSTS = [1.0, 2.5, 16.0]


def draw(*shape: int, k: int = 2) -> tuple[Tensor, Tensor]:
    probs = torch.randn(*shape, dtype=torch.float64).softmax(-1)
    return probs, torch.zeros_like(probs).scatter(-1, probs.topk(k).indices, 1.0)


def close(found: Tensor, expected: Tensor | float) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.detach().double(), expected, rtol=1e-9, atol=1e-12)


def looped(probs: Tensor, selected: Tensor, rank: int, mask: Tensor) -> float:
    """Of 7 experts over 4 processes, two a node: 2, 2, 2 and 1."""
    holder = [0, 0, 1, 1, 2, 2, 3]
    cost = [COSTS[0] if h == rank else COSTS[1] if h // 2 == rank // 2 else COSTS[2] for h in holder]
    tokens = [t for t in range(len(probs)) if mask[t]]
    choices = sum(float(selected[t, e]) for t in tokens for e in range(7))
    total = 0.0
    for e in range(7):
        f = sum(float(selected[t, e]) for t in tokens) / max(choices, 1)
        p = sum(float(probs[t, e]) for t in tokens) / max(len(tokens), 1)
        total += cost[e] / (sum(cost) / 7) * f * p
    return 7 * total


@pytest.mark.parametrize("rank", range(4))
def test_against_a_loop(rank: int) -> None:
    probs, selected = draw(19, 7)
    place: dict[str, Any] = {"costs": COSTS, "within": 2, "processes": 4, "rank": rank}
    mask = torch.rand(19) > 0.3
    for real in (mask, torch.ones(19, dtype=torch.bool), torch.arange(19) == 3, torch.zeros(19, dtype=torch.bool)):
        expected = looped(probs, selected, rank, real)
        hidden = probs.where(real[:, None], torch.nan)
        close(topology(hidden, selected, mask=real, **place), expected)
    close(topology(probs, selected, **place), looped(probs, selected, rank, torch.ones(19)))
    close(topology(probs[:0], selected[:0], **place), 0.0)
    groups = torch.stack([probs, probs.flip(1)]), torch.stack([selected, selected.flip(1)])
    apart = [looped(p, s, rank, torch.ones(19)) for p, s in zip(*groups)]
    close(topology(*groups, **place), sum(apart) / 2)


def test_links_of_one_cost_leave_the_balance_loss() -> None:
    probs, selected = draw(3, 11, 7)
    expected = balance.load_balance(probs, selected)
    place: dict[str, Any] = {"processes": 4, "rank": 2, "within": 2}
    for penalty in ("cost", "softmax"):
        assert topology(probs, selected, [0.3, 0.3, 0.3], penalty=penalty, **place) == expected
    assert topology(probs, selected, COSTS) == expected  # all experts are at hand
    _, first = draw(11, 7, k=1)
    assert topology(probs[0], first, [2, 2, 2], **place) == balance.gshard(probs[0], first)
    assert topology(probs[0], first, COSTS, processes=1) == balance.gshard(probs[0], first)


def test_gradient_by_finite_differences() -> None:
    logits = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    _, selected = draw(5, 6)
    for penalty in ("cost", "softmax"):
        place: dict[str, Any] = {"penalty": penalty, "within": 1, "processes": 3, "rank": 1}
        assert torch.autograd.gradcheck(lambda v, p=place: topology(v.softmax(-1), selected, COSTS, **p), logits)


def test_the_authors_form_is_that_of_their_gate() -> None:
    """gshard_gate.py: mean(c m topo) n^2, topo = R^2 softmax over processes, c the choices of each expert a token."""
    probs, selected = draw(13, 8)
    row = torch.tensor([COSTS[1], COSTS[0], COSTS[2], COSTS[2]], dtype=torch.float64)
    processes, each, k = 4, 2, 2
    scale = (row.softmax(0) * processes**2).repeat_interleave(each)
    theirs = (selected.mean(0) * scale * probs.mean(0)).mean() * each**2
    ours = topology(probs, selected, COSTS, penalty="softmax", within=2, processes=4, rank=1)
    close(ours * k / processes, theirs)


def test_the_least_loss_of_two_linked_groups_is_at_the_closed_form() -> None:
    """Shares a and 1 - a of two processes with f = P: p_0 a^2 + p_1 (1 - a)^2 is least at a = c_1 / (c_0 + c_1)."""
    near, far = 1.0, 7.0
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    # f and P are the same tensor, so that gradients are those of the sum of p_e P_e^2.
    for _ in range(2000):
        p = logits.softmax(-1)[None]
        loss = topology(p, p, [near, near, far], processes=2, rank=0)
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - gradient).detach().requires_grad_()
    found = logits.softmax(-1)
    wanted = far / (near + far)
    torch.testing.assert_close(found[:2].sum(), torch.tensor(wanted).double(), rtol=1e-6, atol=0)
    levels = expert_links(expert_bounds(4, 2), 0)
    assert target([near, near, far], levels) == pytest.approx(found.tolist(), rel=1e-6)
    # Where every process gives in inverse proportion to cost, each link takes as long.
    assert target(COSTS, [0, 1, 2, 2])[0] * COSTS[0] == pytest.approx(target(COSTS, [0, 1, 2, 2])[3] * COSTS[2])


def test_prices_of_all_processes_cancel_on_the_same_data() -> None:
    probs, selected = draw(17, 8)
    found = [topology(probs, selected, COSTS, within=2, processes=4, rank=r) for r in range(4)]
    close(torch.stack(found).mean(), balance.load_balance(probs, selected))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"costs": [1, 2]}, "costs must be three numbers above zero"),
        ({"costs": [1, 0, 2]}, "costs must be three numbers above zero"),
        ({"costs": "123"}, "costs must be three numbers above zero"),
        ({"costs": COSTS, "penalty": "sum"}, "penalty must be 'cost' or 'softmax'"),
        ({"costs": COSTS, "processes": 4, "rank": 4}, "rank 4 of 4 processes"),
        ({"costs": COSTS, "processes": 4, "within": 0}, "within=0"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        topology(*draw(3, 4), **options)


def gate() -> TopKRouter:
    return TopKRouter(6, 8, 2, losses={"topology": {"weight": 0.5, "costs": COSTS, "within": 2}})


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("between", "within"))
    nodes = mesh["between"].get_group(), mesh["within"].get_group()
    found = []
    for parallel in (ExpertParallel(8), HierarchicalExpertParallel(8, *nodes)):
        torch.manual_seed(0)
        moe = MoE(gate(), Experts(8, 6, 4)).double()
        moe.experts.keep_own(parallel)
        torch.manual_seed(10 + rank)
        x = torch.randn(9, 6, dtype=torch.float64)
        with record(moe) as step:
            moe(x)
        probs = (x @ moe.router.weight.T).softmax(-1)
        found.append((step.losses()["topology"].detach(), probs.detach()))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_a_layer_spread_over_processes_knows_its_place(tmp_path: Path) -> None:
    mp.start_processes(worker, args=(str(tmp_path),), nprocs=4, start_method="fork")
    for rank in range(4):
        for value, probs in torch.load(tmp_path / f"{rank}.pt"):
            selected = torch.zeros_like(probs).scatter(-1, probs.topk(2).indices, 1.0)
            expected = topology(probs, selected, COSTS, within=2, processes=4, rank=rank)
            close(value, 0.5 * expected)
            assert abs(float(expected - balance.load_balance(probs, selected))) > 1e-3
