"""Activations an expert may use: forward and derivative, from pre-activations to hidden units.

A gated activation reads pre-activations [A, 2F] laid out as [gate; up] and gives [A, F]; a plain one keeps
the width. `backward` takes the gradient of the hidden units and gives that of the pre-activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# gpt-oss: gate clamped from above, up clamped from both sides, sigmoid sharpened by 1.702, up shifted by one.
CLAMP_LIMIT = 7.0
CLAMP_ALPHA = 1.702


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


@dataclass(frozen=True)
class Activation:
    """One entry of the table: `f` and `df` act element by element on the gate (or on the only input)."""

    name: str
    gated: bool
    f: Callable[[Tensor], Tensor]
    df: Callable[[Tensor], Tensor]
    clamped: bool = False

    def forward(self, pre: Tensor) -> Tensor:
        """Hidden units [A, F] of pre-activations [A, 2F] (gated) or [A, F] (plain)."""
        if not self.gated:
            return self.f(pre)
        gate, up = pre.chunk(2, dim=-1)
        if self.clamped:
            gate = gate.clamp(max=CLAMP_LIMIT)
            up = up.clamp(-CLAMP_LIMIT, CLAMP_LIMIT) + 1
        return self.f(gate) * up

    def backward(self, pre: Tensor, grad: Tensor) -> Tensor:
        """Gradient of the pre-activations [A, 2F] or [A, F], given that of the hidden units [A, F]."""
        if not self.gated:
            return grad * self.df(pre)
        gate, up = pre.chunk(2, dim=-1)
        if not self.clamped:
            return torch.cat([grad * up * self.df(gate), grad * self.f(gate)], dim=-1)
        gate_c, up_c = gate.clamp(max=CLAMP_LIMIT), up.clamp(-CLAMP_LIMIT, CLAMP_LIMIT)
        d_gate = grad * (up_c + 1) * self.df(gate_c) * (gate <= CLAMP_LIMIT)
        d_up = grad * self.f(gate_c) * (up.abs() <= CLAMP_LIMIT)
        return torch.cat([d_gate, d_up], dim=-1)


def _sharp_silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(CLAMP_ALPHA * x)


def _sharp_silu_grad(x: Tensor) -> Tensor:
    s = torch.sigmoid(CLAMP_ALPHA * x)
    return s * (1 + CLAMP_ALPHA * x * (1 - s))


ACTIVATIONS: dict[str, Activation] = {
    a.name: a
    for a in (
        Activation("swiglu", True, F.silu, _silu_grad),
        Activation("geglu", True, F.gelu, _gelu_grad),
        Activation("geglu_tanh", True, _gelu_tanh, _gelu_tanh_grad),
        Activation("reglu", True, F.relu, _relu_grad),
        Activation("swiglu_clamped", True, _sharp_silu, _sharp_silu_grad, clamped=True),
        Activation("relu", False, F.relu, _relu_grad),
        Activation("relu2", False, _relu2, _relu2_grad),
        Activation("gelu", False, F.gelu, _gelu_grad),
        Activation("gelu_tanh", False, _gelu_tanh, _gelu_tanh_grad),
        Activation("silu", False, F.silu, _silu_grad),
    )
}


def get_activation(name: str) -> Activation:
    """The activation called `name`; raises ValueError that lists the known ones."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
