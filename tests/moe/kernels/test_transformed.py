"""torch.func, vmap, forward mode and gradients of gradients through layers of experts, against finite differences, and
against one call a sample."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

from zoo.moe import PEER, Capacity, Experts, LoRAExperts, MoA, MoE, ZeroComputationExperts
from zoo.moe.routers import (
    DenseRouter,
    ExpertChoiceRouter,
    MoEPlusPlusRouter,
    ReMoERouter,
    SinkhornRouter,
    SoftRouter,
    TopKRouter,
)

LAYERS = {
    "gated": lambda: MoE(TopKRouter(6, 5, 2), Experts(5, 6, 4, bias=True)),
    "plain": lambda: MoE(TopKRouter(6, 5, 5, score="sigmoid", normalize=True), Experts(5, 6, 4, "gelu")),
    "weigh_input": lambda: MoE(TopKRouter(6, 5, 2), Experts(5, 6, 4, weigh_input=True)),
    "dense": lambda: MoE(DenseRouter(6, 5), Experts(5, 6, 4)),
    "soft": lambda: MoE(SoftRouter(6, 5, 2), Experts(5, 6, 4)),
    "low rank": lambda: MoE(TopKRouter(6, 5, 2), LoRAExperts(5, 6, 3)),
    "dropped": lambda: MoE(TopKRouter(6, 5, 2, capacity=Capacity(0.8)), Experts(5, 6, 4)),
    "any number": lambda: MoE(ReMoERouter(6, 5, 2), Experts(5, 6, 4)),
    "balanced": lambda: MoE(SinkhornRouter(6, 5), Experts(5, 6, 4)),
    "neurons": lambda: PEER(6, 16, 2, heads=2, key_dim=4),
    "neurons, batch norm": lambda: PEER(6, 16, 2, heads=2, key_dim=4, query_norm="batch"),
    "experts choose, capped": lambda: MoE(ExpertChoiceRouter(6, 5, max_experts=2), Experts(5, 6, 4)),
    "some cost nothing": lambda: MoE(MoEPlusPlusRouter(6, 7, 3), ZeroComputationExperts(7, 6, 4)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def made(name: str) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """A layer without zeros, its parameters, and tokens [B, S, D]."""
    layer = LAYERS[name]().double()
    for parameter in layer.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return layer, dict(layer.named_parameters()), torch.randn(3, 4, 6, dtype=torch.float64)


@every_layer
def test_forward_mode_is_the_slope(name: str) -> None:
    layer, _, x = made(name)
    direction, step = torch.randn_like(x), 1e-6
    value, slope = jvp(layer, (x,), (direction,))
    torch.testing.assert_close(value, layer(x))
    expected = (layer(x + step * direction) - layer(x - step * direction)) / (2 * step)
    torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-7)


@every_layer
def test_forward_mode_without_torch_func_is_the_same(name: str) -> None:
    layer, _, x = made(name)
    direction = torch.randn_like(x)
    _, expected = jvp(layer, (x,), (direction,))
    with forward_ad.dual_level():
        slope = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, direction))).tangent
    torch.testing.assert_close(slope, expected)


@every_layer
def test_a_gradient_penalty_has_the_gradient_of_finite_differences(name: str) -> None:
    layer, parameters, x = made(name)
    x.requires_grad_()

    def penalty() -> Tensor:
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        return gradient.square().sum()

    found, step = torch.autograd.grad(penalty(), list(parameters.values()), allow_unused=True), 1e-6
    for (key, parameter), gradient in zip(parameters.items(), found):
        direction, values = torch.randn_like(parameter), []
        with torch.no_grad():
            for sign in (1, -2):
                parameter.add_(sign * step * direction)
                with torch.enable_grad():
                    values.append(penalty().detach())
            parameter.add_(step * direction)
        expected = (values[0] - values[1]) / (2 * step)
        slope = torch.zeros(()) if gradient is None else (gradient * direction).sum()
        torch.testing.assert_close(slope.double(), expected, rtol=1e-4, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


@every_layer
def test_a_second_derivative_is_the_slope_of_the_first(name: str) -> None:
    layer, _, x = made(name)
    gradient = grad(lambda x: layer(x).square().sum())
    direction, step = torch.randn_like(x), 1e-6
    _, product = jvp(gradient, (x,), (direction,))
    expected = (gradient(x + step * direction) - gradient(x - step * direction)) / (2 * step)
    torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-6)


@every_layer
def test_gradients_of_samples_are_those_of_one_call_each(name: str) -> None:
    layer, parameters, x = made(name)

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(layer, parameters, (sample[None],)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, sample in enumerate(x):
        gradients = torch.autograd.grad(layer(sample[None]).square().sum(), list(parameters.values()))
        for (key, value), expected in zip(found.items(), gradients):
            torch.testing.assert_close(value[i], expected, msg=lambda m, key=key: f"{key}: {m}")


@every_layer
def test_an_ensemble_is_its_members(name: str) -> None:
    layer, parameters, x = made(name)
    several = {key: torch.stack([p.detach() + 0.1 * i for i in range(3)]) for key, p in parameters.items()}
    found = vmap(lambda own: functional_call(layer, own, (x,)))(several)
    for i, y in enumerate(found):
        own = {key: p[i] for key, p in several.items()}
        torch.testing.assert_close(y, functional_call(layer, own, (x,)))


def test_attention_of_experts_has_gradients_of_samples() -> None:
    layer, x = MoA(TopKRouter(6, 5, 2), 4).double(), torch.randn(3, 4, 6, dtype=torch.float64)
    found = vmap(grad(lambda sample: layer(sample[None]).square().sum()))(x)
    for sample, value in zip(x, found):
        own = sample[None].requires_grad_()
        (expected,) = torch.autograd.grad(layer(own).square().sum(), own)
        torch.testing.assert_close(value[None], expected)


def test_what_a_gate_counts_outlives_the_transform() -> None:
    layer = MoE(TopKRouter(6, 5, 2, selection_bias=True), Experts(5, 6, 4))
    x, parameters = torch.randn(3, 4, 6), dict(layer.named_parameters())
    layer(x)
    expected = layer.router.load_since_update.clone()

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(layer, parameters, (sample,)).square().sum()

    def of_all(parameters: dict[str, Tensor]) -> Tensor:
        return vmap(loss, in_dims=(None, 0))(parameters, x).sum()

    for times, count in enumerate(
        (
            lambda: grad(loss)(parameters, x),
            lambda: vmap(grad(loss), in_dims=(None, 0))(parameters, x),
            lambda: grad(of_all)(parameters),
            lambda: layer(x),
        ),
        start=2,
    ):
        count()
        assert torch.equal(layer.router.load_since_update, times * expected)
