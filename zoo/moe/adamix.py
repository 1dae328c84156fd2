"""Adapters of which every training step takes one at random, and inference their mean."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import autocast
from .experts import check_sizes


class AdaMix(nn.Module):
    """y = h + U_j gelu(D_i h), h what the layer `base` gives (AdaMix 2205.12410, section 3).

    In training i and j are drawn for the whole batch, each pass and layer anew and independently; outside training
    weights are the mean of all M. `shared="up"` has one U for all D (the authors' GLUE runs), "down" one D. They train
    with two passes a batch and `zoo.moe.balance.consistency` between them; their code stops each side's gradient into
    the other's target, ours does not. All D start alike, as in their code, and U with zeros (theirs as `nn.Linear`),
    so that nothing changes at first.

    Parameters: down [M, r, D], down_bias [M, r], up [M, D, r], up_bias [M, D]. Raises ValueError for a size below one
    and an unknown `shared`.
    """

    def __init__(
        self,
        base: nn.Module,
        num_experts: int,
        dim: int,
        rank: int = 16,
        shared: Literal["up", "down"] | None = None,
    ) -> None:
        super().__init__()
        check_sizes("AdaMix", num_experts=num_experts, dim=dim, rank=rank)
        if shared not in (None, "up", "down"):
            raise ValueError(f"AdaMix: shared must be None, 'up' or 'down', got {shared!r}")
        self.base, self.num_experts, self.dim, self.rank, self.shared = base, num_experts, dim, rank, shared
        downs, ups = (1 if shared == part else num_experts for part in ("down", "up"))
        self.down = nn.Parameter(torch.empty(downs, rank, dim))
        self.down_bias = nn.Parameter(torch.empty(downs, rank))
        self.up = nn.Parameter(torch.empty(ups, dim, rank))
        self.up_bias = nn.Parameter(torch.empty(ups, dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw one D as `nn.Linear` does, for all, and zero U."""
        bound = 1 / math.sqrt(self.dim)
        for parameter in (self.down, self.down_bias):
            parameter[0].uniform_(-bound, bound)
            parameter.copy_(parameter[:1].expand_as(parameter).clone())
        self.up.zero_()
        self.up_bias.zero_()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply to x [..., D]."""
        h = self.base(x, *args, **kwargs)
        inner = h if autocast.is_on(h) else h.to(self.down.dtype)
        hidden = F.gelu(F.linear(inner, *self._one(self.down, self.down_bias)))
        return h + F.linear(hidden, *self._one(self.up, self.up_bias)).to(h.dtype)

    def _one(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        if weight.shape[0] == 1:
            return weight[0], bias[0]
        if not self.training:
            return weight.mean(0), bias.mean(0)
        drawn = torch.randint(weight.shape[0], (1,), device=weight.device)
        return weight.index_select(0, drawn)[0], bias.index_select(0, drawn)[0]

    @torch.no_grad()
    def merged(self) -> AdaMix:
        """A layer beside the same base with one adapter, the mean: what this one is outside training."""
        with torch.device("meta"):
            one = AdaMix(nn.Identity(), 1, self.dim, self.rank)
        for name in ("down", "down_bias", "up", "up_bias"):
            old = getattr(self, name)
            setattr(one, name, nn.Parameter(old.mean(0, keepdim=True), old.requires_grad))
        one.base = self.base
        return one.train(self.training)

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{self.num_experts}, dim={self.dim}, rank={self.rank}, shared={self.shared!r}"
