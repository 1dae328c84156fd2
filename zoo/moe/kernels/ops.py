"""The expert computation as one registered operator, whichever backend runs it.

As operators `zoo::moe_mlp` and `zoo::moe_mlp_backward` it is opaque to torch.compile (no graph break), counted
by FLOP counters, and recomputed or saved as a unit by activation checkpointing. Saved for the backward: the
inputs and the pre-activations, nothing else. Outputs are contiguous, gradients of weights laid out like them.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import transformed
from .activations import get_activation
from .register import backward_of, operator

BACKENDS = ("reference", "cpu", "grouped_mm", "triton")
# These read weights of another dtype than x's and cast one expert at a time; the others want one dtype.
CASTS_WEIGHTS = ("reference", "cpu")


def backend_module(name: str) -> ModuleType:
    """The module that implements backend `name`, imported on first use."""
    # Statements, because torch.compile traces them and breaks the graph at importlib.
    if name == "reference":
        from . import reference

        return reference
    if name == "cpu":
        from . import cpu

        return cpu
    if name == "grouped_mm":
        from . import grouped_mm

        return grouped_mm
    from . import triton

    return triton


def check_backend(name: str) -> None:
    """Raise ValueError for a backend that is neither "auto" nor a known one."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; known: auto, {', '.join(BACKENDS)}")


def _places(backend: str, place: Tensor | None) -> dict[str, Tensor | None]:
    """The row of each choice [T, K], for the backend that knows what to do with it."""
    return {"place": place} if backend == "triton" else {}


def _forward(  # type: ignore[no-untyped-def]
    x, w_in, w_out, b_in, b_out, weight, token_index, offsets, activation, backend, save, place=None
):
    """Outputs [T, D] and the pre-activations [A, H] kept for the backward (empty unless `save`)."""
    y, pre = backend_module(backend).forward(
        x, w_in, w_out, b_in, b_out, weight, token_index, offsets, activation, save, **_places(backend, place)
    )
    return y.contiguous(), pre


def _forward_fake(  # type: ignore[no-untyped-def]
    x, w_in, w_out, b_in, b_out, weight, token_index, offsets, activation, backend, save, place=None
):
    rows = token_index.shape[0]
    if backend == "cpu":
        rows = backend_module(backend).kept_rows(rows, w_in.shape[0], x.dtype)
    return x.new_empty(x.shape), x.new_empty(rows if save else 0, w_in.shape[1])


def _backward(  # type: ignore[no-untyped-def]
    dy, x, w_in, w_out, b_in, b_out, weight, pre, token_index, offsets, activation, backend, needs, place=None
):
    """Gradients of x, w_in, w_out, b_in, b_out, weight; an empty tensor for each that is not needed."""
    grads = backend_module(backend).backward(
        dy,
        *(x, w_in, w_out, b_in, b_out, weight, pre, token_index, offsets, activation, needs),
        **_places(backend, place),
    )
    inputs = (x, w_in, w_out, b_in, b_out, weight)
    grads = [g if n and t is not None else x.new_empty(0) for g, n, t in zip(grads, needs, inputs)]
    return [grads[0], *(_laid_like(g, t) for g, t in zip(grads[1:5], inputs[1:5])), grads[5]]


def _laid_like(grad: Tensor, weight: Tensor | None) -> Tensor:
    """A gradient laid out as compiled code, which sees `_backward_fake`, expects it."""
    if weight is None or not grad.numel() or grad.stride() == torch.empty_like(weight, device="meta").stride():
        return grad
    return torch.empty_like(weight).copy_(grad)


