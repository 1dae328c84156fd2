from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.moe.routers import SinkhornRouter
from zoo.moe.routers.sinkhorn import sinkhorn_plan


def plan_by_definition(logits: Tensor, tolerance: float) -> Tensor:
    """Scale rows and columns in turn, checking after every step."""
    cost = logits.double().exp()
    tokens, experts = cost.shape
    column = torch.ones(experts, dtype=torch.float64)
    moved = 1.0
    while moved > tolerance:
        row = 1 / tokens / (cost @ column + 1e-8)
        new = 1 / experts / (row @ cost + 1e-8)
        moved, column = float((new - column).abs().mean()), new
    return row[:, None] * cost * column


@pytest.mark.parametrize(("tokens", "num_experts"), [(50, 8), (7, 16), (1, 4), (300, 3)])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
def test_plan_stops_where_a_check_at_every_step_would(tokens: int, num_experts: int, tolerance: float) -> None:
    logits = torch.randn(tokens, num_experts, dtype=torch.float64)
    torch.testing.assert_close(
        sinkhorn_plan(logits, tolerance), plan_by_definition(logits, tolerance), rtol=1e-6, atol=1e-12
    )


def test_plan_gives_every_token_and_every_expert_the_same_mass() -> None:
    # The second tolerance is never met; the plan comes back all the same.
    for tolerance in (1e-6, 0.0):
        plan = sinkhorn_plan(torch.randn(60, 6, dtype=torch.float64), tolerance)
        torch.testing.assert_close(plan.sum(0), torch.full((6,), 1 / 6, dtype=torch.float64), rtol=1e-6, atol=0)
        torch.testing.assert_close(plan.sum(1), torch.full((60,), 1 / 60, dtype=torch.float64), rtol=1e-4, atol=0)


def test_large_logits_do_not_overflow() -> None:
    assert sinkhorn_plan(torch.randn(20, 4) * 50 + 200).isfinite().all()


def test_masked_tokens_have_no_part_in_the_plan() -> None:
    logits, mask = torch.randn(30, 5, dtype=torch.float64), torch.rand(30) > 0.4
    plan = sinkhorn_plan(logits, mask=mask)
    torch.testing.assert_close(plan[mask], sinkhorn_plan(logits[mask]), rtol=1e-6, atol=1e-12)
    assert not plan[~mask].any()


def test_no_token_at_all() -> None:
    assert sinkhorn_plan(torch.randn(0, 4)).shape == (0, 4)
    assert SinkhornRouter(3, 4).route(torch.randn(0, 4)).token_index.numel() == 0


@pytest.mark.parametrize("k", [1, 2])
def test_training_follows_the_plan_and_evaluation_the_logits(k: int) -> None:
    logits = torch.randn(40, 6, dtype=torch.float64, requires_grad=True)
    router = SinkhornRouter(3, 6, k)
    scores = logits.sigmoid() if k == 1 else logits.softmax(-1)
    for training, choice in ((True, sinkhorn_plan(logits.detach().float())), (False, logits)):
        expert = choice.topk(k).indices
        expected = torch.zeros_like(logits).scatter(1, expert, scores.gather(1, expert))
        found = router.train(training).route(logits).dense()
        torch.testing.assert_close(found, expected)
        # The plan itself has no gradient, the weights have.
        grads = [torch.autograd.grad(out.square().sum(), logits, retain_graph=True)[0] for out in (found, expected)]
        torch.testing.assert_close(*grads)


def test_a_skewed_router_is_balanced_in_training() -> None:
    torch.manual_seed(0)
    logits = torch.randn(400, 4) + torch.tensor([3.0, 0, 0, 0])
    router = SinkhornRouter(3, 4)
    assert router.route(logits).counts.max() < 130
    assert router.eval().route(logits).counts.max() > 300
