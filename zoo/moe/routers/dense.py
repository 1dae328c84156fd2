"""Dense gates: every expert computes every token, in training at least."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..routing import Routing
from .linear import LinearRouter


class DenseRouter(LinearRouter):
    """Classic mixture of experts (Jacobs et al. 1991): y = sum_e softmax(x W^T)_e f_e(x), over all experts.

    With eval_k or eval_threshold it is DS-MoE (2404.05567): trained dense, and outside training sparse, either the
    eval_k experts of largest weight or those whose weight is above eval_threshold, and always the best one. Weights
    stay the full softmax's, not divided by their sum. DS-MoE trains with losses={"mutual_information": 1e-3}: every
    token sure, and all experts used alike.

    Context: mask. Raises ValueError when both are given, and for a number that does not fit.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        eval_k: int | None = None,
        eval_threshold: float | None = None,
        losses: Mapping[str, float | Mapping[str, Any]] | None = None,
        dtype: torch.dtype | None = torch.float32,
    ) -> None:
        super().__init__(dim, num_experts, losses=losses, dtype=dtype)
        if eval_k is not None and eval_threshold is not None:
            raise ValueError("DenseRouter: eval_k and eval_threshold exclude each other")
        if eval_k is not None and not 1 <= eval_k <= num_experts:
            raise ValueError(f"DenseRouter: eval_k must be between 1 and num_experts={num_experts}, got {eval_k}")
        if eval_threshold is not None and not 0 <= eval_threshold < 1:
            raise ValueError(f"DenseRouter: eval_threshold must be in [0, 1), got {eval_threshold}")
        self.eval_k, self.eval_threshold = eval_k, eval_threshold

    @property
    def k(self) -> int:
        """How many experts a token meets: all in training, eval_k outside, where that is set."""
        return self.num_experts if self.training else self.eval_k or self.num_experts

    def route(self, logits: Tensor, mask: Tensor | None = None, **context: Any) -> Routing:
        """Decide from logits [T, E] or [B, S, E]."""
        logits, mask, split = self._flat(logits, mask)
        probs = logits.softmax(-1)
        everywhere = torch.ones_like(probs, dtype=torch.bool)
        losses = self._losses(logits, probs, everywhere, mask, split, context)
        if not self.training and self.eval_k is not None:
            weight, expert = probs.topk(self.eval_k, dim=-1)
            keep = None if mask is None else mask[:, None].expand_as(expert)
            asked = self.eval_k if mask is None else self.eval_k * mask
            return Routing.from_choices(expert, weight, self.num_experts, keep=keep, probs=probs, asked=asked)
        if not self.training and self.eval_threshold is not None:
            kept = (probs > self.eval_threshold) | (probs == probs.amax(-1, keepdim=True))
            kept = kept if mask is None else kept & mask[:, None]
            return Routing.from_matrix(probs, kept, probs=probs, asked=kept.sum(-1))
        return to_all(probs, mask, losses=losses, probs=probs)


def to_all(weight: Tensor, mask: Tensor | None = None, **extra: Any) -> Routing:
    """The routing of every token to all experts, with weights [T, E]; mask [T] is False for tokens to leave out."""
    tokens, experts = weight.shape
    if mask is not None:
        kept = mask[:, None].expand_as(weight)
        return Routing.from_matrix(weight, kept, asked=experts * mask, **extra)
    index = torch.arange(tokens, device=weight.device).repeat(experts)
    offsets = torch.arange(experts + 1, dtype=torch.int32, device=weight.device) * tokens
    return Routing(index, offsets, weight.T.reshape(-1), tokens, asked=experts, **extra)
