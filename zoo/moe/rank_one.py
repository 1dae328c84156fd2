"""Experts of rank one, made of every pair of a row and a column."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import autocast
from .experts import check_sizes
from .kernels.portable import expert_of_rows
from .lora import LoRAExperts, _asked
from .routing import Routing


class RankOneExperts(LoRAExperts):
    """E = I J linear maps of rank one, D -> O: f_ij(x) = b_j (a_i . x), expert i J + j (Intuition-MoR1E, 2404.08985).

    Any of I vectors a goes with any of J vectors b, as in the authors' code, so that parameters grow with I + J. All
    experts are one product with the a's [I, D], one with the weights, and one with the b's [O, J]. The a's start as
    `nn.Linear` does and the b's with zeros, so that nothing changes at first. Types and `dropout` as in `LoRAExperts`.

    Parameters: a [I, 1, D], b [J, O, 1]. Raises ValueError for a size below one, and unless I divides E.
    """

    def __init__(self, num_experts: int, dim: int, rows: int, out_dim: int | None = None, dropout: float = 0.0) -> None:
        check_sizes("RankOneExperts", num_experts=num_experts, rows=rows)
        if num_experts % rows:
            raise ValueError(f"RankOneExperts: {num_experts} experts are no pairs of {rows} rows and columns")
        super().__init__(num_experts, dim, 1, 1.0, out_dim, dropout)
        self.a = nn.Parameter(torch.empty(rows, 1, dim))
        self.b = nn.Parameter(torch.empty(num_experts // rows, self.out_dim, 1))
        self.reset_parameters()

    def _mixed(self, x: Tensor, routing: Routing) -> Tensor:
        if routing.token_index.numel() < x.shape[0] * self.num_experts:
            x = _asked(x, routing)
        return self.mix(x, routing.dense())

    def mix(self, x: Tensor, weight: Tensor) -> Tensor:
        """Sum over all experts, [T, O], with weights [T, E]."""
        x = self.reads(x)
        a, b = (self.a, self.b) if autocast.is_on(x) else (self.a.to(x.dtype), self.b.to(x.dtype))
        rows = F.linear(x, a[:, 0])
        pairs = weight.unflatten(-1, (a.shape[0], b.shape[0])).to(rows.dtype)
        return F.linear(torch.einsum("ti,tij->tj", rows, pairs), b[..., 0].T)

    def apart(self, x: Tensor) -> Tensor:
        """What every expert makes of tokens x [T, D], unweighted: [T, E, O]."""
        return torch.einsum("ti,jo->tijo", F.linear(self.reads(x), self.a[:, 0]), self.b[..., 0]).flatten(1, 2)

    def each(self, rows: Tensor, offsets: Tensor, experts: Tensor | None = None) -> Tensor:
        """What experts, or those [G] of them, make of rows [A, D] sorted by expert, unweighted: [A, O]."""
        expert = expert_of_rows(offsets, rows.shape[0])
        if experts is not None:
            expert = experts[expert]
        columns = self.b.shape[0]
        hidden = (rows * self.a[expert // columns, 0]).sum(-1, keepdim=True)
        return hidden * self.b[expert % columns, :, 0]

    @torch.no_grad()
    def product(self, weight: Tensor) -> Tensor:
        """sum_ij weight_ij b_j a_i^T, [O, D], for weights [E]: what one merged layer adds."""
        pairs = weight.to(self.b.dtype).view(self.a.shape[0], self.b.shape[0])
        return self.b[..., 0].T @ pairs.T @ self.a[:, 0]
