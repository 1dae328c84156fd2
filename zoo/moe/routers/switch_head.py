"""SwitchHead: several top-k gates side by side, one a head, with sigmoid scores that do not compete."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .scores import shares
from .topk import TopKRouter


class SwitchHeadRouter(TopKRouter):
    """SwitchHead (2312.07987): of each head's experts the k with the largest sigmoid(x W^T), weighed by it.

    num_experts are those of all heads together, head h having h E/H .. (h+1) E/H - 1; a token meets k num_heads of
    them. Scores are not divided by their sum, and there is no loss by default. expert_dropout is how likely an expert
    is left out of the choice in training (the authors' code; 0 in the paper). Other options as in `TopKRouter`, but
    score and groups to choose from.

    Raises ValueError when the experts do not split into heads of at least k.
    """

    def __init__(
        self, dim: int, num_experts: int, k: int = 2, *, num_heads: int = 1, expert_dropout: float = 0.0, **options: Any
    ) -> None:
        if num_heads < 1 or num_experts % num_heads or not 1 <= k <= num_experts // num_heads:
            raise ValueError(
                f"SwitchHeadRouter: {num_experts} experts do not split into num_heads={num_heads} of at least k={k}"
            )
        if not 0 <= expert_dropout < 1:
            raise ValueError(f"SwitchHeadRouter: expert_dropout must be at least 0 and below 1, got {expert_dropout}")
        for name in ("score", "num_groups", "group_topk", "group_score"):
            if name in options:
                raise ValueError(f"SwitchHeadRouter: {name} has no meaning where each head has its sigmoid gate")
        super().__init__(dim, num_experts, k * num_heads, score="sigmoid", **options)
        self.num_heads, self.expert_dropout = num_heads, expert_dropout

    def _preference(self, logits: Tensor, mask: Tensor | None) -> Tensor | None:
        if not self.training or not self.expert_dropout:
            return None
        return logits.detach().masked_fill(torch.rand_like(logits) < self.expert_dropout, float("-inf"))

    def _choose(self, scores: Tensor, preference: Tensor | None = None) -> tuple[Tensor, Tensor]:
        choice = scores.detach() if preference is None else preference
        if self.selection_bias is not None:
            choice = choice + self.selection_bias
        per_head = self.num_experts // self.num_heads
        inside = choice.unflatten(-1, (self.num_heads, per_head)).topk(self.k // self.num_heads, dim=-1).indices
        expert = (inside + per_head * torch.arange(self.num_heads, device=scores.device).unsqueeze(-1)).flatten(-2)
        weight = scores.gather(-1, expert)
        if self.normalize:
            weight = shares(weight, self.normalize_eps)
        return expert, weight
