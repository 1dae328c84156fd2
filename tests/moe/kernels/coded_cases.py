"""What Triton's kernels must make of weights in few bits. `test_triton.py` runs this file in a process of its own."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.moe import LoRAOfExperts, OffloadedExperts, QuantisedExperts, Routing, quantised
from zoo.moe.expert_sources import OnHost
from zoo.moe.kernels import coded, moe_mlp
from zoo.moe.kernels.codes import FORMATS
from zoo.moe.kernels.triton import forward
from zoo.moe.kernels.triton.weights import Coded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of the norm: hidden units, outputs and their gradients are rounded.
EXACT = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    """As if the host had to wait for numbers, and an error where it would."""
    monkeypatch.setattr(quantised, "_waits", lambda x: False)

    def decodes(*args, **kwargs):
        raise AssertionError("weights were decoded in memory")

    monkeypatch.setattr(QuantisedExperts, "decoded_first", decodes)


def made(format, D, F, E, activation="swiglu", bias=False, **options):
    few = QuantisedExperts(E, D, F, activation, bias, format, **options)
    for name, (rows, columns) in few._shapes.items():
        for e in range(E):
            # Blocks of scales that differ by far.
            sizes = 4.0 ** torch.randint(-3, 4, (few.parts[name] * -(-rows // 32), -(-columns // 32)))
            spread = sizes.repeat_interleave(32, 0).repeat_interleave(32, 1)[: few.parts[name] * rows, :columns]
            few.encode(name, e, torch.randn(few.parts[name] * rows, columns) * spread / (4 * columns**0.5))
    for b in (few.b_in, few.b_out):
        if b is not None:
            b.normal_()
    return few.to(DEVICE)


def routing_of(choices, E):
    choices = torch.as_tensor(choices, device=DEVICE)
    return Routing.from_choices(choices, torch.rand(choices.shape, device=DEVICE) + 0.1, E)


def some_of(T, E, K):
    """Choices of K different experts; the last has no token."""
    return torch.rand(T, E - 1).topk(K).indices


def by_loop(few, x, routing, dy):
    """y and the gradients of x and the weights, an assignment after another's expert in float64."""
    held = [None if t is None else t.double() for t in few.held]
    x, weight = (t.detach().double().requires_grad_() for t in (x, routing.weight))
    y, bounds = torch.zeros_like(x), routing.offsets.tolist()
    for e in range(few.num_experts):
        span = slice(bounds[e], bounds[e + 1])
        alone = torch.tensor([0, span.stop - span.start], dtype=torch.int32, device=x.device)
        part = Routing(routing.token_index[span], alone, weight[span], len(x))
        of_expert = [None if t is None else t[e : e + 1] for t in held]
        if few.weigh_input:
            rows = x[part.token_index] * part.weight[:, None]
            ones = torch.ones_like(part.weight)
            each = Routing(torch.arange(len(rows), device=x.device), alone, ones, len(rows))
            out = moe_mlp(rows, *of_expert[:2], each, few.activation, "reference")
            y = y.index_add(0, part.token_index, out)
        else:
            biases = dict(zip(("b_in", "b_out"), of_expert[2:]))
            y = y + moe_mlp(x, *of_expert[:2], part, few.activation, "reference", **biases)
    return [y.detach(), *torch.autograd.grad(y, [x, weight], dy.double())]


def check(few, routing, dtype=torch.float32):
    x = torch.randn(routing.num_tokens, few.dim, device=DEVICE).to(dtype).requires_grad_()
    routing.weight.requires_grad_()
    dy = torch.randn_like(x)
    y = few(x, routing)
    assert y.dtype == dtype
    found = [y.detach(), *torch.autograd.grad(y, [x, routing.weight], dy)]
    y, *grads = by_loop(few, x, routing, dy)
    for mine, exact in zip(found, (y, *grads)):
        assert mine.shape == exact.shape
        # A weight's gradient is a sum that may cancel, <dy, output>, of numbers as large as the outputs.
        size = torch.maximum(exact.norm(), y.norm()) if exact is grads[1] else exact.norm()
        assert (mine.double() - exact).norm() <= EXACT[dtype] * size
    return found


@pytest.mark.parametrize("format", FORMATS)
def test_outputs_and_gradients_are_those_of_the_numbers_held(format):
    check(made(format, 160, 64, 3, bias=True), routing_of(some_of(7, 3, 2), 3))


@pytest.mark.parametrize(("format", "activation"), [("float8", "swiglu_clamped"), ("int8", "relu2")])
def test_sizes_that_nothing_divides(format, activation):
    # gate's last block of scales is cut short, and up's begins after it.
    check(made(format, 133, 151, 2, activation, True), routing_of([[0], [1], [1]], 2))


@pytest.mark.parametrize("format", FORMATS)
def test_more_rows_than_a_tile(format):
    check(made(format, 128, 32, 2), routing_of(torch.rand(90, 2).topk(1).indices, 2), torch.bfloat16)


def test_half_precision_and_a_plain_activation():
    check(made("mxfp4", 64, 32, 2, "gelu"), routing_of([[0], [1], [0]], 2), torch.float16)


