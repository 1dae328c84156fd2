"""Experts lent to all processes: the same outputs and gradients, fewer bytes, and those that the rule says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import zoo
from zoo.moe import ExpertParallel, Experts, MoE, record
from zoo.moe.routers import TopKRouter
from zoo.moe.shadows import alone, worth_lending
from zoo.parallel import Mesh, Sizes, parallelize

DIM, WORLD = 16, 3
# Tokens of each process: uneven, and one without any.
TOKENS = [40, 0, 25]
CASES: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "with biases": {"activation": "gelu", "bias": True},
    "weighed inputs": {"weigh_input": True},
    "in three chunks": {"chunks": 3},
    "all to one expert": {"favour": 50.0},
    "more lent than pay": {"limit": 8},
}


def layer(favour: float = 3.0, chunks: int = 1, limit: int = 2, **options: Any) -> tuple[MoE, int, int]:
    """A layer of 8 narrow experts, of which the first and the sixth are liked best; chunks, and how many are lent."""
    torch.manual_seed(3)
    moe = MoE(TopKRouter(DIM, 8, 2, bias=True, losses={"switch": 0.1}), Experts(8, DIM, 4, **options)).double()
    bias: Any = moe.router.bias
    bias.data[0] += favour
    bias.data[5] += favour / 2
    return moe, chunks, limit


def step(moe: MoE, rank: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(100 + rank)
    x = torch.randn(TOKENS[rank], DIM, dtype=torch.float64, requires_grad=True)
    y = moe(x)
    (y * torch.linspace(-1, 1, DIM, dtype=y.dtype)).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    saved: dict[str, Any] = {}
    for name, options in CASES.items():
        moe, chunks, limit = layer(**options)
        parallel = ExpertParallel(8, chunks=chunks, shadows=limit)
        plain = copy.deepcopy(moe)
        without = ExpertParallel(8, chunks=chunks)
        plain.experts.keep_own(without)
        moe.experts.keep_own(parallel)
        step(plain, rank)
        found = step(moe, rank)
        own = {n: p.grad for n, p in moe.named_parameters()}
        saved[name] = found, own, parallel.own, parallel.traffic, without.traffic
    torch.save(saved, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("shadows")
    mp.start_processes(worker, args=(str(folder),), nprocs=WORLD, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def close(found: Tensor, expected: Tensor, what: str) -> None:
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * scale, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("name", CASES)
def test_lent_experts_give_what_whole_ones_do(ranks: list[dict[str, Any]], name: str) -> None:
    whole, _, _ = layer(**CASES[name])
    for rank in range(WORLD):
        y, gradient = step(whole, rank)
        found = ranks[rank][name][0]
        close(found[0], y, f"output of {rank}")
        close(found[1], gradient, f"gradient of tokens of {rank}")
    for rank in range(WORLD):
        _, own, held, *_ = ranks[rank][name]
        for parameter, value in whole.experts.named_parameters():
            assert value.grad is not None
            close(own[f"experts.{parameter}"], value.grad[held], f"{parameter} of {rank}")


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_of_the_closed_form(ranks: list[dict[str, Any]], name: str) -> None:
    """Rows of tokens that no lent expert takes, and weights of the lent: out and back, once a process."""
    moe, _, limit = layer(**CASES[name])
    bounds = [0, 3, 6, 8]
    chosen = []
    for rank in range(WORLD):
        torch.manual_seed(100 + rank)
        x = torch.randn(TOKENS[rank], DIM, dtype=torch.float64)
        chosen.append(moe.router(x).dense() != 0)
    # The rule, by loops: rows that an expert alone sends, against its weights.
    rows = [0] * 8
    for rank, part in enumerate(chosen):
        for token in part.tolist():
            for r in range(WORLD):
                there = [e for e in range(bounds[r], bounds[r + 1]) if token[e]]
                if r != rank and len(there) == 1:
                    rows[there[0]] += 1
    size = sum(p[0].numel() for p in moe.experts.parameters()) * 8
    gains = [4 * rows[e] * DIM * 8 - 2 * (WORLD - 1) * size for e in range(8)]
    lent = sorted(sorted(range(8), key=lambda e: -gains[e])[:limit])
    lent = [e for e in lent if gains[e] > 0]
    assert lent
    crossing = {False: 0, True: 0}
    for rank, part in enumerate(chosen):
        for token in part.tolist():
            for r in range(WORLD):
                there = {e for e in range(bounds[r], bounds[r + 1]) if token[e]}
                crossing[False] += r != rank and bool(there)
                crossing[True] += r != rank and bool(there - set(lent))
    found = [saved[name][3] for saved in ranks]
    plain = [saved[name][4] for saved in ranks]
    assert sum(t.rows for t in plain) == 4 * crossing[False] * DIM * 8
    assert sum(t.rows for t in found) == 4 * crossing[True] * DIM * 8
    assert sum(t.weights for t in found) == 2 * (WORLD - 1) * size * len(lent)
    assert sum(t.weights for t in plain) == 0
    sent = [sum(t.rows + t.weights for t in traffic) for traffic in (found, plain)]
    assert sent[1] - sent[0] >= sum(gains[e] for e in lent) > 0


def test_what_an_expert_alone_sends_and_what_pays() -> None:
    chosen = torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]]).bool()
    assert alone(chosen, [0, 2, 4], 0).tolist() == [0, 0, 1, 1]  # token 2 goes there for two experts
    assert alone(chosen, [0, 2, 4], 1).tolist() == [1, 1, 0, 0]
    assert alone(chosen[:0], [0, 2, 4], 1).tolist() == [0] * 4
    rows = torch.tensor([3, 10, 4, 10])
    # 4 rows of 8 bytes each against 2 * 3 experts of 20: more than 3.75 rows pay.
    assert worth_lending(rows, 4, 8, 20, 4) == [1, 2, 3]
    assert worth_lending(rows, 1, 8, 20, 4) == [1]
    assert worth_lending(rows, 4, 8, 100, 4) == []


def trained(rank: int, folder: str, tensor: int) -> None:
    torch.set_num_threads(1)
    world = 2 * tensor
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet2", rank=rank, world_size=world)
    model, mesh = tiny(), Mesh(Sizes(expert=2, tensor=tensor))
    parallelize(model, mesh, shadows=2)
    half = batch().chunk(2)[mesh.data_rank]
    loss = objective(model, half)
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    ways = [getattr(m.parallel, "inner", m.parallel) for m in model.modules() if isinstance(m, Experts)]
    lent = sum(way.traffic.weights for way in ways)
    grads = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
    torch.save((mean / world, grads, lent), f"{folder}/fsdp{rank}.pt")
    dist.destroy_process_group()


def tiny() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 2, "num_hidden_layers": 2, "vocab_size": 64}
    model = zoo.create_model("language/mixtral_tiny", router={"name": "TopKRouter", "k": 2, "bias": True}, **sizes)
    for module in model.modules():
        if isinstance(module, TopKRouter):
            assert module.bias is not None
            module.bias.data[-1] = 5.0  # everybody's choice
    return model.train()


def batch() -> Tensor:
    torch.manual_seed(7)
    return torch.randint(0, 64, (8, 16))


def objective(model: Any, ids: Tensor) -> Tensor:
    with record(model):
        return model(ids, labels=ids).loss


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_model_under_fsdp_learns_what_one_process_learns(tensor: int, tmp_path: Any) -> None:
    whole = tiny()
    objective(whole, batch()).backward()
    mp.start_processes(trained, args=(str(tmp_path), tensor), nprocs=2 * tensor, start_method="fork")
    for rank in range(2 * tensor):
        loss, grads, lent = torch.load(tmp_path / f"fsdp{rank}.pt")
        assert lent > 0
        torch.testing.assert_close(loss, objective(whole, batch()).detach(), rtol=1e-5, atol=0)
        for name, p in whole.named_parameters():
            if p.grad is not None:
                close = 1e-5 * float(p.grad.abs().max()) + 1e-9
                torch.testing.assert_close(grads[name], p.grad, rtol=0, atol=close)


def test_fewer_than_no_shadows_are_an_error() -> None:
    with pytest.raises(ValueError, match="shadows must be at least 0, got -1"):
        ExpertParallel(4, shadows=-1)
