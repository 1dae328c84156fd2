"""MoEfication: a small network foretells which experts of a token will be active."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .unweighted import UnweightedRouter


class MoEficationRouter(UnweightedRouter):
    """MoEfication (2110.01786): the k experts with the largest W_2 tanh(W_1 x / |x|), each with weight one.

    W_1 [E, D] (`weight`) and W_2 [E, E] (`out`) are trained beforehand to foretell each expert's sum of positive
    activations (`zoo.convert.fit_predictor`; `zoo.split` does), and by nothing else: they need no gradient. k is by
    default a fifth of the experts, as in the paper. Other options as in `UnweightedRouter`, but bias.

    W_1 starts uniformly within 1/sqrt(dim), W_2 as the identity. Context: mask.
    """

    def __init__(self, dim: int, num_experts: int, k: int | None = None, **options: Any) -> None:
        if options.get("bias"):
            raise ValueError("MoEficationRouter: its logits have no bias")
        super().__init__(dim, num_experts, max(1, num_experts // 5) if k is None else k, **options)
        self.out = nn.Parameter(torch.empty(num_experts, num_experts), requires_grad=False)
        self.weight.requires_grad_(False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W_1, and let W_2 be the identity."""
        super().reset_parameters()
        self.weight.uniform_(-1 / math.sqrt(self.dim), 1 / math.sqrt(self.dim))
        if hasattr(self, "out"):  # not yet, when the parent class is made
            nn.init.eye_(self.out)

    def _logits(self, x: Tensor, **context: Any) -> Tensor:
        return predict(x, self.weight.to(x.dtype), self.out.to(x.dtype))


def predict(x: Tensor, w_1: Tensor, w_2: Tensor) -> Tensor:
    """Logits [.., E] of tokens x [.., D], from W_1 [E, D] and W_2 [E, E]."""
    return F.linear(F.linear(F.normalize(x, dim=-1), w_1).tanh(), w_2)
