"""Zeros among what experts give, counted by hand."""

import pytest
import torch

from zoo.moe.expert_stack import ExpertStack
from zoo.moe.multi_gate import MultiGateMoE
from zoo.moe.routers import DenseRouter, TopKRouter
from zoo.moe.zeros import ZeroActivations


def stack(bias):
    """Experts whose outputs are their biases, through a ReLU."""
    experts = ExpertStack(len(bias), 3, [len(bias[0])])
    with torch.no_grad():
        experts.weights[0].zero_()
        experts.biases[0].copy_(torch.tensor(bias))
    return experts


def test_the_share_of_zeros_is_an_experts_own():
    experts = stack([[1.0, -1.0], [-1.0, -2.0], [3.0, 0.5]])
    zeros = ZeroActivations(experts)
    with zeros.watch():
        experts(torch.randn(7, 3))
    experts(torch.randn(7, 3))  # not watched
    assert zeros.shares()[""].tolist() == [0.5, 1.0, 0.0]


def test_rows_that_only_fill_up_a_batch_do_not_count():
    experts = ExpertStack(4, 3, [6])
    x, real = torch.randn(9, 3), torch.arange(9) < 5
    zeros = ZeroActivations(experts)
    with zeros.watch(real):
        y = experts(x)
    with zeros.watch():
        more = experts(x[:2])
    expected = (torch.cat([y[:5], more]) == 0).double().mean((0, 2))
    assert zeros.shares()[""].tolist() == pytest.approx(expected.tolist())


@pytest.mark.parametrize("router", [DenseRouter, TopKRouter])
def test_experts_that_only_some_tokens_meet_count_those(router):
    torch.manual_seed(0)
    options = {"k": 1} if router is TopKRouter else {}
    moe = MultiGateMoE([router(3, 8, **options)], ExpertStack(8, 3, [6])).eval()
    x = torch.randn(40, 3)
    zeros = ZeroActivations(moe)
    with zeros.watch():
        moe(x)
    asked = moe.gates[0](x).dense() != 0 if options else torch.ones(40, 8, dtype=torch.bool)
    y = moe.experts(x) == 0
    expected = [y[asked[:, e], e].double().mean().item() for e in range(8)]
    assert zeros.shares()["experts"].tolist() == pytest.approx(expected, nan_ok=True)
