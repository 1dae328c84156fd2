"""Experts in numbers of few bits: they compute what experts with those numbers compute."""

import copy

import pytest
import torch

from zoo.models import count_parameters
from zoo.moe import Experts, MoE, QuantisedExperts, Routing, quantised
from zoo.moe.kernels import moe_mlp
from zoo.moe.kernels.codes import FORMATS
from zoo.moe.routers import TopKRouter

E, D, F = 5, 64, 96
KINDS = [(name, "swiglu", False) for name in FORMATS] + [("float8", "swiglu_clamped", True), ("int8", "relu", True)]


def made(format, activation="swiglu", bias=False, **options):
    experts = Experts(E, D, F, activation, bias, **options)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.3)
    return experts, QuantisedExperts.of(experts, format)


def routing_of(choices, weight=None):
    choices = torch.as_tensor(choices)
    return Routing.from_choices(choices, torch.rand(choices.shape) if weight is None else weight, E)


def expected(few, x, routing):
    """By the definition, in float64, with the numbers that the experts hold."""
    w_in, w_out, b_in, b_out = (t if t is None else t.double() for t in few.held)
    exact = Routing(routing.token_index, routing.offsets, routing.weight.double(), routing.num_tokens)
    return moe_mlp(x.double(), w_in, w_out, exact, few.activation, "reference", b_in=b_in, b_out=b_out)


@pytest.mark.parametrize("waits", [True, False], ids=["host", "device"])
@pytest.mark.parametrize("group", [1, 1 << 27], ids=["one at a time", "together"])
@pytest.mark.parametrize(("format", "activation", "bias"), KINDS)
def test_outputs_and_gradients_are_those_of_the_numbers_held(format, activation, bias, group, waits, monkeypatch):
    monkeypatch.setattr(quantised, "DECODED", group)
    monkeypatch.setattr(quantised, "_waits", lambda x: waits)
    _, few = made(format, activation, bias)
    x = torch.randn(23, D, requires_grad=True)
    weight = torch.rand(23, 2, requires_grad=True)
    choices = torch.rand(23, E - 1).topk(2).indices  # the last expert has no token
    y = few(x, routing_of(choices, weight))
    reference = expected(few, x, routing_of(choices, weight))
    torch.testing.assert_close(y.double(), reference, rtol=1e-5, atol=1e-5 * float(reference.abs().max()))
    with torch.no_grad():
        torch.testing.assert_close(
            few(x, routing_of(choices, weight)).double(), reference, rtol=1e-5, atol=1e-5 * float(reference.abs().max())
        )
    grads = torch.autograd.grad((y * y).sum(), [x, weight])
    for found, want in zip(grads, torch.autograd.grad((reference * reference).sum(), [x, weight])):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("waits", [True, False], ids=["host", "device"])
def test_no_token_one_token_and_all_to_one_expert(waits, monkeypatch):
    monkeypatch.setattr(quantised, "_waits", lambda x: waits)
    _, few = made("float8")
    for choices in (torch.zeros(0, 2, dtype=torch.long), [[3, 3]], [[4]] * 7):
        x = torch.randn(len(choices), D, requires_grad=True)
        routing = routing_of(choices)
        y = few(x, routing)
        torch.testing.assert_close(y.double(), expected(few, x, routing), rtol=1e-5, atol=1e-5)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert dx.shape == x.shape


def test_bfloat16_tokens_and_autocast():
    _, few = made("mxfp4")
    x = torch.randn(40, D)
    routing = routing_of(torch.rand(40, E).topk(2).indices)
    reference = expected(few, x.bfloat16(), routing)
    found = few(x.bfloat16(), routing)
    with torch.autocast("cpu", torch.bfloat16):
        cast = few(x, routing)
    for y in (found, cast):
        assert y.dtype == torch.bfloat16
        assert (y.double() - reference).abs().max() < 0.02 * reference.abs().max()


@pytest.mark.parametrize("format", FORMATS)
def test_a_cast_of_the_model_leaves_the_numbers_as_they_are(format):
    _, few = made(format, "relu", True)
    layer = MoE(TopKRouter(D, E, k=2), few)
    before = [value.clone() for value in few.held]
    layer.bfloat16()
    assert all(torch.equal(now, then) for now, then in zip(few.held[:2], before))
    assert layer(torch.randn(3, D).bfloat16()).dtype == torch.bfloat16


def test_weigh_input_and_what_is_kept_for_the_backward():
    experts, few = made("int8", weigh_input=True)
    with torch.no_grad():
        for name, value in zip((few._in, "down_proj"), few.held):
            getattr(experts, name).copy_(value)
    x, routing = torch.randn(9, D, requires_grad=True), routing_of(torch.rand(9, E).topk(2).indices)
    torch.testing.assert_close(few(x, routing), experts(x, routing), rtol=1e-5, atol=1e-5)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        few(x, routing)
    assert max(sizes) <= x.numel()  # no decoded weights


def test_a_layer_of_them_trains_its_gate_and_nothing_else(tmp_path):
    experts, few = made("float8")
    router = TopKRouter(D, E, k=2)
    layer = MoE(router, few)
    before = copy.deepcopy(few.state_dict())
    layer(torch.randn(30, D)).square().sum().backward()
    assert router.weight.grad.abs().sum() > 0
    assert [name for name, _ in layer.named_parameters()] == ["router.weight"]
    assert all(torch.equal(value, before[name]) for name, value in few.state_dict().items())
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    again = MoE(TopKRouter(D, E, k=2), QuantisedExperts(E, D, F, format="float8"))
    again.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    x = torch.randn(8, D)
    assert torch.equal(again(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    whole = MoE(router, experts)
    assert count_parameters(layer) == count_parameters(whole)


def test_memory_is_what_the_formats_say():
    sizes = {}
    for format in FORMATS:
        with torch.device("meta"):
            few = QuantisedExperts(4, 256, 512, format=format)
        sizes[format] = sum(b.numel() * b.itemsize for b in few.buffers()) / (4 * 3 * 256 * 512)
    assert sizes["float8"] == pytest.approx(1 + 4 / 128**2)
    assert sizes["mxfp4"] == pytest.approx(0.5 + 1 / 32)
    assert sizes["int8"] == pytest.approx(1 + (4 * 2 / 256 + 4 / 512) / 3)


def test_it_is_compiled_around():
    _, few = made("float8")
    layer = MoE(TopKRouter(D, E, k=2), few)
    x = torch.randn(8, D)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x), layer(x))


def test_what_cannot_be_kept_is_refused():
    with pytest.raises(ValueError, match="unknown format 'fp4'; known: float8, mxfp4, int8"):
        QuantisedExperts(2, 32, 32, format="fp4")
    with pytest.raises(ValueError, match="rows of 40 numbers"):
        QuantisedExperts(2, 40, 32, format="mxfp4")
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        QuantisedExperts(2, 32, 32, backend="fast")
    with pytest.raises(ValueError, match="hidden_dim must be at least 1"):
        QuantisedExperts(2, 32, 0)
