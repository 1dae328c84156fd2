"""Token choice whose experts all count with weight one: what gates for the pieces of a dense MLP have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .topk import TopKRouter


class UnweightedRouter(TopKRouter):
    """The k experts of largest logit, each with weight one: the pieces of an MLP are added up, as they were in it.

    The task's loss therefore has no gradient for the gate. Options as in `TopKRouter`, but those of weights; `probs` of
    losses are the softmax of the logits. Raises ValueError for score, normalize and scale, which weights of one leave
    no room for.
    """

    unit_weights = True

    def __init__(self, dim: int, num_experts: int, k: int, **options: Any) -> None:
        if found := sorted({"score", "normalize", "scale"} & options.keys()):
            raise ValueError(f"{type(self).__name__}: {found[0]} changes weights, and these are one")
        super().__init__(dim, num_experts, k, score="softmax_topk", **options)

    def _choose(self, scores: Tensor, preference: Tensor | None = None) -> tuple[Tensor, Tensor]:
        expert, weight = super()._choose(scores, preference)
        return expert, torch.ones_like(weight)
