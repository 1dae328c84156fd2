"""StableMoE: learn where tokens go, distil that into a router of token ids, and then leave it alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import autocast, balance
from ..capacity import Capacity
from ..routing import Routing
from ..schedule import Scheduled
from .base import orthogonal_, take_fixed
from .context import per_token
from .topk import TopKRouter

CAPACITY = Capacity(2.0, rounding="floor", minimum=1, drop="position")


class StableMoERouter(Scheduled, TopKRouter):
    """StableMoE (2204.08396, section 3): weight sigmoid(x . c_e) throughout, and two routers to choose e.

    Stage 1, the first switch_step optimizer steps: training takes the largest x . c_e, with the losses stable_balance
    and stable_distill, by which the small router v_id . c'_e, of embeddings of token ids of width routing_dim, learns
    what the large one chooses. Stage 2, and evaluation at any time, take the largest v_id . c'_e, without losses: as
    nothing trains the small router then, a token id keeps its expert. c keeps learning through the weight.

    Centroids start orthogonal with length 0.1, embeddings in N(0, 1), as in the authors' code, whose factors are 0.3
    and 0.3, whose switch is after 6000 of 60000 steps, and whose capacity is twice the mean, first come first served.
    Sums over tokens are divided by their number there too, outside the layer. The residual mix is as in `BASERouter`.
    Steps are counted by `zoo.moe.schedule.advance`. In stage 2 the small router has no gradient, so that under
    DistributedDataParallel it takes find_unused_parameters=True, and losses made inside what that wraps.
    Context: token_ids, mask. Other options as in `TopKRouter`; `losses` come on top of these two, in stage 2 as well.

    Raises ValueError without token_ids, and for one out of range.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        vocab_size: int,
        switch_step: int = 6000,
        routing_dim: int = 50,
        balance_weight: float = 0.3,
        distill_weight: float = 0.3,
        capacity: Capacity | None = CAPACITY,
        **options: Any,
    ) -> None:
        if vocab_size < 1 or routing_dim < 1 or switch_step < 0:
            raise ValueError(
                f"StableMoERouter: expected vocab_size and routing_dim of at least 1 and switch_step of at least 0, "
                f"got {vocab_size}, {routing_dim} and {switch_step}"
            )
        take_fixed(self, options, k=1)
        super().__init__(dim, num_experts, 1, **{"score": "sigmoid", "capacity": capacity, **options})
        self.switch_step, self.balance_weight, self.distill_weight = switch_step, balance_weight, distill_weight
        self.embedding = nn.Parameter(torch.empty(vocab_size, routing_dim))
        self.distilled_weight = nn.Parameter(torch.empty(num_experts, routing_dim))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make both routers' centroids orthogonal, of length 0.1, draw the embeddings, and go back to stage 1."""
        super().reset_parameters()
        orthogonal_(self.weight, gain=0.1)
        if hasattr(self, "step"):  # not yet, when the parent class is made
            orthogonal_(self.distilled_weight, gain=0.1)
            self.embedding.normal_()
            self.step.zero_()
            self._follow()

    def advance(self) -> None:
        """Count one optimizer step, and take the stage that belongs to it."""
        super().advance()
        self._follow()

    def _follow(self) -> None:
        # A value of Python's: reading the buffer in each forward would make the host wait.
        self.frozen = not self.step.is_meta and int(self.step) >= self.switch_step

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._follow()

    def forward(self, x: Tensor, **context: Any) -> Routing:
        """Route tokens x [T, D] or [B, S, D]."""
        token = per_token("StableMoERouter", context, "token_ids", x, self.embedding.shape[0])
        dtype = torch.float64 if x.dtype == torch.float64 else self.dtype or x.dtype
        with autocast.off(x):
            distilled = F.linear(F.embedding(token, self.embedding).to(dtype), self.distilled_weight.to(dtype))
        return super().forward(x, **{**context, "distilled": distilled})

    def route(  # type: ignore[override]
        self, logits: Tensor, mask: Tensor | None = None, *, distilled: Tensor, **context: Any
    ) -> Routing:
        """Decide from logits [T, E] or [B, S, E] and those of the distilled router, [T, E]."""
        learning = self.training and not self.frozen
        routing = super().route(logits, mask, preference=None if learning else distilled.detach(), **context)
        if learning:
            logits = logits.reshape(-1, self.num_experts)
            mask = None if mask is None else mask.reshape(-1).bool()
            chosen = torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
            routing.losses["stable_balance"] = self.balance_weight * balance.stable_balance(logits, chosen, mask)
            routing.losses["stable_distill"] = self.distill_weight * balance.stable_distill(distilled, logits, mask)
        return routing
