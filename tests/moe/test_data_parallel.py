"""Two processes with half of the batch each end up where one process with all of it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import zoo.moe
from zoo.moe import MoE, balance, record
from zoo.moe.routers import TopKRouter

GLOBAL = {"global_batch": 0.7, "load_balance": {"weight": 0.3, "global_batch": True, "normalization": "tokens"}}
LOCAL = {"switch": 0.7, "z": 0.3, "importance": 0.2}
STEPS = 3
# One process has 2 real tokens, the other 13.
UNEVEN = torch.arange(40).view(8, 5) % 3 > 0
UNEVEN[:4, 1:] = False


def build(losses: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    options: dict[str, Any] = {"selection_bias": True, "bias_update_rate": 0.05, "losses": losses}
    return nn.Sequential(*(MoE(TopKRouter(8, 6, 2, **options), zoo.moe.Experts(6, 8, 4)) for _ in range(2)))


def batch(step: int) -> Tensor:
    return torch.randn(8, 5, 8, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, parts: list[Tensor], run: Any = None) -> None:
    """Plain gradient descent on the mean of the parts' losses, with the loss-free update after each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for part in parts:
        optimizer.zero_grad()
        with record(model) as step:
            out = (model if run is None else run)(part)
        (out.square().mean() + sum(step.losses().values())).backward()
        optimizer.step()
        balance.update_biases(model)


def uneven_gradient(x: Tensor, mask: Tensor, world: int) -> Tensor:
    """Gradient of a global-batch loss alone where processes hold different numbers of tokens."""
    router = build(GLOBAL)[0].router  # type: ignore[index]
    loss = router(x, mask=mask).losses["global_batch"]
    (gradient,) = torch.autograd.grad(loss, router.weight)
    if world > 1:
        dist.all_reduce(gradient)
    return gradient / world


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    saved: dict[str, Any] = {}
    mine = slice(4 * rank, 4 * rank + 4)
    for name, losses in (("local", LOCAL), ("global", GLOBAL), ("global compiled", GLOBAL)):
        model = build(losses)
        run = DistributedDataParallel(torch.compile(model, backend="aot_eager") if "compiled" in name else model)
        train(model, [batch(step)[mine] for step in range(STEPS)], run)
        saved[name] = model.state_dict()
    saved["uneven"] = uneven_gradient(batch(9)[mine], UNEVEN[mine], 2)
    torch.save(saved, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.start_processes(worker, args=(str(folder),), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", ["global", "global compiled"])
def test_global_batch_losses_equal_one_process_with_the_whole_batch(ranks: list, name: str) -> None:
    model = build(GLOBAL)
    train(model, [batch(step) for step in range(STEPS)])
    for rank in ranks:
        same(rank[name], model.state_dict())


def test_local_losses_equal_the_mean_over_two_micro_batches(ranks: list) -> None:
    model = build(LOCAL)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for i in range(STEPS):
        optimizer.zero_grad()
        for part in batch(i).split(4):
            with record(model) as step:
                out = model(part)
            ((out.square().mean() + sum(step.losses().values())) / 2).backward()
        optimizer.step()
        balance.update_biases(model)
    for rank in ranks:
        same(rank["local"], model.state_dict())


def test_loss_free_biases_moved_and_agree_between_processes(ranks: list) -> None:
    for name in ("local", "global compiled"):
        bias = [rank[name]["0.router.selection_bias"] for rank in ranks]
        assert torch.equal(*bias)
        assert bias[0].any()


def test_uneven_shares_of_tokens_do_not_bias_the_global_loss(ranks: list) -> None:
    expected = uneven_gradient(batch(9), UNEVEN, 1)
    for rank in ranks:
        torch.testing.assert_close(rank["uneven"], expected, rtol=1e-5, atol=1e-7)
