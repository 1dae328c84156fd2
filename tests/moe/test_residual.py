"""Experts of a shared core and residuals: the same as experts with the sums as weights."""

from __future__ import annotations

import copy

import pytest
import torch

from zoo.layers import experts_factory
from zoo.models import count_parameters
from zoo.moe import Capacity, Experts, MoE, ResidualExperts
from zoo.moe.routers import ExpertChoiceRouter, TopKRouter


def filled(bias=False, activation="swiglu", num_experts=4, **options):
    experts = ResidualExperts(num_experts, 6, 10, activation, bias, **options).double()
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_()
    return experts


@pytest.mark.parametrize(("activation", "bias"), [("swiglu", False), ("gelu", True), ("relu", False)])
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_it_computes_what_a_loop_over_summed_weights_does(activation, bias, tokens):
    experts, router = filled(bias, activation), TopKRouter(6, 4, k=2, dtype=None).double()
    x = torch.randn(tokens, 6, dtype=torch.float64)
    with torch.no_grad():
        matrix = router(x).dense()
        expected = torch.zeros_like(x)
        for t in range(tokens):
            for e in range(4):
                summed = {n.removeprefix("core_"): p + getattr(experts, n.replace("core_", "residual_"))[e]
                          for n, p in experts.named_parameters() if n.startswith("core_")}  # fmt: skip
                rows = summed[experts._in] @ x[t] + summed.get(f"{experts._in}_bias", 0)
                if activation == "swiglu":
                    hidden = rows[:10] * torch.sigmoid(rows[:10]) * rows[10:]
                else:
                    hidden = rows.relu() if activation == "relu" else rows * torch.special.ndtr(rows)
                expected[t] += matrix[t, e] * (summed["down_proj"] @ hidden + summed.get("down_proj_bias", 0))
        found = MoE(router, experts)(x)
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9 * expected.abs().max() if tokens else 0)


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_the_summed_weights_and_the_core_s_their_sum(bias):
    experts = filled(bias, "geglu")
    plain, x = experts.folded(), torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    router = ExpertChoiceRouter(6, 4, capacity=Capacity(1.0), dtype=None).double()
    other = x.detach().clone().requires_grad_()
    y, z = MoE(router, experts)(x), MoE(copy.deepcopy(router), plain)(other)
    assert torch.allclose(y, z, rtol=1e-12)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    z.backward(gradient)
    assert torch.allclose(x.grad, other.grad, rtol=1e-9)
    for name, parameter in plain.named_parameters():
        assert torch.allclose(getattr(experts, f"residual_{name}").grad, parameter.grad, rtol=1e-9)
        assert torch.allclose(getattr(experts, f"core_{name}").grad, parameter.grad.sum(0), rtol=1e-9)


def test_fresh_experts_are_all_the_core_and_a_frozen_core_stays():
    experts = experts_factory(
        {"name": "ResidualExperts", "train_core": False}, 3, 6, 10, "swiglu", backend="reference"
    )()
    assert experts.backend == "reference"
    folded = experts.folded()
    assert isinstance(folded, Experts)
    assert all(torch.equal(p, p[:1].expand_as(p)) for p in folded.parameters())
    moe = MoE(TopKRouter(6, 3), experts)
    optimizer = torch.optim.AdamW(moe.parameters(), lr=0.1, weight_decay=0.5)
    core = copy.deepcopy({n: p for n, p in experts.named_parameters() if n.startswith("core_")})
    for _ in range(3):
        optimizer.zero_grad()
        moe(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(getattr(experts, n), p) for n, p in core.items())
    assert experts.residual_down_proj.abs().sum() > 0


def test_a_token_uses_the_core_and_its_residuals():
    moe = MoE(TopKRouter(6, 4, k=1), ResidualExperts(4, 6, 10))
    one = 3 * 6 * 10
    assert count_parameters(moe) == (4 * 6 + 5 * one, 4 * 6 + 2 * one)


def test_it_compiles_and_its_state_goes_round():
    moe = MoE(TopKRouter(6, 4), filled(True, "gelu").float())
    x = torch.randn(5, 6)
    torch._dynamo.reset()
    assert torch.allclose(torch.compile(moe, backend="eager")(x), moe(x), rtol=1e-5, atol=1e-5)
    other = MoE(TopKRouter(6, 4), ResidualExperts(4, 6, 10, "gelu", True))
    other.load_state_dict(moe.state_dict())
    assert torch.equal(other(x), moe(x))


def test_sizes_and_activations_that_are_none_are_refused():
    with pytest.raises(ValueError, match="ResidualExperts: num_experts must be at least 1, got 0"):
        ResidualExperts(0, 6, 10)
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        ResidualExperts(2, 4, 3, backend="fast")
    with pytest.raises(ValueError, match="swigloo"):
        ResidualExperts(2, 6, 10, "swigloo")
