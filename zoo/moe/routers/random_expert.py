"""THOR: experts drawn at random, nothing learnt by the gate."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..routing import Routing
from .base import Router
from .context import to_experts

Level = Literal["batch", "sentence", "token", "partition"]


class RandomRouter(Router):
    """THOR (2110.04260): no gate, one uniformly random expert with weight one, y = f_e(x), e ~ U{1..E}.

    train_level is what one draw is for in training: the whole "batch", a draw a layer and forward pass, as in the
    authors' code (the default), or each "sentence" ("randomly activated for each input", as the paper's text reads) or
    "token", or a "partition": tokens in random order are cut into parts, one an expert, whose sizes differ by one at
    most (EWA, 2308.06093: random uniform partition). inference_level is the same outside training: "token" by default,
    "sentence" as in the code's other mode.
    Draws come from torch's generator of the device, so that the seed decides. THOR trains with two passes a batch and
    `zoo.moe.balance.consistency` between their outputs; the paper's models have 2 experts in every other layer.

    A sentence is a row of [B, S, D]. Context: mask. Raises ValueError for an unknown level, and for sentences where the
    tokens came as one list.
    """

    k = 1
    unit_weights = True

    def __init__(
        self, dim: int, num_experts: int, *, train_level: Level = "batch", inference_level: Level = "token"
    ) -> None:
        super().__init__(dim, num_experts)
        for name, level in (("train_level", train_level), ("inference_level", inference_level)):
            if level not in get_args(Level):
                raise ValueError(f"RandomRouter: {name} must be one of {get_args(Level)}, got {level!r}")
        self.train_level, self.inference_level = train_level, inference_level

    def forward(self, x: Tensor, **context: Any) -> Routing:
        """Draw experts for tokens x [T, D] or [B, S, D]."""
        level = self.train_level if self.training else self.inference_level
        tokens = math.prod(x.shape[:-1])
        if level == "sentence" and x.dim() != 3:
            raise ValueError("RandomRouter: one draw a sentence needs tokens as [B, S, D], got one list of tokens")
        if level == "partition":
            # Which experts get one more is drawn too.
            order = torch.randperm(self.num_experts, device=x.device)
            expert = order[torch.randperm(tokens, device=x.device) % self.num_experts]
            return to_experts(expert, self.num_experts, x, context.get("mask"))
        draws = {"batch": 1, "sentence": x.shape[0], "token": tokens}[level]
        drawn = torch.randint(self.num_experts, (draws, 1), device=x.device)
        expert = drawn.expand(-1, tokens // max(draws, 1)).reshape(-1)
        return to_experts(expert, self.num_experts, x, context.get("mask"))

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        levels = f"train_level={self.train_level!r}, inference_level={self.inference_level!r}"
        return f"{self.dim}, num_experts={self.num_experts}, {levels}"
