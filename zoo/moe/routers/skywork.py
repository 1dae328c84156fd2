"""Skywork-MoE: normalised logits, and a balance loss whose weight follows the share of tokens that were dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import balance
from ..capacity import Capacity
from ..routing import Routing
from ..schedule import Scheduled
from ..telemetry import asked_per_token, kept_per_token
from .base import added, is_recomputation
from .topk import TopKRouter

CAPACITY = Capacity(1.25)
LOSSES = {"switch": 1.0}


class SkyworkRouter(Scheduled, TopKRouter):
    """Skywork-MoE (2406.06563, section 4): top-2 of softmax(lambda (z - mean z) / std z), and a loss that adapts.

    lambda is normalize_logits, 1 in the paper, None for plain logits. `adaptive` are the losses whose weight is
    multiplied by the layer's own coefficient alpha, the buffer `coefficient`. After each optimizer step (section 4.2)
        alpha <- decay alpha + (1 - decay) min(sensitivity d, max_coefficient)
    where d is the share of the assignments asked for that capacity dropped in that step, over all micro-batches and
    processes: a layer that is balanced is left in peace. The paper's values are the defaults, decay 0.99, sensitivity
    1/5, max_coefficient 0.01; it names neither a first alpha (here the largest) nor a capacity (here 1.25 times the
    mean; without one nothing is dropped, and alpha dies away). A step without a token changes nothing.

    `zoo.moe.schedule.advance` moves alpha; it is part of the state, and stays float32. `losses` may add others, of
    fixed weight. Other options as in `TopKRouter`. Raises ValueError for a number out of range.
    """

    coefficient: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 2,
        *,
        normalize_logits: float | None = 1.0,
        adaptive: Mapping[str, float | Mapping[str, Any]] = LOSSES,
        decay: float = 0.99,
        sensitivity: float = 0.2,
        max_coefficient: float = 0.01,
        capacity: Capacity | None = CAPACITY,
        losses: Mapping[str, float | Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> None:
        if not 0 <= decay < 1 or sensitivity <= 0 or max_coefficient <= 0:
            raise ValueError(
                "SkyworkRouter: expected 0 <= decay < 1, sensitivity > 0 and max_coefficient > 0, got "
                f"{decay}, {sensitivity} and {max_coefficient}"
            )
        if both := sorted(set(adaptive) & set(losses or {})):
            raise ValueError(f"SkyworkRouter: {', '.join(both)} cannot be both adaptive and of fixed weight")
        super().__init__(
            dim,
            num_experts,
            k,
            normalize_logits=normalize_logits,
            capacity=capacity,
            losses={**(losses or {}), **adaptive},
            **options,
        )
        self.adaptive = tuple(adaptive)
        self.decay, self.sensitivity, self.max_coefficient = decay, sensitivity, max_coefficient
        self.register_buffer("coefficient", torch.tensor(max_coefficient, dtype=torch.float32))
        # Assignments dropped and asked for; not a buffer, since it differs between processes on purpose.
        self.dropped_since_update: Tensor | None = None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W as `TopKRouter` does, and alpha begins anew."""
        super().reset_parameters()
        if hasattr(self, "coefficient"):  # not yet, when the parent class is made
            self.coefficient.fill_(self.max_coefficient)
            self.dropped_since_update = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SkyworkRouter:
        before = self.coefficient
        super()._apply(fn, recurse)
        after = self.coefficient
        if after.dtype.itemsize < 4:
            # A hundredth of 1e-4 is lost in bfloat16: model.bfloat16() leaves this buffer float32.
            self.coefficient = after.float() if before.is_meta else before.to(after.device)
        return self

    def route(  # type: ignore[override]
        self, logits: Tensor, mask: Tensor | None = None, **context: Any
    ) -> Routing:
        """Decide from logits [T, E] or [B, S, E]."""
        routing = super().route(logits, mask, **context)
        self._count(routing)
        for name in self.adaptive:
            if name in routing.losses:
                loss = routing.losses[name]
                routing.losses[name] = loss * self.coefficient.clone().to(loss.dtype)
        return routing

    @torch.no_grad()
    def _count(self, routing: Routing) -> None:
        """Remember how many assignments were dropped, and of how many; a recomputation does not count."""
        if not self.training or is_recomputation():
            return
        asked = asked_per_token(routing).sum()
        counted = torch.stack([asked - kept_per_token(routing).sum(), asked])
        self.dropped_since_update = added(self.dropped_since_update, counted)

    @torch.no_grad()
    def advance(self) -> None:
        """Move alpha by one step, and forget what it was based on."""
        counted = self.dropped_since_update
        if counted is None:
            counted = torch.zeros(2, dtype=torch.int64, device=self.coefficient.device)
        dropped, asked = balance.all_reduce(counted)
        self.dropped_since_update = None
        wanted = (self.sensitivity * dropped / asked.clamp(min=1)).clamp(max=self.max_coefficient)
        moved = self.decay * self.coefficient + (1 - self.decay) * wanted
        self.coefficient.copy_(torch.where(asked > 0, moved, self.coefficient))
