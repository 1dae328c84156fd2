"""NLLB's conditional routing: a second gate says how much of a token the experts get, and how much a dense MLP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import autocast, balance
from ..routing import Routing
from .base import Router
from .gshard import GShardRouter
from .wrapped import WrappingRouter


class ConditionalRouter(WrappingRouter):
    """Conditional MoE routing (CMR; NLLB, 2207.04672): y = (1 - g) FFN(x) + g MoE(x) with g = sigmoid(w . x + b).

    The last of the E experts is the FFN, which every token meets; among the others a gate of the class `gate`, or of
    that name, chooses with the other options, GShard's by default. So it needs no other layer: the FFN is as wide as an
    expert, as in NLLB. The loss "cmr" is budget_weight |sum_t g_t / T - budget|, over the tokens that are not padding:
    on average `budget` of each token is the experts' (`balance.conditional_budget`). In training dropout zeroes g
    with that probability, which leaves the FFN alone, and divides it by 1 - dropout otherwise; the loss sees that g.

    All this is the authors' code, w and b start as in `nn.Linear`; budget 0.8, weight 0.1 and dropout 0.2 are those of
    its training script. There the absolute value is of the sums over all layers; here every layer keeps to its own
    budget, as its loss is its own. Context: mask, and what the inner gate reads.

    Raises ValueError for fewer than two experts, a budget outside [0, 1] or a dropout outside [0, 1).
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        budget: float = 0.8,
        budget_weight: float = 0.1,
        dropout: float = 0.2,
        gate: type[Router] | str = GShardRouter,
        **options: Any,
    ) -> None:
        if num_experts < 2:
            raise ValueError(f"ConditionalRouter: the last expert is the FFN; expected at least 2, got {num_experts}")
        if not 0 <= budget <= 1 or not 0 <= dropout < 1:
            raise ValueError(
                f"ConditionalRouter: expected 0 <= budget <= 1 and 0 <= dropout < 1, got {budget} and {dropout}"
            )
        super().__init__(dim, num_experts, num_experts - 1, gate, options)
        self.budget, self.budget_weight, self.dropout = budget, budget_weight, dropout
        self.budget_gate = nn.Linear(dim, 1)

    @property
    def k(self) -> int:
        """How many experts a token meets, the FFN included."""
        return super().k + 1

    def forward(self, x: Tensor, **context: Any) -> Routing:
        """Route tokens x [T, D] or [B, S, D]; context: mask [T] or [B, S], and what the inner gate reads."""
        routing = self._inner(x, context)
        mask, g = context.get("mask"), self._share(x, context.get("mask"))
        mask = None if mask is None else mask.reshape(-1).bool()
        kept = F.dropout(g, self.dropout, self.training)
        if self.training:
            loss = balance.conditional_budget(kept, self.budget, mask)
            routing.losses["cmr"] = self.budget_weight * loss
        everyone = torch.arange(g.numel(), device=g.device) if mask is None else mask.nonzero().squeeze(-1)
        weight = routing.weight * kept.index_select(0, routing.token_index)
        end = routing.offsets[-1:] + everyone.numel()
        return Routing(
            token_index=torch.cat([routing.token_index, everyone]),
            offsets=torch.cat([routing.offsets, end.to(routing.offsets.dtype)]),
            weight=torch.cat([weight, 1 - kept.index_select(0, everyone)]),
            num_tokens=routing.num_tokens,
            losses=routing.losses,
            probs=_shared(routing.probs, g, mask),
            asked=None if routing.asked is None else routing.asked + (1 if mask is None else mask),
        )

    def _share(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """g of every token, [T]; whatever it may be for masked ones."""
        if x.dtype != torch.float64:
            x = x.float()
        if mask is not None:
            x = x.where(mask.reshape(x.shape[:-1]).bool().unsqueeze(-1), 0)  # nan there would reach w's gradient
        with autocast.off(x):
            weight, bias = self.budget_gate.weight.to(x.dtype), self.budget_gate.bias.to(x.dtype)
            return F.linear(x, weight, bias).sigmoid().flatten()

    def extra_repr(self) -> str:
        """Options for `print(model)`."""
        return f"{self.dim}, num_experts={self.num_experts}, budget={self.budget}, dropout={self.dropout}"


def _shared(probs: Tensor | None, g: Tensor, mask: Tensor | None) -> Tensor | None:
    """The distribution over the experts and the FFN, [T, E]; zero for masked tokens, as telemetry expects."""
    if probs is None:
        return None
    probs = torch.cat([probs * g.unsqueeze(-1), 1 - g.unsqueeze(-1)], dim=-1).detach()
    return probs if mask is None else probs * mask[:, None]
