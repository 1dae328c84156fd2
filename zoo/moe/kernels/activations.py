"""Activations an expert may use: forward and derivative, from pre-activations to hidden units.

A gated activation reads pre-activations [A, 2F] laid out as [gate; up] and gives [A, F]; a plain one keeps
the width. A gated one called "name:L" clamps its gate to at most L and its other factor to [-L, L] before they meet:
"swiglu:10" is DeepSeek-V4's. `backward` takes the gradient of the hidden units and gives that of the pre-activations.
The forms with `out` write into buffers of the caller with as few passes as torch's operators allow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten

# gpt-oss: gate clamped from above, up clamped from both sides, sigmoid sharpened by 1.702, up shifted by one.
CLAMP_LIMIT = 7.0
CLAMP_ALPHA = 1.702


@dataclass(frozen=True)
class Pointwise:
    """A function of one variable: `f`, its derivative `df`, and both written into a buffer.

    `into(x, out=)` stores f(x); `vjp_into(grad, x, out)` stores grad * f'(x), where grad may be out itself.
    """

    f: Callable[[Tensor], Tensor]
    df: Callable[[Tensor], Tensor]
    into: Callable[..., Tensor]
    vjp_into: Callable[[Tensor, Tensor, Tensor], Tensor]


def _silu_grad(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _gelu_grad(x: Tensor) -> Tensor:
    cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    return cdf + x * torch.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_tanh_grad(x: Tensor) -> Tensor:
    c = math.sqrt(2 / math.pi)
    t = torch.tanh(c * (x + 0.044715 * x * x * x))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)


def _relu_grad(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _relu2_grad(x: Tensor) -> Tensor:
    return 2 * F.relu(x)


def _sharp_silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(CLAMP_ALPHA * x)


def _sharp_silu_grad(x: Tensor) -> Tensor:
    s = torch.sigmoid(CLAMP_ALPHA * x)
    return s * (1 + CLAMP_ALPHA * x * (1 - s))


SILU = Pointwise(
    F.silu, _silu_grad, aten.silu.out, lambda g, x, out: aten.silu_backward.grad_input(g, x, grad_input=out)
)
GELU = Pointwise(
    F.gelu, _gelu_grad, aten.gelu.out, lambda g, x, out: aten.gelu_backward.grad_input(g, x, grad_input=out)
)
GELU_TANH = Pointwise(
    _gelu_tanh,
    _gelu_tanh_grad,
    lambda x, out: aten.gelu.out(x, approximate="tanh", out=out),
    lambda g, x, out: aten.gelu_backward.grad_input(g, x, approximate="tanh", grad_input=out),
)
RELU = Pointwise(
    F.relu,
    _relu_grad,
    lambda x, out: torch.clamp_min(x, 0, out=out),
    lambda g, x, out: aten.threshold_backward.grad_input(g, x, 0, grad_input=out),
)
RELU2 = Pointwise(
    _relu2,
    _relu2_grad,
    lambda x, out: torch.square(F.relu(x), out=out),
    lambda g, x, out: torch.mul(g, _relu2_grad(x), out=out),
)
SHARP_SILU = Pointwise(
    _sharp_silu,
    _sharp_silu_grad,
    lambda x, out: torch.mul(x, torch.sigmoid(CLAMP_ALPHA * x), out=out),
    lambda g, x, out: torch.mul(g, _sharp_silu_grad(x), out=out),
)


@dataclass(frozen=True)
class Activation:
    """One entry of the table: `point` acts element by element on the gate (or on the only input).

    limit: what gate and up are clamped at, None for nothing; shifted: one is added to up afterwards.
    """

    name: str
    gated: bool
    point: Pointwise
    limit: float | None = None
    shifted: bool = False

    @property
    def plain(self) -> bool:
        """Whether a gated activation is no more than f(gate) * up."""
        return self.limit is None and not self.shifted

    def _split(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = pre.chunk(2, dim=-1)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate, up + 1 if self.shifted else up

    def forward(self, pre: Tensor) -> Tensor:
        """Hidden units [A, F] of pre-activations [A, 2F] (gated) or [A, F] (plain)."""
        if not self.gated:
            return self.point.f(pre)
        gate, up = self._split(pre)
        return self.point.f(gate) * up

    def backward(self, pre: Tensor, grad: Tensor) -> Tensor:
        """Gradient of the pre-activations [A, 2F] or [A, F], given that of the hidden units [A, F]."""
        if not self.gated:
            return grad * self.point.df(pre)
        gate, up = self._split(pre)
        d_gate, d_up = grad * up * self.point.df(gate), grad * self.point.f(gate)
        if self.limit is not None:
            raw_gate, raw_up = pre.chunk(2, dim=-1)
            d_gate, d_up = d_gate * (raw_gate <= self.limit), d_up * (raw_up.abs() <= self.limit)
        return torch.cat([d_gate, d_up], dim=-1)

    def forward_out(self, pre: Tensor, out: Tensor, point_out: Tensor | None = None) -> None:
        """Write the hidden units into out [A, F], and f(gate) into point_out [A, F] where it is given."""
        if not self.gated:
            self.point.into(pre, out=out)
            return
        gate, up = self._split(pre)
        f_gate = out if point_out is None else point_out
        self.point.into(gate, out=f_gate)
        torch.mul(f_gate, up, out=out)

    def backward_out(self, pre: Tensor, grad: Tensor, point_out: Tensor, out: Tensor) -> None:
        """Write the gradient of the pre-activations into out [A, 2F or F]; overwrites grad [A, F].

        point_out [A, F] is what `forward_out` left there (not read for a plain activation).
        """
        if not self.gated:
            self.point.vjp_into(grad, pre, out)
            return
        gate, up = self._split(pre)
        d_gate, d_up = out.chunk(2, dim=-1)
        torch.mul(grad, point_out, out=d_up)
        self.point.vjp_into(grad.mul_(up), gate, d_gate)
        if self.limit is not None:
            raw_gate, raw_up = pre.chunk(2, dim=-1)
            d_gate.masked_fill_(raw_gate > self.limit, 0)
            d_up.masked_fill_(raw_up.abs() > self.limit, 0)


ACTIVATIONS: dict[str, Activation] = {
    a.name: a
    for a in (
        Activation("swiglu", True, SILU),
        Activation("geglu", True, GELU),
        Activation("geglu_tanh", True, GELU_TANH),
        Activation("reglu", True, RELU),
        Activation("swiglu_clamped", True, SHARP_SILU, limit=CLAMP_LIMIT, shifted=True),
        Activation("relu", False, RELU),
        Activation("relu2", False, RELU2),
        Activation("gelu", False, GELU),
        Activation("gelu_tanh", False, GELU_TANH),
        Activation("silu", False, SILU),
        Activation("quick_gelu", False, SHARP_SILU),  # CLIP's
    )
}


def get_activation(name: str) -> Activation:
    """The activation called `name`, or "name:limit" (see the module).

    Raises ValueError that lists the known ones, or for a limit that is no positive number or of a plain activation.
    """
    base, colon, limit = name.partition(":")
    if base not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")
    known = ACTIVATIONS[base]
    if not colon:
        return known
    try:
        found = float(limit)
    except ValueError:
        found = 0.0
    if not known.gated or not 0 < found < math.inf:
        raise ValueError(f"activation {name!r}: expected a gated one and a limit above 0, as in 'swiglu:10'")
    return replace(known, name=name, limit=found)
