"""MoE++: a router for experts that cost nothing, which hears what the router of the layer below thought."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import is_recomputation
from .topk import TopKRouter

WIDTH = 8  # of the hidden layer, times E


class GatingResidual:
    """Logits on their way from one layer's router to the next: give each forward pass of a model a new one.

    Called in turn by the routers, it hands each what the one before left. A repetition for activation checkpointing is
    given what the first run was; those of one router that runs several times come last one first, as in any backward.
    """

    def __init__(self) -> None:
        self._newest: Tensor | None = None
        self._given: dict[int, list[Tensor | None]] = {}
        self._repeated: dict[int, int] = {}

    def take(self, router: nn.Module) -> Tensor | None:
        """Logits [T, E] of the layer below, None for the first layer."""
        given = self._given.setdefault(id(router), [])
        if not is_recomputation():
            given.append(self._newest)
            return self._newest
        times = self._repeated.get(id(router), 0)
        self._repeated[id(router)] = times + 1
        return given[-1 - times % len(given)]  # a graph that is kept may go back several times

    def leave(self, logits: Tensor) -> None:
        """Leave logits for the layer above."""
        if not is_recomputation():
            self._newest = logits


class MoEPlusPlusRouter(TopKRouter):
    """MoE++ (2410.07348, section 3.2): top-k of softmax(W_2 tanh(W_1 x) + W_r z), z the logits of the layer below.

    W_1 [8E, D]; two_layers=False has logits x W^T instead. z comes by the context gating=GatingResidual(), one a
    forward pass (our language models give it); without it, and in the first layer, there is none. Of the k weights
    those of zero experts, the last `zero` ones, are set to 0 and the others divided by their sum. The code's normalised
    logits are normalize_logits, as in `TopKRouter`. The experts are
    `zoo.moe.ZeroComputationExperts`. The published code is for inference: the paper's heterogeneous balance loss and
    capacity are not in it, nor here.

    Other options as in `TopKRouter`. Raises ValueError unless 0 <= zero < E.
    """

    def __init__(
        self, dim: int, num_experts: int, k: int = 2, *, zero: int = 1, two_layers: bool = True, **options: Any
    ) -> None:
        if not 0 <= zero < num_experts:
            raise ValueError(f"MoEPlusPlusRouter: expected 0 <= zero < {num_experts} experts, got zero={zero}")
        super().__init__(dim, num_experts, k, **options)
        self.zero = zero
        self.hidden_weight = nn.Parameter(torch.empty(WIDTH * num_experts, dim)) if two_layers else None
        if two_layers:
            self.weight = nn.Parameter(torch.empty(num_experts, WIDTH * num_experts))
        self.residual_weight = nn.Parameter(torch.empty(num_experts, num_experts))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every matrix as `nn.Linear` does."""
        super().reset_parameters()
        for weight in (self.weight, getattr(self, "hidden_weight", None), getattr(self, "residual_weight", None)):
            if weight is not None:
                weight.uniform_(-(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)

    def _logits(self, x: Tensor, gating: GatingResidual | None = None, **context: Any) -> Tensor:
        if self.hidden_weight is not None:
            x = F.linear(x, self.hidden_weight.to(x.dtype)).tanh()
        logits = super()._logits(x)
        below = None if gating is None else gating.take(self)
        if below is not None:
            logits = logits + F.linear(below.to(logits.dtype), self.residual_weight.to(logits.dtype))
        elif self.training:
            # W_r 0: data parallelism waits for a gradient of every parameter, zero here.
            logits = logits + 0 * self.residual_weight.sum().to(logits.dtype)
        if gating is not None:
            gating.leave(logits)
        return logits

    def _choose(self, scores: Tensor, preference: Tensor | None = None) -> tuple[Tensor, Tensor]:
        expert, weight = super()._choose(scores, preference)
        weight = weight * (expert < self.num_experts - self.zero)
        total = weight.sum(-1, keepdim=True)
        return expert, weight / total.where(total > 0, 1)
