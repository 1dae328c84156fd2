"""BASE layers: balance by linear assignment, without a loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .assignment import balanced_assignment
from .base import orthogonal_, take_fixed
from .topk import TopKRouter


class BASERouter(TopKRouter):
    """BASE (2103.16716, section 3): in training a balanced linear assignment of tokens to experts, else the argmax.

    Affinities are x W^T. In training the assignment maximises their sum while every expert gets T/E tokens (see
    `balanced_assignment`, which `tolerance` and `rounds` go to), in evaluation a token takes its largest affinity. The
    choice has no gradient; the weight sigmoid(x . w_e) of the expert taken has, and is all that trains W, whose rows
    start orthogonal with length 0.1, as in fairseq.

    The paper's layer is y = a f(x) + (1 - a) x, a the weight and f residual, f(x) = x + g(x): that is x + a g(x),
    and what `x + moe(x)` gives with experts g. The balance is that of the tokens of one process; fairseq first
    shuffles them between processes. Other options as in `TopKRouter`.
    """

    def __init__(
        self, dim: int, num_experts: int, *, tolerance: float = 2e-3, rounds: int = 64, **options: Any
    ) -> None:
        take_fixed(self, options, k=1)
        super().__init__(dim, num_experts, 1, **{"score": "sigmoid", **options})
        self.tolerance, self.rounds = tolerance, rounds

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make the rows of W orthogonal, of length 0.1."""
        super().reset_parameters()
        orthogonal_(self.weight, gain=0.1)

    def _preference(self, logits: Tensor, mask: Tensor | None) -> Tensor | None:
        if not self.training:
            return None
        # A masked token, of "expert" E, prefers none.
        expert = balanced_assignment(logits, self.tolerance, self.rounds, mask)
        return F.one_hot(expert, self.num_experts + 1)[:, : self.num_experts].to(logits.dtype)
