from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.moe import MLP, Capacity, Experts, MoE, Router, Routing, record
from zoo.moe.kernels import ACTIVATIONS, get_activation
from zoo.moe.routers import LoryRouter, MEORouter, RandomRouter, SMEARRouter, TopKRouter


def moe(dtype: torch.dtype = torch.float64, activation: str = "swiglu", bias: bool = False, **options: Any) -> MoE:
    layer = MoE(TopKRouter(6, 4, 2), Experts(4, 6, 5, activation, bias=bias), **options).to(dtype)
    for parameter in layer.parameters():
        parameter.data.normal_()
    return layer


def routed_by_loop(layer: MoE, x: Tensor) -> Tensor:
    """Every token through every expert that it chose, one product at a time."""
    experts, dense = layer.experts, layer.router(x).dense()
    act = get_activation(experts.activation)
    rows = []
    for t in range(x.shape[0]):
        y = torch.zeros_like(x[t])
        for e in dense[t].nonzero().flatten().tolist():
            pre = experts.w_in[e] @ x[t]
            if experts.b_in is not None:
                pre = pre + experts.b_in[e]
            out = experts.down_proj[e] @ act.forward(pre)
            if experts.down_proj_bias is not None:
                out = out + experts.down_proj_bias[e]
            y = y + dense[t, e] * out
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("bias", [False, True])
def test_output_is_the_weighted_sum_of_chosen_experts(activation: str, bias: bool) -> None:
    layer, x = moe(activation=activation, bias=bias), torch.randn(11, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), routed_by_loop(layer, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("bias", [False, True])
def test_a_dense_mlp_equals_one_expert_with_its_weights(activation: str, bias: bool) -> None:
    mlp, experts = MLP(6, 5, activation, bias).double(), Experts(1, 6, 5, activation, bias).double()
    inputs = [mlp.gate_proj, mlp.up_proj] if mlp.gate_proj is not None else [mlp.up_proj]
    experts.w_in.data[0] = torch.cat([linear.weight for linear in inputs])
    experts.down_proj.data[0] = mlp.down_proj.weight
    if bias:
        experts.b_in.data[0] = torch.cat([linear.bias for linear in inputs])  # type: ignore[union-attr]
        experts.down_proj_bias.data[0] = mlp.down_proj.bias  # type: ignore[union-attr]
    x = torch.randn(9, 6, dtype=torch.float64)
    routing = TopKRouter(6, 1, 1)(x)  # one expert: every weight is 1
    torch.testing.assert_close(mlp(x), experts(x, routing))


def test_shared_experts_gates_and_residuals() -> None:
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    for gates in ({}, {"shared_gate": True}, {"mix_gate": True}):
        layer = moe(shared=MLP(6, 9), **gates)
        routed = routed_by_loop(layer, x.view(14, 6)).view_as(x)
        beside = layer.shared(x)  # type: ignore[misc]
        if layer.shared_gate is not None:
            beside = beside / (1 + torch.exp(-(x @ layer.shared_gate.weight.T)))
        if layer.mix_gate is not None:
            c = (x @ layer.mix_gate.weight.T + layer.mix_gate.bias).exp()
            c = c / c.sum(-1, keepdim=True)
            routed, beside = routed * c[..., :1], beside * c[..., 1:]
        torch.testing.assert_close(layer(x), routed + beside, rtol=1e-10, atol=1e-10)


def test_several_shared_experts_are_one_wider_mlp() -> None:
    one, two = MLP(6, 4).double(), MLP(6, 4).double()
    both = MLP(6, 8).double()
    for name in ("gate_proj", "up_proj"):
        getattr(both, name).weight.data = torch.cat([getattr(m, name).weight for m in (one, two)])
    both.down_proj.weight.data = torch.cat([m.down_proj.weight for m in (one, two)], dim=1)
    x = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(both(x), one(x) + two(x))


@pytest.mark.parametrize("shape", [(6,), (1, 6), (0, 6), (3, 4, 6), (0, 4, 6), (2, 3, 4, 6), (2, 0, 6)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    layer, x = moe(), torch.randn(shape, dtype=torch.float64)
    y = layer(x)
    assert y.shape == x.shape
    if x.numel():
        torch.testing.assert_close(y.view(-1, 6), layer(x.view(-1, 6)))


def test_images_are_groups_of_their_own() -> None:
    """[B, H, W, D]: what shares a capacity is one image."""
    options: dict[str, Any] = {"capacity": Capacity(0.5), "group_size": "sequence"}
    layer = MoE(TopKRouter(6, 4, 2, **options), Experts(4, 6, 5))
    x = torch.randn(3, 4, 2, 6)
    torch.testing.assert_close(layer(x), torch.cat([layer(image[None]) for image in x]), rtol=1e-5, atol=1e-6)


def test_dropped_and_masked_tokens_contribute_nothing() -> None:
    layer = moe()
    x, mask = torch.randn(2, 8, 6, dtype=torch.float64), torch.rand(2, 8) > 0.5
    x[~mask] = float("nan")
    x.requires_grad_()
    y = layer(x, mask=mask)
    assert not y[~mask].any()
    torch.testing.assert_close(y[mask], layer(x.detach()[mask]))
    y.square().sum().backward()
    assert not x.grad[~mask].any()  # type: ignore[index]
    assert all(p.grad.isfinite().all() for p in layer.parameters())  # type: ignore[union-attr]
    layer.router.capacity = Capacity(tokens=1, drop="position")  # type: ignore[assignment]
    x = torch.randn(1, 6, dtype=torch.float64).expand(9, 6)  # all choose the same two experts
    assert not layer(x)[1:].any()


def test_whole_layer_passes_gradcheck() -> None:
    layer = moe(bias=True, activation="geglu", shared=MLP(6, 3), shared_gate=True)
    names, values = zip(*layer.named_parameters())
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, *values: torch.func.functional_call(layer, dict(zip(names, values)), (x,)), (x, *values)
    )


def test_autocast_computes_experts_low_and_the_router_in_float32() -> None:
    layer, x = moe(torch.float32), torch.randn(20, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    want = layer(x)
    assert (y.float() - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_state_round_trip_copies_and_the_meta_device(activation: str, bias: bool) -> None:
    def build() -> MoE:
        experts = Experts(4, 6, 5, activation, bias)
        return MoE(TopKRouter(6, 4, 2, selection_bias=True), experts, MLP(6, 5, activation, bias), shared_gate=True)

    layer, x = build(), torch.randn(7, 6)
    projection = "gate_up_proj" if activation == "swiglu" else "up_proj"
    want = {f"experts.{projection}", "experts.down_proj"}
    if bias:
        want |= {f"experts.{projection}_bias", "experts.down_proj_bias"}
    assert {name for name in layer.state_dict() if name.startswith("experts.")} == want
    twin = build()
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    with torch.device("meta"):
        empty = build()
    assert all(p.is_meta for p in empty.parameters())
    empty.to_empty(device="cpu")
    for module in empty.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert empty(x).isfinite().all()
    for name, value in empty.state_dict().items():
        assert value.abs().max() <= 1, name


def test_initial_weights_are_those_of_linear_layers() -> None:
    experts = Experts(8, 64, 256)
    for weight, fan_in in ((experts.gate_up_proj, 64), (experts.down_proj, 256)):
        assert weight.abs().max() <= fan_in**-0.5
        assert weight.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.02)


def test_printing_names_the_sizes() -> None:
    text = repr(moe(activation="geglu"))
    assert "Experts(4, dim=6, hidden_dim=5, activation='geglu')" in text
    assert "TopKRouter(6, num_experts=4, k=2" in text


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MoE(TopKRouter(6, 4), Experts(5, 6, 3)), "routes 4 experts of width 6, but there are 5 of width 6"),
        (lambda: MoE(TopKRouter(6, 4), Experts(4, 8, 3)), "routes 4 experts of width 6, but there are 4 of width 8"),
        (lambda: MoE(TopKRouter(6, 4), Experts(4, 6, 3), shared_gate=True), "need a shared expert"),
        (
            lambda: MoE(TopKRouter(6, 4), Experts(4, 6, 3), nn.Identity(), shared_gate=True, mix_gate=True),
            "exclude each other",
        ),
        (lambda: Experts(4, 6, 3, "tanh"), "unknown activation 'tanh'; known: swiglu"),
        (lambda: Experts(4, 0, 3), "dim must be at least 1, got 0"),
        (lambda: TopKRouter(6, 0), "num_experts must be at least 1, got 0"),
        (lambda: moe()(torch.ones(2, 5, 7)), "MoE: expected tokens [..., 6], got [2, 5, 7]"),
        (lambda: moe()(torch.ones(2, 5, 6), mask=torch.ones(2, 4)), "expected a mask [2, 5], one a token, got [2, 4]"),
        (lambda: moe()(torch.ones(2, 5, 6), mask=torch.ones(5, 2)), "expected a mask [2, 5], one a token, got [5, 2]"),
        (lambda: Experts(4, 6, 3, backend="fast"), "unknown backend 'fast'; known: auto, reference"),
    ],
)
def test_what_does_not_fit_is_named(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


def test_shapes_are_those_of_the_meta_device() -> None:
    layer = moe(torch.float32, bias=True, shared=MLP(6, 3)).to("meta")
    y = layer(torch.empty(2, 5, 6, device="meta"))
    assert y.is_meta
    assert y.shape == (2, 5, 6)


class Around(nn.Module):
    """What a library of adapters may put around a module: it has nothing but the module's forward pass."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *given: Any, **told: Any) -> Any:
        return self.module(*given, **told)


def test_router_and_experts_may_be_wrapped_afterwards() -> None:
    layer, x = MoE(TopKRouter(6, 4, losses={"z": 1.0}), Experts(4, 6, 5)), torch.randn(2, 7, 6)
    expected, mask = layer(x), torch.rand(2, 7) > 0.5
    masked = layer(x, mask=mask)
    layer.router, layer.experts = Around(layer.router), Around(layer.experts)  # type: ignore[assignment]
    with record(layer) as step:
        assert torch.equal(layer(x), expected)
        assert torch.equal(layer(x, mask=mask), masked)
    step.losses()["z"].backward()
    assert layer.router.module.weight.grad.any()  # type: ignore[operator, union-attr]


class Always(Router):
    """Returns what it was made with, called with the tokens where that is a function."""

    def __init__(self, returned: Any) -> None:
        super().__init__(6, 4)
        self.returned = returned

    def forward(self, x: Tensor, **context: Any) -> Any:
        return self.returned(x) if callable(self.returned) else self.returned


def first_of_each(x: Tensor) -> Routing:
    """As many tokens as there are sequences, the mistake of a gate that takes [B, S, D] for [T, D]."""
    return Routing.from_choices(torch.zeros(x.shape[0], 1, dtype=torch.long), x.new_ones(x.shape[0], 1), 4)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (None, TypeError, "Always returned a NoneType, expected a zoo.moe.Routing, Slots or Blend"),
        (torch.rand(14, 4), TypeError, "Always returned a Tensor, expected a zoo.moe.Routing, Slots or Blend"),
        (first_of_each, ValueError, "Always decided for 2 tokens, but got [2, 7, 6]; expected 14"),
    ],
)
def test_a_decision_that_is_none_or_for_other_tokens_is_named(returned: Any, error: Any, message: str) -> None:
    layer = MoE(Always(returned), Experts(4, 6, 5))
    with pytest.raises(error, match=re.escape(message)):
        layer(torch.randn(2, 7, 6))
    if returned is first_of_each:
        assert layer(torch.randn(14, 6)).shape == (14, 6)


class WithMask(nn.Module):
    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.layer(x, mask=mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "router",
    [
        lambda: TopKRouter(6, 4),
        lambda: SMEARRouter(6, 4),
        lambda: MEORouter(6, 4),
        lambda: LoryRouter(6, 4, segment=4),
        lambda: RandomRouter(6, 4),
        lambda: RandomRouter(6, 4, inference_level="sentence"),
        lambda: RandomRouter(6, 4, inference_level="batch"),
    ],
    ids=["topk", "smear", "meo", "lory", "token", "sentence", "batch"],
)
def test_an_exported_layer_takes_any_number_of_tokens(router: Any, masked: bool) -> None:
    model = WithMask(MoE(router(), Experts(4, 6, 5))).eval()
    sizes = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("length", min=5, max=64)}
    mask = torch.ones(3, 5, dtype=torch.bool) if masked else None
    shapes = {"x": sizes, "mask": sizes if masked else None}
    program = torch.export.export(model, (torch.randn(3, 5, 6), mask), dynamic_shapes=shapes)
    for shape in ((4, 9), (2, 6), (3, 13)):
        x, mask = torch.randn(*shape, 6), torch.rand(shape) > 0.3 if masked else None
        found = []
        for call in (program.module(), model):
            torch.manual_seed(1)
            found.append(call(x, mask))
        torch.testing.assert_close(*found)
