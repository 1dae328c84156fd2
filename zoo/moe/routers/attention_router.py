"""Yuan 2.0-M32: a router in which experts attend to one another."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .topk import TopKRouter


class AttentionRouter(TopKRouter):
    """Yuan 2.0-M32 (2405.17976, attention router): logits_i = sum_j softmax_j(q_i k_j) v_j for each token by itself.

    q, k, v [E] are the thirds of x W^T, W [3E, D]: attention between experts with heads of width 1, unscaled. Then, as
    the authors train it, the softmax over the k = 2 largest logits, and the loss of the choice `switch` on the softmax
    over all. Options as in `TopKRouter`, but bias.
    """

    def __init__(self, dim: int, num_experts: int, k: int = 2, **options: Any) -> None:
        if options.get("bias"):
            raise ValueError("AttentionRouter: its logits have no bias")
        super().__init__(dim, num_experts, k, **{"score": "softmax_topk", **options})
        self.weight = nn.Parameter(torch.empty(3 * num_experts, dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W uniformly within 1/sqrt(dim), also where noise is learnt: logits of zero matrices never change."""
        super().reset_parameters()
        self.weight.uniform_(-1 / math.sqrt(self.dim), 1 / math.sqrt(self.dim))

    def _logits(self, x: Tensor, **context: Any) -> Tensor:
        query, key, value = F.linear(x, self.weight.to(x.dtype)).chunk(3, dim=-1)
        attention = (query.unsqueeze(-1) * key.unsqueeze(-2)).softmax(-1)
        return (attention @ value.unsqueeze(-1)).squeeze(-1)
