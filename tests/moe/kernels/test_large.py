"""Tensors whose byte offsets pass 2^31: weights, tokens, assignments, and all their gradients.

Inputs are nearly all zero and take memory only where they are written, so that each test stays below 9 GB.
"""

import math
import mmap

import pytest
import torch
from torch.nn import functional as F

from zoo.moe import Routing
from zoo.moe.kernels import memory, moe_mlp

BACKENDS = ("cpu", "grouped_mm")


@pytest.fixture(autouse=True)
def no_idle_memory(monkeypatch):
    """Give the CPU backend's large buffers back as soon as they are free."""
    monkeypatch.setattr(memory, "IDLE_SECONDS", 0.0)
    yield
    memory.empty((2 * memory.SMALLEST,), torch.uint8)


def zeros_without_pages(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Zeros that take memory only where they are written, more than 2^30 bytes."""
    size = dtype.itemsize * math.prod(shape)
    assert size > 2**30
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def expert(x: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor) -> torch.Tensor:
    """SwiGLU rows [N, D] of one expert."""
    gate, up = F.linear(x, w_in).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, w_out)


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Within what a handful of roundings to bfloat16 may do, relative to the norm."""
    assert expected.norm() > 0
    assert (got.double() - expected.double()).norm() < 0.02 * expected.double().norm()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_and_their_gradients_past_two_gigabytes(backend, grad):
    dim, hidden_dim = 2048, 147456
    w_in, w_out = zeros_without_pages(2, 2 * hidden_dim, dim), zeros_without_pages(2, dim, hidden_dim)
    assert w_in.numel() * w_in.element_size() > 2**31
    w_in[1, hidden_dim - 1, 5], w_in[1, -1, 7], w_out[1, 3, -1] = 2.0, 3.0, 0.5
    x = torch.zeros(3, dim, dtype=torch.bfloat16)
    x[:, 5], x[:, 7] = 1.0, 1.0
    routing = Routing.from_choices(torch.tensor([[0], [1], [1]]), torch.ones(3, 1, dtype=torch.bfloat16), 2)
    y = moe_mlp(x, w_in.requires_grad_(grad), w_out.requires_grad_(grad), routing, backend=backend)
    # All is zero but one hidden unit of expert 1, so one row of gate, one of up and one column of w_out suffice.
    small_in = torch.zeros(2, dim, dtype=torch.float64)
    small_in[0, 5], small_in[1, 7] = 2.0, 3.0
    small_out = torch.zeros(dim, 1, dtype=torch.float64)
    small_out[3, 0] = 0.5
    small = [small_in.requires_grad_(), small_out.requires_grad_()]
    expected = expert(x[1:].double(), *small)
    assert y[0].abs().max() == 0
    assert_close(y[1:].detach(), expected.detach())
    if grad:
        y.sum().backward()
        expected.sum().backward()
        assert_close(w_in.grad[1, [hidden_dim - 1, 2 * hidden_dim - 1]], small_in.grad)
        assert_close(w_out.grad[1, :, -1:], small_out.grad)
        assert w_in.grad[0, -1].abs().max() == 0


# grouped_mm sums outputs in float32: twice as many elements would take twice the memory.
@pytest.mark.parametrize(("backend", "dtype"), [("cpu", torch.bfloat16), ("grouped_mm", torch.float32)])
def test_tokens_and_their_gradients_past_two_gigabytes(backend, dtype):
    tokens, dim, hidden_dim = 8200, (1 << 18) // dtype.itemsize, 8
    x, dy = (zeros_without_pages(tokens, dim, dtype=dtype) for _ in range(2))
    assert x.numel() * x.element_size() > 2**31
    routed = [0, 4321, tokens - 2, tokens - 1]
    x[routed], dy[routed] = torch.randn(2, 4, dim).to(dtype)
    w_in, w_out = torch.randn(2, 2 * hidden_dim, dim) / dim**0.5, torch.randn(2, dim, hidden_dim) / hidden_dim**0.5
    weights = [w_in.to(dtype).requires_grad_(), w_out.to(dtype).requires_grad_()]
    keep = torch.zeros(tokens, 1, dtype=torch.bool)
    keep[routed] = True
    routing = Routing.from_choices(torch.arange(tokens)[:, None] % 2, torch.ones(tokens, 1, dtype=dtype), 2, keep=keep)
    y = moe_mlp(x.requires_grad_(), *weights, routing, backend=backend)
    got = y[routed].detach()
    y.backward(dy)
    del y
    exact = [w.detach().double().requires_grad_() for w in weights]
    rows = x.detach()[routed].double().requires_grad_()
    expected = torch.stack([expert(row, *(w[t % 2] for w in exact)) for t, row in zip(routed, rows)])
    expected.backward(dy[routed].double())
    assert_close(got, expected.detach())
    assert_close(x.grad[routed], rows.grad)
    assert x.grad[[1, tokens - 3]].abs().max() == 0
    for w, e in zip(weights, exact):
        assert_close(w.grad, e.grad)


def test_assignments_and_their_gradients_past_two_gigabytes():
    # float32, whose products are quick on every CPU.
    tokens, dim, hidden_dim, experts, k = 65664, 128, 64, 64, 64
    assert 4 * tokens * k * min(dim, 2 * hidden_dim) > 2**31
    x = torch.randn(tokens, dim).requires_grad_()
    w_in = (torch.randn(experts, 2 * hidden_dim, dim) / dim**0.5).requires_grad_()
    w_out = (torch.randn(experts, dim, hidden_dim) / hidden_dim**0.5).requires_grad_()
    # Every token meets every expert, those of its half twice as strongly.
    weight = torch.ones(tokens, k)
    weight[::2, ::2] = 2.0
    routing = Routing.from_choices(torch.arange(k).expand(tokens, k), weight, experts)
    row = torch.randn(dim)
    y = moe_mlp(x, w_in, w_out, routing, backend="cpu")
    y.backward(row.expand(tokens, dim))
    last = experts - 1  # its assignments lie past the limit
    some = [0, 1, tokens - 2, tokens - 1]
    few = x.detach()[some].double().requires_grad_()
    pairs = zip(w_in.detach().double(), w_out.detach().double(), weight[some].double().T)
    expected = sum(share[:, None] * expert(few, a, b) for a, b, share in pairs)
    expected.backward(row.double().expand(4, dim))
    assert_close(y.detach()[some], expected.detach())
    assert_close(x.grad[some], few.grad)
    mine = [w.detach()[last].double().requires_grad_() for w in (w_in, w_out)]
    share = weight[:, last, None].double()
    for rows, part in zip(x.detach().double().split(8192), share.split(8192)):
        expert(rows, *mine).backward(part * row.double())
    assert_close(w_in.grad[last], mine[0].grad)
    assert_close(w_out.grad[last], mine[1].grad)


def test_grouped_mm_computes_assignments_past_two_gigabytes():
    tokens, dim, hidden_dim, k = 4112, 32, 2048, 32
    assert 4 * tokens * k * 2 * hidden_dim > 2**31
    x, weight = torch.randn(tokens, dim), torch.rand(tokens, k)
    w_in = torch.randn(k, 2 * hidden_dim, dim) / dim**0.5
    w_out = torch.randn(k, dim, hidden_dim) / hidden_dim**0.5
    routing = Routing.from_choices(torch.arange(k).expand(tokens, k), weight, k)
    y = moe_mlp(x, w_in, w_out, routing, backend="grouped_mm")
    some = [0, tokens - 1]
    pairs = zip(w_in.double(), w_out.double(), weight[some].double().T)
    assert_close(y[some], sum(share[:, None] * expert(x[some].double(), a, b) for a, b, share in pairs))
