"""UniPELT: how much of each method of tuning a sequence gets."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..routing import Routing
from .base import Router
from .dense import to_all
from .merging import pool, prepared


class UniPELTRouter(Router):
    """UniPELT (2110.07577, section 3): the mean over a sequence's tokens of sigmoid(x W^T + b), for each expert apart.

    All tokens of a sequence have the same weights, which do not sum to one. Padding has no part in the mean (in the
    authors' code it has). W [E, D] and b [E] start as those of `nn.Linear`. Tokens see the whole sequence: not for
    causal models. Context: mask. Raises ValueError where tokens come as one list.
    """

    def __init__(self, dim: int, num_experts: int = 1, *, dtype: torch.dtype | None = torch.float32) -> None:
        super().__init__(dim, num_experts)
        self.dtype = dtype
        self.weight, self.bias = nn.Parameter(torch.empty(num_experts, dim)), nn.Parameter(torch.empty(num_experts))
        self.reset_parameters()

    @property
    def k(self) -> int:
        """How many experts a token meets: all."""
        return self.num_experts

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W and b uniformly within 1/sqrt(dim)."""
        for parameter in (self.weight, self.bias):
            parameter.uniform_(-1 / math.sqrt(self.dim), 1 / math.sqrt(self.dim))

    def forward(self, x: Tensor, **context: Any) -> Routing:
        """Route tokens x [B, S, D]."""
        x, mask, exact = prepared("UniPELTRouter", x, context.get("mask"), self.dtype)
        with exact:
            gates = F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype)).sigmoid()
            gates = gates if mask is None else gates.where(mask.unsqueeze(-1), 0)
            mean, _ = pool(gates, mask)
            weight = mean[:, None].expand_as(gates).reshape(-1, self.num_experts)
            return to_all(weight, None if mask is None else mask.flatten())
