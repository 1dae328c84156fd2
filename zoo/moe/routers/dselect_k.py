"""DSelect-k: a smooth gate that ends up sparse, without a choice anywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import autocast
from ..auxiliary import AuxiliaryLosses
from ..routing import Routing
from .base import Router
from .context import label_sources


class DSelectKRouter(Router):
    """DSelect-k (2106.03760, section 4): k single-expert selectors in a binary code, mixed by a softmax.

    A selector has m = ceil(log2 E) numbers z, and r(z)_e = prod_j S(z_j) or 1 - S(z_j), as bit j of e is set or not,
    highest bit first. S(t) is the smooth step: 0 below -gamma/2, 1 above gamma/2, -2 t^3 / gamma^3 + 3 t / (2 gamma)
    + 1/2 between. The weights are q = sum_k softmax(w)_k r(z^k). At first every token meets every expert; as the z
    leave the step's middle, each selector settles on one expert, and a token meets k at most.

    z and w are linear in the token (z_weight, z_bias, w_weight, w_bias), or with static=True learnt numbers for all
    tokens (one gate a task: one router a task). z starts in U(-gamma/100, gamma/100), w in U(-0.05, 0.05), Keras'
    default. Losses, in training, are by default selector_entropy with the code's weight 1e-6, which drives selectors to
    settle, and, where E is no power of two, selector_reach with weight 1 (see `zoo.moe.balance`); both are sums over
    tokens. Context: mask [T] or [B, S], False for tokens to leave out.

    Raises ValueError unless k >= 1 and gamma > 0.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 2,
        *,
        static: bool = False,
        gamma: float = 1.0,
        losses: Mapping[str, float | Mapping[str, Any]] | None = None,
        dtype: torch.dtype | None = torch.float32,
    ) -> None:
        super().__init__(dim, num_experts)
        if k < 1 or gamma <= 0:
            raise ValueError(f"DSelectKRouter: k must be at least 1 and gamma positive, got k={k}, gamma={gamma}")
        self.k, self.static, self.gamma, self.dtype = k, static, gamma, dtype
        self.bits = math.ceil(math.log2(num_experts))
        if losses is None:
            losses = {"selector_entropy": 1e-6}
            if num_experts != 2**self.bits:
                losses["selector_reach"] = 1.0
        self.losses = AuxiliaryLosses(losses)
        self.z_weight = None if static else nn.Parameter(torch.empty(k * self.bits, dim))
        self.w_weight = None if static else nn.Parameter(torch.empty(k, dim))
        self.z_bias = nn.Parameter(torch.empty(k * self.bits))
        self.w_bias = nn.Parameter(torch.empty(k))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw what gives z within gamma/100, what gives w within 0.05."""
        for weight, bound in (
            (self.z_weight, self.gamma / 100),
            (self.z_bias, self.gamma / 100),
            (self.w_weight, 0.05),
            (self.w_bias, 0.05),
        ):
            if weight is not None:
                weight.uniform_(-bound, bound)

    def forward(self, x: Tensor, **context: Any) -> Routing:
        """Route tokens x [T, D] or [B, S, D]."""
        # Autocast would round the codes.
        if autocast.is_on(x):
            with autocast.off(x):
                return self.forward(x, **context)
        batch, given = x.shape[0] if x.dim() == 3 else None, x
        x = x.reshape(-1, self.dim).to(x.dtype if x.dtype == torch.float64 else self.dtype or x.dtype)
        mask = context.get("mask")
        if mask is not None:
            mask = mask.reshape(-1).bool()
            x = x.where(mask[:, None], 0)  # nan there would reach the gradient of the weights
        tokens = x.shape[0]
        selectors = self._selectors(x)
        mix = self._linear(x, self.w_weight, self.w_bias).softmax(-1)
        weight = (mix.unsqueeze(-1) * selectors).sum(-2).expand(tokens, -1)
        met = weight > 0
        if mask is not None:
            met = met & mask[:, None]
        routing = Routing.from_matrix(weight, met, probs=weight if mask is None else weight * mask[:, None])
        if self.training and self.losses.terms:
            sources = {
                "selectors": lambda: selectors,
                "probs": lambda: weight,
                "gates": lambda: weight,
                "selected": lambda: met.to(weight.dtype),
                "mask": lambda: mask,
                "k": lambda: self.k,
                **label_sources("DSelectKRouter", context, given, mask),
            }
            sequences = None if batch is None or self.static else (batch, tokens // max(batch, 1))
            routing.losses = self.losses(sources, {"sequence": sequences, "group": None})
        return routing

    def _selectors(self, x: Tensor) -> Tensor:
        """The k selectors of every token [T, K, E], or [1, K, E] where they are the same for all."""
        z = self._linear(x, self.z_weight, self.z_bias).unflatten(-1, (self.k, 1, self.bits))
        step = smooth_step(z, self.gamma)
        # Not a buffer, which a model made on the meta device would be left without.
        expert, bit = torch.arange(self.num_experts, device=x.device), torch.arange(self.bits, device=x.device)
        codes = expert[:, None] // 2 ** (self.bits - 1 - bit) % 2  # ONNX cannot shift
        return torch.where(codes > 0, step, 1 - step).prod(-1)

    def _linear(self, x: Tensor, weight: Tensor | None, bias: Tensor) -> Tensor:
        bias = bias.to(x.dtype)
        return bias[None] if weight is None else F.linear(x, weight.to(x.dtype), bias)

    def extra_repr(self) -> str:
        """Sizes and options for `print(model)`."""
        return f"{self.dim}, num_experts={self.num_experts}, k={self.k}, static={self.static}"


def smooth_step(t: Tensor, gamma: float) -> Tensor:
    """0 below -gamma/2, 1 above gamma/2, and the cubic that joins them smoothly between (2002.07772)."""
    cubic = -2 / gamma**3 * t**3 + 3 / (2 * gamma) * t + 0.5
    return torch.where(t <= -gamma / 2, 0.0, torch.where(t >= gamma / 2, 1.0, cubic)).to(t.dtype)
