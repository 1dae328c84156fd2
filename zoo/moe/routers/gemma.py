"""Gemma 4's gate: it normalises what it reads, and each expert has a factor of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..routing import Routing
from .topk import TopKRouter


class Gemma4Router(TopKRouter):
    """Softmax gate over u = s * x / rms(x) / sqrt(D), with weights g_e = c_e p_e / (sum of the chosen p) (Gemma 4).

    As the code of transformers' gemma4, whose names for s [D] and c [E] are scale and per_expert_scale; both start at
    one, and eps is added to the mean square. Weights are normalised unless normalize=False; options are `TopKRouter`'s.

    Context: mask, and `seen` [T, D] or [B, S, D], what the gate reads in place of the experts' tokens: in Gemma 4 the
    residual stream, before the norm that the experts have.
    """

    of_tokens = ("scale_in",)

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 2,
        *,
        eps: float = 1e-6,
        losses: Mapping[str, float | Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> None:
        self.eps = eps
        super().__init__(dim, num_experts, k, losses=losses, **{"normalize": True, "normalize_eps": 0.0, **options})
        self.scale_in = nn.Parameter(torch.ones(dim))
        self.expert_scale = nn.Parameter(torch.ones(num_experts))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W as `TopKRouter` does, ones for the scales."""
        super().reset_parameters()
        for name in ("scale_in", "expert_scale"):
            if name in self._parameters:
                self._parameters[name].fill_(1.0)  # type: ignore[union-attr]

    def forward(self, x: Tensor, **context: Any) -> Routing:
        """Route tokens x [T, D] or [B, S, D], by what the context says is `seen` of them."""
        seen = context.pop("seen", None)
        return super().forward(x if seen is None else seen.reshape(x.shape), **context)

    def _logits(self, x: Tensor, **context: Any) -> Tensor:
        u = x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return super()._logits(u * self.scale_in.to(x.dtype) * self.dim**-0.5, **context)

    def _choose(self, scores: Tensor, preference: Tensor | None = None) -> tuple[Tensor, Tensor]:
        expert, weight = super()._choose(scores, preference)
        return expert, weight * self.expert_scale.to(weight.dtype)[expert]
