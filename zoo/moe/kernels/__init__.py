"""Grouped expert math behind one function, `moe_mlp`, with several backends.

    y[t] = sum over assignments (t, e, w) of  w * (act(x[t] @ w_in[e].T + b_in[e]) @ w_out[e].T + b_out[e])

`reference` defines the result; `cpu`, `grouped_mm` and `triton` compute it fast; `auto` picks one by device and
dtype, and `explain` says which and why.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from . import transformed
from .activations import ACTIVATIONS, Activation, get_activation
from .linear import grouped_linear
from .ops import BACKENDS, CASTS_WEIGHTS, backend_module, check_backend, check_shapes, moe_mlp_op

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "Activation",
    "check_backend",
    "explain",
    "get_activation",
    "grouped_linear",
    "moe_mlp",
]


class Assignments(Protocol):
    """What `moe_mlp` reads of a routing decision (see `zoo.moe.Routing`)."""

    token_index: Tensor
    offsets: Tensor
    weight: Tensor
    # And optionally place [T, K] int32, the assignment of each choice, where every token has as many.


def explain(x: Tensor, w_in: Tensor, w_out: Tensor, activation: str = "swiglu") -> tuple[str, str]:
    """The backend that `auto` takes for these tensors, and the reason in words."""
    order = ("triton", "grouped_mm") if x.is_cuda else ("cpu",) if x.device.type == "cpu" else ()
    passed_over: list[str] = []
    for name in order:
        reason = backend_module(name).unsupported(x, w_in, w_out, activation)
        if reason is None:
            why = f"fastest backend for {x.dtype} on {x.device.type}"
            return name, "; ".join([why, *passed_over])
        passed_over.append(f"not {name}: {reason}")
    return "reference", "; ".join([f"no faster backend for {x.dtype} on {x.device.type}", *passed_over])


def moe_mlp(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    routing: Assignments,
    activation: str = "swiglu",
    backend: str = "auto",
    *,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
) -> Tensor:
    """Send tokens x [T, D] through their experts and sum the weighted results into [T, D].

    w_in [E, 2F, D] as [gate; up] for gated activations, [E, F, D] for plain ones; w_out [E, D, F]; biases
    b_in [E, 2F or F] and b_out [E, D]. `routing` gives token_index [A] sorted by expert, offsets [E+1] and the
    combine weights [A]. Under autocast x, weights and biases are computed in the autocast dtype. Differentiable as
    often as wanted: gradients of gradients, forward mode and torch.func's transforms run on a plain composition on
    which `backend` has no say.

    Raises ValueError on an unknown activation or backend, on shapes that do not fit, and when a backend named
    explicitly cannot run these tensors.
    """
    check_backend(backend)
    check_shapes(x, w_in, w_out, b_in, b_out, activation)
    device = x.device.type
    # The meta device knows no autocast; torch.amp.is_autocast_available would break the graph in torch 2.11.
    autocast = device != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(device)
    if autocast:
        x = x.to(torch.get_autocast_dtype(device))
    elif not x.dtype == w_in.dtype == w_out.dtype:
        raise ValueError(f"moe_mlp: x, w_in and w_out must share a dtype, got {x.dtype}, {w_in.dtype}, {w_out.dtype}")
    if backend == "auto":
        backend = explain(x, w_in, w_out, activation)[0]
    elif reason := backend_module(backend).unsupported(x, w_in, w_out, activation):
        raise ValueError(f"backend {backend!r} cannot run this: {reason}")
    if autocast and backend not in CASTS_WEIGHTS:
        w_in, w_out = w_in.to(x.dtype), w_out.to(x.dtype)
        b_in, b_out = (b if b is None else b.to(x.dtype) for b in (b_in, b_out))
    indices = routing.token_index, routing.offsets
    if transformed.is_active():
        return transformed.moe_mlp(x, w_in, w_out, b_in, b_out, routing.weight, *indices, activation)
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, w_in, w_out, b_in, b_out, routing.weight)
    )
    place = getattr(routing, "place", None)
    y, _ = moe_mlp_op(x, w_in, w_out, b_in, b_out, routing.weight, *indices, activation, backend, needs_grad, place)
    return y
