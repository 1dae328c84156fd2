"""Experts of low rank, to stand beside an MLP that stays as it is."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .kernels.linear import grouped_linear
from .routing import Routing


class LoRAExperts(nn.Module):
    """E linear maps of rank r, computed together: f_e(x) = alpha / r * B_e A_e x (LoRA, 2106.09685).

    LLaVA-MoLE (2401.16160, section 3.2) adds the one of the highest logit to a frozen MLP: `MoE` with a `TopKRouter` of
    k=1, normalize=True (its weight is one) and the MLP as `shared`. As there, A starts as `nn.Linear` does and B with
    zeros, so that nothing changes at first.

    Parameters: a [E, r, D], b [E, D, r]. Raises ValueError for a size below one.
    """

    def __init__(self, num_experts: int, dim: int, rank: int = 32, alpha: float = 64.0) -> None:
        super().__init__()
        for name, value in (("num_experts", num_experts), ("dim", dim), ("rank", rank)):
            if value < 1:
                raise ValueError(f"LoRAExperts: {name} must be at least 1, got {value}")
        self.num_experts, self.dim, self.rank, self.alpha = num_experts, dim, rank, alpha
        self.a = nn.Parameter(torch.empty(num_experts, rank, dim))
        self.b = nn.Parameter(torch.empty(num_experts, dim, rank))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw A uniformly within 1/sqrt(D), and zero B."""
        self.a.uniform_(-1 / math.sqrt(self.dim), 1 / math.sqrt(self.dim))
        self.b.zero_()

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Weighted sum [T, D] of what each token's experts make of tokens x [T, D]."""
        rows = grouped_linear(x.index_select(0, routing.token_index), self.a, routing.offsets)
        out = grouped_linear(rows, self.b, routing.offsets)
        out = out * (self.alpha / self.rank * routing.weight[:, None]).to(out.dtype)
        return out.new_zeros(x.shape).index_add(0, routing.token_index, out)

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{self.num_experts}, dim={self.dim}, rank={self.rank}, alpha={self.alpha}"
