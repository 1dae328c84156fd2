"""Soft MoE: slots that are mixtures of tokens, so that nothing is chosen, dropped or out of balance."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import autocast
from ..capacity import Capacity
from ..slots import Slots
from .base import Router
from .context import per_token
from .groups import GroupSize, check_groups, group_tokens

EPS = 1e-6


class SoftRouter(Router):
    """Soft MoE (2308.00951, algorithm 1, with the normalised logits of section 2.3): logits s x̂ μ̂^T.

    x̂ and μ̂ [E, P, D] have unit length: v / sqrt(|v|^2 + 1e-6), as the authors' code has it (the paper adds 1e-6 to the
    length). Dispatch is the softmax over the tokens of a group, combine that over all E*P slots; what is mixed are the
    tokens themselves, not x̂. s is one learnt number, `scale` [], 1 at first; torch's own `fully_shard`, which shards no
    scalars, needs it among its ignored_params (`zoo.parallel` does so).

    P is `slots`, or where that is None round(tokens * capacity_factor / E) for groups of `tokens` tokens; the paper's
    models have one slot an expert. A group is a sequence, that is an image, unless group_size or group_sequences say
    otherwise (see `TopKRouter`). noise_std adds N(0, noise_std^2) to the logits in training. Tokens of one group see
    each other: not for causal models. Context: mask [T] or [B, S], False for tokens to leave out; they give zero. With
    `only` all tokens are left out but those of that `modality`, which the context must then have (see `per_token`).

    Raises ValueError for fewer than one slot, and where neither slots nor tokens are given.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        slots: int | None = None,
        *,
        tokens: int | None = None,
        capacity_factor: float = 1.0,
        noise_std: float = 0.0,
        group_size: GroupSize = "sequence",
        group_sequences: int = 1,
        only: int | None = None,
        dtype: torch.dtype | None = torch.float32,
    ) -> None:
        super().__init__(dim, num_experts)
        check_groups("SoftRouter", group_size, group_sequences)
        if slots is None and tokens is None:
            raise ValueError("SoftRouter: give slots (an expert), or the number of tokens in a group")
        if slots is None:
            slots = Capacity(capacity_factor, rounding="round").places(tokens or 0, 1, num_experts, training=True)
        if slots < 1:
            raise ValueError(f"SoftRouter: slots must be at least 1, got {slots}")
        self.slots, self.noise_std, self.dtype = slots, noise_std, dtype
        self.group_size, self.group_sequences, self.only = group_size, group_sequences, only
        self.weight = nn.Parameter(torch.empty(num_experts, slots, dim))
        self.scale = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw μ from N(0, 1/(E*D)), as the authors' code does, and set the scale to one."""
        self.weight.normal_(std=1 / math.sqrt(self.num_experts * self.dim))
        self.scale.fill_(1.0)

    def forward(self, x: Tensor, **context: Any) -> Slots:
        """Mix tokens x [T, D] or [B, S, D]; the first only with a group_size that needs no sequences."""
        # Autocast would round the logits.
        if autocast.is_on(x):
            with autocast.off(x):
                return self.forward(x, **context)
        if x.dtype != torch.float64:
            x = x.to(self.dtype or x.dtype)
        if self.only is not None:
            own = per_token("SoftRouter", context, "modality", x) == self.only
            context["mask"] = own if context.get("mask") is None else own & context["mask"].reshape(-1).bool()
        if (mask := context.get("mask")) is not None:
            x = x.where(mask.reshape(x.shape[:-1]).bool().unsqueeze(-1), 0)  # nan there would reach the gradient of μ
        mu = _unit(self.weight.to(x.dtype)).flatten(0, 1) * self.scale.to(x.dtype)
        logits = F.linear(_unit(x), mu).unflatten(-1, (self.num_experts, self.slots))
        return self.route(logits, **context)

    def route(self, logits: Tensor, mask: Tensor | None = None, **_: Any) -> Slots:
        """Slots from logits [T, E, P] or [B, S, E, P]."""
        batch = logits.shape[0] if logits.dim() == 4 else None
        logits = logits.reshape(-1, self.num_experts, self.slots)
        if self.training and self.noise_std:
            logits = logits + torch.randn_like(logits) * self.noise_std
        tokens = logits.shape[0]
        size = group_tokens("SoftRouter", self.group_size, self.group_sequences, tokens, batch) or 1
        missing = -tokens % size
        here = mask = None if mask is None else mask.reshape(-1).bool()
        if missing:  # a last short group is filled with tokens that are left out
            here = logits.new_ones(tokens, dtype=torch.bool) if mask is None else mask
            here, logits = F.pad(here, (0, missing)), F.pad(logits, (0, 0, 0, 0, 0, missing))
        logits = logits.unflatten(0, (-1, size))
        if here is None:
            dispatch = logits.softmax(1)
            combine = logits.flatten(2).softmax(-1).view_as(logits)
        else:
            present = here.view(-1, size, 1, 1)
            # The least finite number: a group without any token must not become nan.
            logits = logits.where(present, torch.finfo(logits.dtype).min)
            dispatch = logits.softmax(1) * present
            combine = logits.flatten(2).softmax(-1).view_as(logits) * present
        return Slots(dispatch, combine, tokens, mask)

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{self.dim}, num_experts={self.num_experts}, slots={self.slots}"


def _unit(v: Tensor) -> Tensor:
    return v * torch.rsqrt(v.square().sum(-1, keepdim=True) + EPS)
