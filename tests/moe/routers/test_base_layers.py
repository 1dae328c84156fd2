from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from zoo.moe import Experts, MoE
from zoo.moe.routers import BASERouter
from zoo.moe.routers.assignment import balanced_assignment


@pytest.mark.parametrize("training", [True, False])
def test_the_paper_s_mix_is_what_a_residual_block_makes_of_the_weights(training: bool) -> None:
    """y = a f(x) + (1 - a) x with a = sigmoid(x . c_e) and f(x) = x + relu(x W1^T) W2^T, a token at a time."""
    moe = MoE(BASERouter(6, 4), Experts(4, 6, 5, "relu")).double().train(training)
    x = torch.randn(12, 6, dtype=torch.float64, requires_grad=True)
    found = x + moe(x)
    affinity = x @ moe.router.weight.T  # type: ignore[operator, union-attr]
    expert = balanced_assignment(affinity) if training else affinity.argmax(1)
    rows = []
    for t in range(12):
        e = int(expert[t])
        a = torch.sigmoid(x[t] @ moe.router.weight[e])  # type: ignore[index]
        f = x[t] + F.relu(x[t] @ moe.experts.up_proj[e].T) @ moe.experts.down_proj[e].T  # type: ignore[index]
        rows.append(a * f + (1 - a) * x[t])
    expected = torch.stack(rows)
    torch.testing.assert_close(found, expected)
    inputs = [x, *moe.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (found, expected))):
        torch.testing.assert_close(ours, theirs)


def test_every_expert_gets_the_same_in_training_only() -> None:
    router = BASERouter(6, 4)
    x = torch.randn(80, 6) + 50 * router.weight[2].detach()  # nearly all want expert 2
    assert router(x).counts.tolist() == [20] * 4
    assert router.eval()(x).counts[2] > 75


def test_tokens_that_the_experts_do_not_divide_are_spread_evenly() -> None:
    for tokens in (1, 7, 81, 83):
        counts = BASERouter(6, 4)(torch.randn(tokens, 6)).counts
        assert counts.sum() == tokens
        assert counts.max() - counts.min() <= 1


def test_padding_takes_no_place() -> None:
    router, x, mask = BASERouter(6, 4).double(), torch.randn(2, 30, 6).double(), torch.rand(2, 30) > 0.5
    masked, alone = router(x, mask=mask), router(x[mask])
    # Not equal: a product of fewer rows may round otherwise.
    torch.testing.assert_close(masked.dense()[mask.flatten()], alone.dense())
    assert masked.counts.max() - masked.counts.min() <= 1


def test_rows_start_orthogonal_and_a_tenth_long() -> None:
    weight = BASERouter(16, 5).weight.detach()
    torch.testing.assert_close(weight @ weight.T, 0.01 * torch.eye(5), rtol=1e-5, atol=1e-6)
    assert BASERouter(3, 8)(torch.randn(8, 3)).weight.min() > 1 / (1 + math.exp(3))
