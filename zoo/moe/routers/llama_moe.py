"""LLaMA-MoE: noisy top-k for the pieces of LLaMA's MLPs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .topk import TopKRouter

# The authors' CV^2 takes the unbiased variance.
LOSSES = {name: {"weight": 1e-2, "correction": 1} for name in ("importance", "load")}


class LLaMAMoERouter(TopKRouter):
    """LLaMA-MoE (2406.16554): Shazeer's noisy top-k, the softmax over the k chosen logits.

    Logits are W_2 tanh(W_1 x) with W_1 [E, D] (`weight`) and W_2 [E, E] (`out`), the "mlp" network of the published
    models, or x W^T with W starting at zero ("linear"); none has a bias. Noise of learned width, and the losses 1e-2
    (CV^2 importance + CV^2 load); the code compares the noise alone with the load's threshold, where Shazeer's
    equation, and this, compares the noisy logit. `zoo.split` multiplies what experts give by E/k. k is 4 (of 16).
    Other options as in `TopKRouter`, but bias.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 4,
        *,
        network: Literal["mlp", "linear"] = "mlp",
        noise: Literal["fixed", "learned"] | None = "learned",
        losses: Mapping[str, float | Mapping[str, Any]] | None = LOSSES,
        **options: Any,
    ) -> None:
        if network not in ("mlp", "linear"):
            raise ValueError(f"LLaMAMoERouter: network must be 'mlp' or 'linear', got {network!r}")
        if options.get("bias"):
            raise ValueError("LLaMAMoERouter: its logits have no bias")
        options = {"score": "softmax_topk", **options}
        super().__init__(dim, num_experts, k, noise=noise, losses=losses, **options)
        self.network = network
        self.out = nn.Parameter(torch.empty(num_experts, num_experts)) if network == "mlp" else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W_1 and W_2 uniformly within 1/sqrt(fan in), or zero W; zero the noise's matrix."""
        super().reset_parameters()
        out = getattr(self, "out", None)
        bound = 0.0 if out is None else 1 / math.sqrt(self.dim)
        self.weight.uniform_(-bound, bound)
        if out is not None:
            out.uniform_(-1 / math.sqrt(self.num_experts), 1 / math.sqrt(self.num_experts))

    @property
    def plain(self) -> bool:
        """As in `TopKRouter`: with the linear network."""
        return self.out is None

    def _logits(self, x: Tensor, **context: Any) -> Tensor:
        logits = super()._logits(x, **context)
        return logits if self.out is None else F.linear(logits.tanh(), self.out.to(x.dtype))
