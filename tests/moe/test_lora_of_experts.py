"""Pairs of low rank inside frozen experts, against the sum of weights an expert at a time."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from zoo.moe import Experts, LoRAOfExperts, MoE, QuantisedExperts, ResidualExperts, Routing, quantised
from zoo.moe.kernels import get_activation
from zoo.moe.routers import TopKRouter

E, D, F, R, ALPHA = 5, 32, 64, 3, 5.0
PARTS = [("gate", "up", "down"), ("gate",), ("up",), ("down",), ("up", "down")]


def made(activation="swiglu", bias=False, parts=None, dtype=torch.float64, format=None, **options):
    experts = Experts(E, D, F, activation, bias, **options).requires_grad_(False)
    for parameter in experts.parameters():
        parameter.normal_(std=0.4)
    base = experts if format is None else QuantisedExperts.of(experts, format)
    parts = parts or (PARTS[0] if base.gated else PARTS[4])
    layer = LoRAOfExperts(base, R, ALPHA, parts).to(dtype)
    for pair in layer.lora.values():
        torch.nn.init.normal_(pair.b, std=0.4)
    return layer


def decide(choices, weight):
    return Routing.from_choices(choices, weight, E)


def by_hand(layer, x, choices, weight):
    """Token by token, each through sums of weights of its experts; the parameters are the layer's own."""
    base, act, out = layer.base, get_activation(layer.activation), []
    held = [t if t is None else t.to(x.dtype) for t in base.held]
    delta = {part: [ALPHA / R * pair.b[e] @ pair.a[e] for e in range(E)] for part, pair in layer.lora.items()}
    for t in range(len(x)):
        y = x.new_zeros(D)
        for k, e in enumerate(choices[t].tolist()):
            w_in, w_out = held[0][e], held[1][e]
            into = [delta[p][e] if p in delta else x.new_zeros(F, D) for p in PARTS[0][0 if base.gated else 1 : 2]]
            w_in = w_in + torch.cat(into)
            w_out = w_out + (delta["down"][e] if "down" in delta else 0)
            read = x[t] * weight[t, k] if base.weigh_input else x[t]
            hidden = w_in @ read + (0 if held[2] is None else held[2][e])
            found = w_out @ act.forward(hidden) + (0 if held[3] is None else held[3][e])
            y = y + (found if base.weigh_input else weight[t, k] * found)
        out.append(y)
    return torch.stack(out) if out else x * weight.sum()


def compare(layer, tokens=11, k=2, choices=None):
    x = torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(tokens, k, dtype=torch.float64, requires_grad=True)
    choices = torch.rand(tokens, E - 1).topk(k).indices if choices is None else choices  # the last has no token
    found, expected = layer(x, decide(choices, weight)), by_hand(layer, x, choices, weight)
    torch.testing.assert_close(found, expected)
    learnt, scale = [x, weight, *layer.lora.parameters()], torch.randn_like(expected)
    ours = torch.autograd.grad((found * scale).sum(), learnt)
    theirs = torch.autograd.grad((expected * scale).sum(), learnt, allow_unused=True)
    for got, want, of in zip(ours, theirs, learnt):
        torch.testing.assert_close(got, torch.zeros_like(of) if want is None else want)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, decide(choices, weight)), expected)


@pytest.mark.parametrize("format", [None, "int8", "mxfp4"])
@pytest.mark.parametrize("parts", PARTS, ids="-".join)
def test_values_and_gradients_are_those_of_summed_weights(parts, format):
    compare(made(parts=parts, format=format))


@pytest.mark.parametrize("format", [None, "float8"])
@pytest.mark.parametrize(
    ("activation", "bias", "weigh"),
    [("swiglu_clamped", True, False), ("relu2", True, True), ("gelu", False, False), ("geglu", False, True)],
)
def test_other_experts(activation, bias, weigh, format):
    compare(made(activation, bias, format=format, weigh_input=weigh))


@pytest.mark.parametrize("format", [None, "int8"])
def test_few_tokens_and_all_to_one(format):
    layer = made(format=format)
    for tokens in (0, 1):
        compare(layer, tokens)
    compare(layer, 7, 1, torch.full((7, 1), 3))


@pytest.mark.parametrize("waits", [True, False], ids=["host", "device"])
@pytest.mark.parametrize("group", [1, 1 << 27], ids=["one at a time", "together"])
def test_experts_are_decoded_in_groups(waits, group, monkeypatch):
    monkeypatch.setattr(quantised, "DECODED", group)
    monkeypatch.setattr(quantised, "_waits", lambda x: waits)
    compare(made(format="int8", bias=True))


@pytest.mark.parametrize("first", [True, False], ids=["first layer", "later layer"])
def test_decoded_weights_are_not_kept(first):
    """Neither where tokens have gradients nor where pairs alone have."""
    layer, sizes = made(format="int8", dtype=torch.float32), []
    x, choices = torch.randn(9, D, requires_grad=not first), torch.rand(9, E).topk(2).indices
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.shape) or t, lambda t: t):
        y = layer(x, decide(choices, torch.rand(9, 2)))
    assert not any(len(shape) == 3 for shape in sizes)
    y.square().sum().backward()
    assert all(pair.a.grad.any() and pair.b.grad.any() for pair in layer.lora.values())


