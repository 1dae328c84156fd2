"""SMoP: which of a few soft prompts a sequence gets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import orthogonal_
from .topk import TopKRouter


class SMoPRouter(TopKRouter):
    """The k largest of softmax(z (1 + e)), z = x W^T with e from N(0, 1) in training (SMoP, EMNLP 2023, section 3).

    The noise is relative to the logits, and no gradient goes through its width, as in the authors' code; W starts
    orthogonal. Weights are probabilities, not divided by their sum. x is the mean of a sequence's embeddings: see
    `zoo.moe.PromptMixture`. perturb=False leaves the noise out. Options as in `TopKRouter`, but noise.
    """

    def __init__(self, dim: int, num_experts: int, k: int = 1, *, perturb: bool = True, **options: Any) -> None:
        if options.get("noise"):
            raise ValueError("SMoPRouter: its noise is its own, perturb; leave out noise")
        super().__init__(dim, num_experts, k, **options)
        self.perturb = perturb

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make W orthogonal."""
        super().reset_parameters()
        if not self.weight.is_meta:
            orthogonal_(self.weight)

    def _with_noise(self, logits: Tensor, std: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self.training or not self.perturb:
            return logits, None
        return logits + logits.detach() * torch.randn_like(logits), None