@pytest.mark.parametrize("choices", [[[1]], [[2]] * 20, torch.zeros(0, 2, dtype=torch.long)], ids=["one", "all", "no"])
def test_one_token_all_to_one_expert_and_none(choices):
    found = check(made("float8", 32, 32, 3), routing_of(choices, 3))
    assert [len(t) for t in found] == [len(choices), len(choices), torch.as_tensor(choices).numel()]


def test_tokens_without_an_expert_get_zero():
    few, x = made("int8", 32, 32, 2), torch.randn(3, 32, device=DEVICE)
    keep = torch.tensor([[True], [False], [True]])
    y = few(x, Routing.from_choices(torch.ones(3, 1, dtype=torch.long), torch.ones(3, 1), 2, keep=keep))
    assert y[1].abs().max() == 0
    assert (y[[0, 2]].abs().amax(1) > 0).all()


def test_weighed_inputs():
    check(made("int8", 32, 32, 3, weigh_input=True), routing_of(some_of(5, 3, 2), 3))


def test_results_repeat_bit_for_bit():
    few, routing = made("mxfp4", 32, 32, 3), routing_of(some_of(20, 3, 2), 3)
    x = torch.randn(20, 32, device=DEVICE).bfloat16().requires_grad_()
    runs = []
    for _ in range(2):
        y = few(x, routing)
        runs.append((y.detach(), *torch.autograd.grad(y.sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_experts_beyond_two_to_the_31_bytes_are_reached():
    few, routing = made("mxfp4", 32, 32, 3), routing_of([[0], [1], [2]], 3)
    stacks = []
    for name, parts in few.parts.items():
        codes, scales = (getattr(few, f"{name}_{kind}") for kind in quantised.KINDS)
        step = 2**30 + 64  # memory that is never touched costs nothing
        far = torch.empty(2 * step + codes[0].numel(), dtype=codes.dtype, device=DEVICE)
        far = far.as_strided(codes.shape, (step, *codes.stride()[1:])).copy_(codes)
        stacks.append(Coded(far, scales, "mxfp4", parts))
    x = torch.randn(3, 32, device=DEVICE)
    routed = (None, None, routing.weight, routing.token_index, routing.offsets, "swiglu", False)
    assert torch.equal(forward(x, *stacks, *routed)[0], few(x, routing))


def test_only_what_is_needed_is_computed_and_kept():
    few, routing = made("float8", 32, 32, 2), routing_of(some_of(4, 2, 1), 2)
    x, kept = torch.randn(4, 32, device=DEVICE, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = few(x, routing)
    (alone,) = torch.autograd.grad(y.sum(), x)
    assert alone.isfinite().all()
    assert sum(t.numel() for t in kept if t.is_floating_point()) == x.numel() + 4 * 64 + 4 + sum(
        getattr(few, f"{name}_scales").numel() for name in few.parts
    )
    with FlopCounterMode(display=False) as counter:
        few(x, routing)
    assert counter.get_total_flops() == 2 * 4 * 3 * 32 * 32


def test_many_rows_an_expert_other_backends_and_types_are_decoded_first(monkeypatch):
    few, routing = made("float8", 32, 32, 2), routing_of(some_of(4, 2, 1), 2)
    x = torch.randn(4, 32, device=DEVICE)
    monkeypatch.setattr(coded, "FUSED", 1)
    with pytest.raises(AssertionError, match="decoded in memory"):
        few(x, routing)
    assert few.unfused(x.double()) == "its kernels compute in bfloat16, float16 and float32, not torch.float64"
    few.backend = "reference"
    assert few.unfused(x) == "backend 'reference' multiplies whole weights"


def test_pairs_beside_experts_are_as_before():
    few, routing = made("float8", 32, 32, 2), routing_of(some_of(4, 2, 1), 2)
    x = torch.randn(4, 32, device=DEVICE)
    beside = LoRAOfExperts(few, rank=2).to(DEVICE)  # which adds nothing yet
    torch.testing.assert_close(beside(x, routing), few(x, routing), rtol=1e-4, atol=1e-5)


def test_offloaded_experts_are_read_where_they_are():
    """Two of four slots, in another order than that of the experts, and experts that come again in the backward."""
    few = made("float8", 32, 32, 5)
    layer = OffloadedExperts(made("float8", 32, 32, 4), 5, OnHost(few))
    x = torch.randn(6, 32, device=DEVICE)
    for last in (4, 2, 0):
        layer(x, routing_of([[last]] * 6, 5))
    routing = routing_of(some_of(6, 5, 3), 5)
    routing.weight.requires_grad_()
    x.requires_grad_()
    for _ in range(2):
        dy = torch.randn_like(x)
        found = layer(x, routing)
        grads = torch.autograd.grad(found, [x, routing.weight], dy)
        y, *exact = by_loop(few, x, routing, dy)
        assert (found - y).norm() <= EXACT[x.dtype] * y.norm()
        assert (grads[0] - exact[0]).norm() <= EXACT[x.dtype] * exact[0].norm()
        assert (grads[1] - exact[1]).norm() <= EXACT[x.dtype] * torch.maximum(exact[1].norm(), y.norm())