def test_frozen_weights_are_not_copied_and_get_no_gradient():
    layer, kept = made(), []
    x, choices = torch.randn(9, D, dtype=torch.float64), torch.rand(9, E).topk(2).indices
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x, decide(choices, torch.rand(9, 2, dtype=torch.float64)))
    own = {p.data_ptr() for p in layer.parameters()}
    assert all(t.data_ptr() in own for t in kept if t.dim() == 3)
    y.square().sum().backward()
    assert all(p.grad is None for p in layer.base.parameters())
    assert all(p.grad.abs().sum() > 0 for p in layer.lora.parameters())


@pytest.mark.parametrize("format", [None, "int8"])
def test_it_starts_as_its_base(format):
    base = made(format=format).base
    layer, x = LoRAOfExperts(base, R).double(), torch.randn(9, D, dtype=torch.float64)
    routing = decide(torch.rand(9, E).topk(2).indices, torch.rand(9, 2, dtype=torch.float64))
    torch.testing.assert_close(layer(x, routing), base(x, routing))
    for pair in layer.lora.values():
        bound = pair.dim**-0.5
        assert not pair.b.any()
        assert 0.9 * bound < pair.a.abs().max() <= bound


@pytest.mark.parametrize("format", [None, "int8"])
@pytest.mark.parametrize("autocast", [False, True])
def test_adapters_in_float32_beside_bfloat16(autocast, format):
    layer = made(format=format, dtype=torch.float32, bias=True)
    if not autocast:
        layer.base.to(torch.bfloat16)
    x = torch.randn(9, D, dtype=torch.float32 if autocast else torch.bfloat16)
    choices, weight = torch.rand(9, E).topk(2).indices, torch.rand(9, 2)
    with torch.autocast("cpu", enabled=autocast):
        found = layer(x, decide(choices, weight))
        found.float().square().sum().backward()
    assert found.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in layer.lora.parameters())
    exact = copy.deepcopy(layer).double()
    exact.zero_grad()
    expected = by_hand(exact, x.double(), choices, weight.double())
    expected.square().sum().backward()
    assert (found.double() - expected).norm() < 2e-2 * expected.norm()
    for ours, theirs in zip(layer.lora.parameters(), exact.lora.parameters()):
        assert (ours.grad.double() - theirs.grad).norm() < 4e-2 * theirs.grad.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_merged_is_the_sum_of_each_expert(dtype):
    layer = made(parts=("up", "down"), dtype=torch.float64, bias=True)
    layer.base.to(dtype)
    before, pairs = copy.deepcopy(layer.base), layer.lora
    merged = layer.merged()
    assert type(merged) is Experts
    near = {"rtol": 1e-9 if dtype == torch.float64 else 2**-7, "atol": 1e-12}
    for e in range(E):
        w_in, w_out = (w[e].double().clone() for w in (before.w_in, before.w_out))
        w_in[F:] += ALPHA / R * pairs["up"].b[e] @ pairs["up"].a[e]
        w_out += ALPHA / R * pairs["down"].b[e] @ pairs["down"].a[e]
        torch.testing.assert_close(merged.w_in[e].double(), w_in, **near)
        torch.testing.assert_close(merged.w_out[e].double(), w_out, **near)
    assert torch.equal(merged.b_in, before.b_in)
    assert not any(p.requires_grad for p in merged.parameters())
    with pytest.raises(ValueError, match=r"few bits \(int8\)"):
        made(format="int8").merged()


@pytest.mark.parametrize("format", [None, "int8"])
def test_dropout_and_checkpointing(format):
    """Repeated by checkpointing, a step with dropout is the same one."""
    layer = made(format=format, dtype=torch.float32, **({} if format else {"dropout": 0.2}))
    for pair in layer.lora.values():
        pair.dropout = 0.5
    moe, x = MoE(TopKRouter(D, E, 2), layer).train(), torch.randn(9, D, requires_grad=True)
    learnt, found = [x, *(p for p in moe.parameters() if p.requires_grad)], []
    for apply in (lambda y: moe(y), lambda y: checkpoint(moe, y, use_reentrant=False)):
        torch.manual_seed(3)
        y = apply(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), learnt)])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs)
    assert (moe.eval()(x) - found[0][0]).abs().max() > 1e-3


@pytest.mark.parametrize("format", [None, "int8"])
def test_it_compiles(format):
    layer = made(format=format, dtype=torch.float32)
    x, learnt = torch.randn(9, D, requires_grad=True), list(layer.lora.parameters())
    routing, found = decide(torch.rand(9, E).topk(2).indices, torch.rand(9, 2)), []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=format is None)):
        y = run(x, routing)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *learnt])])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs)


def test_what_does_not_fit_is_named():
    base = made().base
    for base_, options, match in [
        (base, {"parts": ("gate", "down_proj")}, "expected parts among gate, up, down, got"),
        (base, {"parts": ()}, "got \\[\\]"),
        (Experts(2, 4, 4, "relu"), {"parts": ("gate",)}, "among up, down"),
        (base, {"rank": 0}, "rank must be at least 1"),
        (ResidualExperts(2, 4, 4), {}, "expected Experts, QuantisedExperts or OffloadedExperts, got ResidualExperts"),
        (made(), {}, "got LoRAOfExperts"),
    ]:
        with pytest.raises(ValueError, match=match):
            LoRAOfExperts(base_, **options)
    layer, routing = made(), decide(torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1, dtype=torch.float64))
    layer.base.parallel = lambda *_: None
    with pytest.raises(RuntimeError, match="cannot be spread"):
        layer(torch.randn(3, D, dtype=torch.float64), routing)
    with pytest.raises(ValueError, match="spread over processes"):
        LoRAOfExperts(layer.base)
