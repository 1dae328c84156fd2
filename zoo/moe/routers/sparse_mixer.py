"""SparseMixer: experts are drawn, and the gradient of the draw is estimated rather than left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .topk import TopKRouter

HEUN = 1 / 3  # Heun's third-order rule looks at the start, with weight 1/4, and at 2/3 of the way, with 3/4


class SparseMixerRouter(TopKRouter):
    """SparseMixer-v2 (GRIN, 2409.12136; Phi-3.5-MoE): k rounds of drawing one expert, each from a softmax of its own.

    In a round the experts already drawn are out, and those whose logit is more than 2 threshold below the largest,
    relative to max(|logit|, largest), too: in training one is drawn from the softmax of the rest, p, in evaluation the
    largest is taken, and p_e is its weight, not divided by the sum over the rounds.

    The gradient is that of p_e, and stands for the output's by Heun's rule: with probability 1/4, and always when the
    largest was drawn, the output is taken at the end, y = p_e f_e(x), and else at a third, y = p_e f_e(x) / 3. That is
    the code of Phi-3.5-MoE (transformers' phimoe), whose threshold of 0.01 and k of 2 are the defaults; it multiplies
    the router's input by U(1 - 0.01, 1 + 0.01) too, jitter=0.01. Losses as in `TopKRouter`; GRIN has the balance loss
    over the global batch, {"global_batch": 0.01}. Options as there, but score, normalize, noise, groups and
    selection_bias, which have no meaning where experts are drawn.

    Raises ValueError for those, and for a threshold that is negative.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 2,
        *,
        threshold: float = 0.01,
        losses: Mapping[str, float | Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> None:
        for name in ("score", "normalize", "noise", "num_groups", "selection_bias"):
            if options.get(name):
                raise ValueError(f"SparseMixerRouter: {name} has no meaning where experts are drawn")
        if threshold < 0:
            raise ValueError(f"SparseMixerRouter: expected threshold >= 0, got {threshold}")
        super().__init__(dim, num_experts, k, losses=losses, **options)
        self.threshold = threshold

    def _scores(self, logits: Tensor) -> Tensor:
        return logits

    def _choose(self, scores: Tensor, preference: Tensor | None = None) -> tuple[Tensor, Tensor]:
        left = scores
        experts, weights = [], []
        for _ in range(self.k):
            expert, weight = self._draw(scores, left)
            left = left.scatter(-1, expert, float("-inf"))
            experts.append(expert)
            weights.append(weight)
        return torch.cat(experts, dim=-1), torch.cat(weights, dim=-1)

    def _draw(self, scores: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """One expert of those left [T, E], and its weight, [T, 1] each."""
        with torch.no_grad():
            largest, best = left.max(-1, keepdim=True)
            far = (largest - scores) / scores.abs().clamp(min=largest) > 2 * self.threshold
        close = left.masked_fill(far, float("-inf"))
        probs = close.softmax(-1)
        if not self.training:
            return best, probs.gather(-1, best)
        # The largest of logits + Gumbel noise is a draw from the softmax.
        expert = (close.detach() - torch.empty_like(close).exponential_().log()).argmax(-1, keepdim=True)
        weight = probs.gather(-1, expert)
        whole = (expert == best) | (torch.rand_like(largest) > 0.75)
        # The value of one point of the rule, the gradient of the whole.
        return expert, weight + (weight.where(whole, weight * HEUN) - weight).detach()