def _backward_fake(  # type: ignore[no-untyped-def]
    dy, x, w_in, w_out, b_in, b_out, weight, pre, token_index, offsets, activation, backend, needs, place=None
):
    like = (x.new_empty(x.shape), *(t if t is None else torch.empty_like(t) for t in (w_in, w_out, b_in, b_out)))
    return [
        t if n and t is not None else x.new_empty(0) for t, n in zip((*like, weight.new_empty(weight.shape)), needs)
    ]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, w_in, w_out, b_in, b_out, weight, token_index, offsets, activation, backend, _, place = inputs
    ctx.save_for_backward(x, w_in, w_out, b_in, b_out, weight, output[1], token_index, offsets, place)
    ctx.activation, ctx.backend = activation, backend
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else a zero gradient as large as the pre-activations is made


def _differentiate(ctx, dy, _):  # type: ignore[no-untyped-def]
    if dy is None:
        return (None,) * 12
    *saved, place = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:6])
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph: these are to have gradients too
        *inputs, weight, _, token_index, offsets = saved
        composed = partial(transformed.moe_mlp, token_index=token_index, offsets=offsets, activation=ctx.activation)
        return (*transformed.gradients(composed, (*inputs, weight), needs, dy), *(None,) * 6)
    grads = moe_mlp_backward_op(dy, *saved, ctx.activation, ctx.backend, needs, place)
    return (*(g if n else None for g, n in zip(grads, needs)), *(None,) * 6)


_TENSORS = "Tensor x, Tensor w_in, Tensor w_out, Tensor? b_in, Tensor? b_out, Tensor weight"
_INDICES = "Tensor token_index, Tensor offsets, str activation, str backend"
moe_mlp_op = operator(
    f"moe_mlp({_TENSORS}, {_INDICES}, bool save, Tensor? place=None) -> (Tensor, Tensor)",
    *(_forward, _forward_fake, _differentiate, _setup_context),
)
moe_mlp_backward_op = backward_of(
    "moe_mlp",
    f"Tensor dy, {_TENSORS}, Tensor pre, {_INDICES}, bool[] needs, Tensor? place=None",
    _backward,
    _backward_fake,
)


@register_flop_formula(torch.ops.zoo.moe_mlp)
def _forward_flops(x, w_in, w_out, b_in, b_out, weight, token_index, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 2 * token_index[0] * (w_in[1] * w_in[2] + w_out[1] * w_out[2])


@register_flop_formula(torch.ops.zoo.moe_mlp_backward)
def _backward_flops(dy, x, w_in, w_out, b_in, b_out, weight, pre, token_index, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    of_x, of_in, of_out, of_b_in, _, of_weight = (int(need) for need in args[3])
    hidden = of_x or of_in or of_b_in or of_weight  # gradients that go through the activation
    return 2 * token_index[0] * (w_in[1] * w_in[2] * (of_x + of_in) + w_out[1] * w_out[2] * (hidden + of_out))


def check_shapes(
    x: Tensor, w_in: Tensor, w_out: Tensor, b_in: Tensor | None, b_out: Tensor | None, activation: str
) -> None:
    """Raise ValueError naming the first tensor whose shape does not fit the others, or that is elsewhere."""
    if x.dim() != 2:
        raise ValueError(f"moe_mlp: x must be [T, D], got {list(x.shape)}")
    if w_in.dim() != 3 or w_out.dim() != 3:
        raise ValueError(
            f"moe_mlp: w_in and w_out must be [E, H, D] and [E, D, F], got {list(w_in.shape)} and {list(w_out.shape)}"
        )
    experts, width, hidden = w_out.shape[0], x.shape[1], w_out.shape[2]
    rows = 2 * hidden if get_activation(activation).gated else hidden
    for name, tensor, want in (
        ("w_in", w_in, (experts, rows, width)),
        ("w_out", w_out, (experts, width, hidden)),
        ("b_in", b_in, (experts, rows)),
        ("b_out", b_out, (experts, width)),
    ):
        if tensor is None:
            continue
        if tensor.shape != want:
            raise ValueError(
                f"moe_mlp: {name} must be {list(want)} for activation {activation!r}, got {list(tensor.shape)}"
            )
        if tensor.device != x.device:  # a kernel would read what is not there
            raise ValueError(f"moe_mlp: x is on {x.device}, but {name} on {tensor.device}")
