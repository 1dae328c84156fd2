"""What gates share that choose from logits x W^T but not as token choice does."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import autocast
from ..auxiliary import AuxiliaryLosses, choice_sources
from ..decision import Decision
from .base import Router
from .context import label_sources


class LinearRouter(Router):
    """Logits x W^T with W [E, D], in `dtype` (None: the input's; float64 stays), and losses as in `TopKRouter`."""

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        losses: Mapping[str, float | Mapping[str, Any]] | None = None,
        dtype: torch.dtype | None = torch.float32,
    ) -> None:
        super().__init__(dim, num_experts)
        self.dtype, self.losses = dtype, AuxiliaryLosses(losses)
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W uniformly within 1/sqrt(dim)."""
        bound = 1 / math.sqrt(self.dim)
        self.weight.uniform_(-bound, bound)

    def forward(self, x: Tensor, **context: Any) -> Decision:
        """Route tokens x [T, D] or [B, S, D]; context: mask [T] or [B, S], False for tokens to leave out."""
        # Autocast would round the logits, and with them the choice.
        if autocast.is_on(x):
            with autocast.off(x):
                return LinearRouter.forward(self, x, **context)
        if x.dtype != torch.float64:
            x = x.to(self.dtype or x.dtype)
        if (mask := context.get("mask")) is not None:
            x = x.where(mask.reshape(x.shape[:-1]).bool().unsqueeze(-1), 0)  # nan there would reach W's gradient
        return self.route(F.linear(x, self.weight.to(x.dtype)), **context)

    @abstractmethod
    def route(self, logits: Tensor, mask: Tensor | None = None, **_: Any) -> Decision:
        """Decide from logits [T, E] or [B, S, E]."""

    def _flat(self, logits: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, tuple[int, int] | None]:
        """Logits [T, E], zero where tokens are left out, the mask [T], and (B, S) where that is known."""
        split = (logits.shape[0], logits.shape[1]) if logits.dim() == 3 else None
        logits = logits.reshape(-1, self.num_experts)
        if mask is None:
            return logits, None, split
        mask = mask.reshape(-1).bool()
        return logits.where(mask[:, None], 0), mask, split  # a masked token may hold anything, even nan

    def _losses(
        self,
        logits: Tensor,
        weight: Tensor,
        selected: Tensor,
        mask: Tensor | None,
        split: tuple[int, int] | None,
        context: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        """Losses of combine weights [T, E] where selected [T, E]; none outside training."""
        if not self.training or not self.losses.terms:
            return {}
        every = torch.arange(self.num_experts, device=logits.device).expand(logits.shape)
        probs: Callable[[], Tensor] = lambda: logits.softmax(-1)  # noqa: E731
        sources = choice_sources(logits, logits, None, every, weight, mask, probs, probs)
        sources |= label_sources(
            type(self).__name__, context, logits if split is None else logits.unflatten(0, split), mask
        )
        sources["selected"] = lambda: selected.to(logits.dtype)
        sources["gates"] = lambda: weight * selected
        sources["first"] = lambda: one_hot(weight.where(selected, -1.0).argmax(-1), logits)
        return self.losses(sources, {"sequence": split, "group": None})

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{self.dim}, num_experts={self.num_experts}"


def one_hot(expert: Tensor, like: Tensor) -> Tensor:
    """1 at each token's expert [T], in the shape [T, E] and type of `like`."""
    return torch.zeros_like(like).scatter(-1, expert.unsqueeze(-1), 1.0)
