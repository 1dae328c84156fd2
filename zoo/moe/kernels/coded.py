"""The expert computation with frozen weights in few bits as one registered operator: kernels decode in registers.

T tokens, D width, F hidden, H = 2F (gated) or F, E experts, A assignments sorted by expert. As `zoo::moe_mlp_coded` it
is opaque to torch.compile, counted by FLOP counters, and saved or recomputed as a unit by activation checkpointing.
Saved for the backward: the inputs and the pre-activations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import transformed
from .activations import get_activation
from .register import backward_of, operator

# Rows an expert has on average up to which codes are decoded inside the product. An H200 reads a code of 8 bits in
# 1 / 4.3 TB/s = 0.23 ps, and multiplies it by m rows in 2 m / 790 TFLOP/s = 0.0025 m ps: up to 92 rows, of 4 bits 46,
# the time is that of reading codes, once as a tile has 64 rows. Each further 64 rows decode again: 2 integer operations
# a number at 132 x 64 x 1.8 GHz, 0.13 ps, beside a product of 0.16 ps, which small tiles compute in about 0.4 and large
# ones in 0.2. To decode before the product takes torch about 30 bytes read and written a number, 7 ps, once, and the
# host must know for which experts. So both take as long at about 7 / (0.13 + 0.4 - 0.2) = 21 tiles, 1300 rows; less
# than half of that leaves room for what such counts forget.
FUSED = 512


def unsupported(x: Tensor, dtype: torch.dtype, activation: str) -> str | None:
    """Why tokens x, computed with in dtype, cannot meet codes here; None when they can."""
    from . import triton

    if transformed.is_active():
        return "transforms of torch.func cannot see into its kernels"
    if dtype not in triton.DTYPES:
        return f"its kernels compute in bfloat16, float16 and float32, not {dtype}"
    if (reason := triton.unavailable(x)) is not None:
        return reason
    return None if activation in triton.FORMS else f"activation {activation!r} has no Triton form"


def moe_mlp_coded(
    x: Tensor,
    w_in: tuple[Tensor, Tensor],
    w_out: tuple[Tensor, Tensor],
    b_in: Tensor | None,
    b_out: Tensor | None,
    weight: Tensor,
    token_index: Tensor,
    offsets: Tensor,
    activation: str,
    format: str,
    place: Tensor | None = None,
) -> Tensor:
    """`moe_mlp` [T, D] for tokens x [T, D] in their dtype, of codes and scales that `format` gives to w_in and w_out.

    gate and up of a gated w_in have scales of their own. Differentiable once, with respect to x and weight.
    """
    save = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    indices = (token_index, offsets, activation, format)
    y: Tensor = _op(x, *w_in, *w_out, b_in, b_out, weight, *indices, save, place)[0]
    return y


def _stacks(in_codes: Tensor, in_scales: Tensor, out_codes: Tensor, out_scales: Tensor, activation: str, format: str):  # type: ignore[no-untyped-def]
    from .triton.weights import Coded

    parts = 2 if get_activation(activation).gated else 1
    return Coded(in_codes, in_scales, format, parts), Coded(out_codes, out_scales, format)


def _forward(  # type: ignore[no-untyped-def]
    x, in_codes, in_scales, out_codes, out_scales, b_in, b_out, weight, token_index, offsets, *rest
):
    from . import triton

    activation, format, save, place = _defaults(rest)
    w_in, w_out = _stacks(in_codes, in_scales, out_codes, out_scales, activation, format)
    return triton.forward(x, w_in, w_out, b_in, b_out, weight, token_index, offsets, activation, save, place)


def _defaults(rest: tuple[Any, ...]) -> tuple[Any, ...]:
    """The last four arguments, of which place may be left out."""
    return rest if len(rest) == 4 else (*rest, None)


def _forward_fake(  # type: ignore[no-untyped-def]
    x, in_codes, in_scales, out_codes, out_scales, b_in, b_out, weight, token_index, offsets, *rest
):
    _, _, save, _ = _defaults(rest)
    return x.new_empty(x.shape), x.new_empty(token_index.shape[0] if save else 0, in_codes.shape[1])


def _backward(  # type: ignore[no-untyped-def]
    dy, x, in_codes, in_scales, out_codes, out_scales, b_in, b_out, weight, pre, token_index, offsets, *rest
):
    """Gradients of x and weight; an empty tensor for one that is not needed."""
    from . import triton

    activation, format, needs, place = _defaults(rest)
    w_in, w_out = _stacks(in_codes, in_scales, out_codes, out_scales, activation, format)
    needs = [needs[0], False, False, False, False, needs[1]]
    given = (dy, x, w_in, w_out, b_in, b_out, weight, pre, token_index, offsets, activation, needs, place)
    grads = triton.backward(*given)
    return [grads[0], grads[5]]


def _backward_fake(  # type: ignore[no-untyped-def]
    dy, x, in_codes, in_scales, out_codes, out_scales, b_in, b_out, weight, pre, token_index, offsets, *rest
):
    needs = _defaults(rest)[2]
    return [t.new_empty(t.shape if n else 0) for t, n in zip((x, weight), needs)]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, token_index, offsets, activation, format, _, place = inputs
    ctx.save_for_backward(*tensors, output[1], token_index, offsets, place)
    ctx.activation, ctx.format = activation, format
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, _):  # type: ignore[no-untyped-def]
    if dy is None:
        return (None,) * 14
    *saved, place = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[7]]
    grads = _backward_op(dy, *saved, ctx.activation, ctx.format, needs, place)
    dx, dweight = (g if n else None for g, n in zip(grads, needs))
    return (dx, *(None,) * 6, dweight, *(None,) * 6)


_TENSORS = (
    "Tensor x, Tensor in_codes, Tensor in_scales, Tensor out_codes, Tensor out_scales, Tensor? b_in, Tensor? b_out,"
    " Tensor weight"
)
_INDICES = "Tensor token_index, Tensor offsets, str activation, str format"
_op = operator(
    f"moe_mlp_coded({_TENSORS}, {_INDICES}, bool save, Tensor? place=None) -> (Tensor, Tensor)",
    *(_forward, _forward_fake, _differentiate, _setup_context),
)
_backward_op = backward_of(
    "moe_mlp_coded",
    f"Tensor dy, {_TENSORS}, Tensor pre, {_INDICES}, bool[] needs, Tensor? place=None",
    *(_backward, _backward_fake),
)


def _flops(rows: int, wide: int, dim: int, activation: str) -> int:
    """Of both products of so many rows, w_in having `wide` rows."""
    return 2 * rows * dim * (wide + wide // (2 if get_activation(activation).gated else 1))


@register_flop_formula(torch.ops.zoo.moe_mlp_coded)
def _forward_flops(x, in_codes, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return _flops(args[6][0], in_codes[1], x[1], args[8])


@register_flop_formula(torch.ops.zoo.moe_mlp_coded_backward)
def _backward_flops(dy, x, in_codes, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return _flops(args[7][0], in_codes[1], x[1], args[9])
