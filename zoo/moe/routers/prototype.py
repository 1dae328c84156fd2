"""Expert prototyping: several independent top-1 gates side by side instead of one top-k gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .scores import shares
from .topk import TopKRouter


class PrototypeRouter(TopKRouter):
    """M6-T (2105.15082, expert prototyping): experts in k groups, a softmax and a top-1 choice in each, outputs summed.

    Group j has the experts j E/k .. (j+1) E/k - 1; y = sum_j p_je f_je(x), e the best of the group and p the softmax
    over the group alone. For losses and telemetry the k distributions count 1/k each. Capacity knows no first and
    second choice here: with drop="choice" groups claim in order, but never the same expert. Other options as in
    `TopKRouter`, but sigmoid scores and groups to choose from.

    Raises ValueError when the experts do not split into k groups.
    """

    def __init__(self, dim: int, num_experts: int, k: int = 2, **options: Any) -> None:
        if k < 1 or num_experts % k:
            raise ValueError(f"PrototypeRouter: {num_experts} experts do not split into k={k} groups")
        for name in ("score", "num_groups", "group_topk", "group_score"):
            if name in options:
                raise ValueError(f"PrototypeRouter: {name} has no meaning where each group has its softmax")
        super().__init__(dim, num_experts, k, **options)
        self.score = "softmax per group"  # type: ignore[assignment]

    def _scores(self, logits: Tensor) -> Tensor:
        return logits.unflatten(-1, (self.k, -1)).softmax(-1).flatten(-2)

    def _probs(self, logits: Tensor) -> Tensor:
        return self._scores(logits) / self.k

    def _choose(self, scores: Tensor, preference: Tensor | None = None) -> tuple[Tensor, Tensor]:
        choice = scores.detach() if self.selection_bias is None else scores.detach() + self.selection_bias
        inside = choice.unflatten(-1, (self.k, -1)).argmax(-1)
        expert = inside + torch.arange(self.k, device=scores.device) * (self.num_experts // self.k)
        weight = scores.gather(-1, expert)
        if self.normalize:
            weight = shares(weight, self.normalize_eps)
        return expert, weight
