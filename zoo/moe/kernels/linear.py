"""One linear map an expert, as a registered operator: rows sorted by expert, each through its expert's weight.

A rows, E experts, I inputs, O outputs. As `zoo::grouped_linear` it is opaque to torch.compile (no graph break), and
FLOP counters count it. Saved for the backward: rows, weight and offsets.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from . import grouped_mm, transformed
from .grouped_mm import aligned
from .products import mm
from .register import backward_of, operator


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """rows [A, I], those of expert e being offsets[e]:offsets[e+1], times weight[e].T, weight [E, O, I]: [A, O].

    The weight is cast to the rows' dtype, both under autocast to the autocast dtype. On a GPU it runs on torch's
    grouped GEMM where that can read the sizes, else and on the CPU an expert at a time, in any dtype.
    Raises ValueError on shapes that do not fit.
    """
    if rows.shape[-1] != weight.shape[-1] or offsets.numel() != weight.shape[0] + 1:
        raise ValueError(
            f"grouped_linear: rows {list(rows.shape)} and {offsets.numel()} offsets do not fit "
            f"weight {list(weight.shape)}; expected [A, I], E + 1 and [E, O, I]"
        )
    device = rows.device.type
    if device != "meta" and rows.dtype != torch.float64 and torch.is_autocast_enabled(device):
        rows = rows.to(torch.get_autocast_dtype(device))
    if transformed.is_active():
        return transformed.grouped_linear(rows, weight.to(rows.dtype), offsets)
    return _op(rows, weight.to(rows.dtype), offsets)


def _on_grouped_gemm(rows: Tensor, weight: Tensor) -> bool:
    # On a CPU torch's grouped GEMM is the same loop.
    return rows.is_cuda and rows.shape[0] > 0 and grouped_mm.unsupported(rows, weight, weight, "relu") is None


def _forward(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    if _on_grouped_gemm(rows, weight):
        return F.grouped_mm(aligned(rows), aligned(weight).mT, offs=offsets[1:])
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    for e, (start, end) in enumerate(pairwise(offsets.tolist())):
        mm(rows[start:end], weight[e].T, out[start:end])
    return out


def _backward(grad: Tensor, rows: Tensor, weight: Tensor, offsets: Tensor, needs: list[bool]) -> list[Tensor]:
    """Gradients of rows and weight; an empty tensor for one that is not needed."""
    nothing = rows.new_empty(0)
    if _on_grouped_gemm(rows, weight):
        grad, rows, weight = aligned(grad), aligned(rows), aligned(weight)
        return [
            F.grouped_mm(grad, weight, offs=offsets[1:]) if needs[0] else nothing,
            F.grouped_mm(grad.T, rows, offs=offsets[1:]) if needs[1] else nothing,
        ]
    d_rows = torch.empty_like(rows, memory_format=torch.contiguous_format) if needs[0] else nothing
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs[1] else nothing
    for e, (start, end) in enumerate(pairwise(offsets.tolist())):
        if needs[0]:
            mm(grad[start:end], weight[e], d_rows[start:end])
        if needs[1]:
            mm(grad[start:end].T, rows[start:end], d_weight[e])
    return [d_rows, d_weight]


def _forward_fake(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


def _backward_fake(grad: Tensor, rows: Tensor, weight: Tensor, offsets: Tensor, needs: list[bool]) -> list[Tensor]:
    return [t.new_empty(t.shape) if n else t.new_empty(0) for t, n in zip((rows, weight), needs)]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad):  # type: ignore[no-untyped-def]
    needs = list(ctx.needs_input_grad[:2])
    *inputs, offsets = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph: these are to have gradients too
        composed = partial(transformed.grouped_linear, offsets=offsets)
        return (*transformed.gradients(composed, inputs, needs, grad), None)
    grads = _backward_op(grad, *inputs, offsets, needs)
    return (*(g if n else None for g, n in zip(grads, needs)), None)


_ARGUMENTS = "Tensor rows, Tensor weight, Tensor offsets"
_op = operator(f"grouped_linear({_ARGUMENTS}) -> Tensor", _forward, _forward_fake, _differentiate, _setup_context)
_backward_op = backward_of("grouped_linear", f"Tensor grad, {_ARGUMENTS}, bool[] needs", _backward, _backward_fake)


@register_flop_formula(torch.ops.zoo.grouped_linear)
def _forward_flops(rows, weight, offsets, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 2 * rows[0] * weight[1] * weight[2]


@register_flop_formula(torch.ops.zoo.grouped_linear_backward)
def _backward_flops(grad, rows, weight, offsets, needs, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 2 * sum(needs) * rows[0] * weight[1] * weight[2]
