"""The expert computation as one registered operator, whichever backend runs it.

As operators `zoo::moe_mlp` and `zoo::moe_mlp_backward` it is opaque to torch.compile (no graph break), counted
by FLOP counters, and recomputed or saved as a unit by activation checkpointing. Saved for the backward: the
inputs and the pre-activations, nothing else.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .activations import get_activation

BACKENDS = ("reference", "cpu", "grouped_mm", "triton")


def backend_module(name: str) -> ModuleType:
    """The module that implements backend `name`, imported on first use."""
    return importlib.import_module(f"{__package__}.{name}")


@torch.library.custom_op("zoo::moe_mlp", mutates_args=())
def moe_mlp_op(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    weight: Tensor,
    token_index: Tensor,
    offsets: Tensor,
    activation: str,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs [T, D] and the pre-activations [A, H] kept for the backward (empty unless `save`)."""
    return backend_module(backend).forward(
        x, w_in, w_out, b_in, b_out, weight, token_index, offsets, activation, save
    )


@moe_mlp_op.register_fake
def _(x, w_in, w_out, b_in, b_out, weight, token_index, offsets, activation, backend, save):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), x.new_empty(token_index.shape[0] if save else 0, w_in.shape[1])


@torch.library.custom_op("zoo::moe_mlp_backward", mutates_args=())
def moe_mlp_backward_op(
    dy: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    weight: Tensor,
    pre: Tensor,
    token_index: Tensor,
    offsets: Tensor,
    activation: str,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, w_in, w_out, b_in, b_out, weight; an empty tensor for each that is not needed."""
    return backend_module(backend).backward(
        dy, x, w_in, w_out, b_in, b_out, weight, pre, token_index, offsets, activation, needs
    )


@moe_mlp_backward_op.register_fake
def _(dy, x, w_in, w_out, b_in, b_out, weight, pre, token_index, offsets, activation, backend, needs):  # type: ignore[no-untyped-def]
    inputs = (x, w_in, w_out, b_in, b_out, weight)
    return [torch.empty_like(t) if t is not None and n else x.new_empty(0) for t, n in zip(inputs, needs)]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, w_in, w_out, b_in, b_out, weight, token_index, offsets, activation, backend, _ = inputs
    ctx.save_for_backward(x, w_in, w_out, b_in, b_out, weight, output[1], token_index, offsets)
    ctx.activation, ctx.backend = activation, backend
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dy, _):  # type: ignore[no-untyped-def]
    x, w_in, w_out, b_in, b_out, weight, pre, token_index, offsets = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:6])
    grads = moe_mlp_backward_op(
        dy, x, w_in, w_out, b_in, b_out, weight, pre, token_index, offsets, ctx.activation, ctx.backend, needs
    )
    return (*(g if n else None for g, n in zip(grads, needs)), None, None, None, None, None)


moe_mlp_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.zoo.moe_mlp)
def _forward_flops(x, w_in, w_out, b_in, b_out, weight, token_index, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 2 * token_index[0] * (w_in[1] * w_in[2] + w_out[1] * w_out[2])


@register_flop_formula(torch.ops.zoo.moe_mlp_backward)
def _backward_flops(dy, x, w_in, w_out, b_in, b_out, weight, pre, token_index, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 4 * token_index[0] * (w_in[1] * w_in[2] + w_out[1] * w_out[2])


def check_shapes(x: Tensor, w_in: Tensor, w_out: Tensor, b_in: Tensor | None, b_out: Tensor | None, activation: str) -> None:
    """Raise ValueError naming the first tensor whose shape does not fit the others."""
    if x.dim() != 2:
        raise ValueError(f"moe_mlp: x must be [T, D], got {list(x.shape)}")
    if w_in.dim() != 3 or w_out.dim() != 3:
        raise ValueError(f"moe_mlp: w_in and w_out must be [E, H, D] and [E, D, F], got {list(w_in.shape)} and {list(w_out.shape)}")
    experts, width, hidden = w_out.shape[0], x.shape[1], w_out.shape[2]
    rows = 2 * hidden if get_activation(activation).gated else hidden
    for name, tensor, want in (
        ("w_in", w_in, [experts, rows, width]),
        ("w_out", w_out, [experts, width, hidden]),
        ("b_in", b_in, [experts, rows]),
        ("b_out", b_out, [experts, width]),
    ):
        if tensor is not None and list(tensor.shape) != want:
            raise ValueError(f"moe_mlp: {name} must be {want} for activation {activation!r}, got {list(tensor.shape)}")
