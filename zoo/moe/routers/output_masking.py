"""NLLB's expert output masking, for any gate that makes assignments."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..routing import Routing
from .base import Router
from .gshard import GShardRouter
from .wrapped import WrappingRouter


class OutputMaskingRouter(WrappingRouter):
    """Expert output masking (EOM; NLLB, 2207.04672): in training an expert's output for a token is left out.

    Each assignment gets weight zero with probability p, 0.2 in NLLB, on its own; outside training all weights are
    multiplied by 1 - p. Assignments, losses and loads are those of a gate of the class `gate`, or of that name,
    with the other options; NLLB's is the default, GShard's.

    Raises ValueError unless 0 <= p < 1, and TypeError where the gate's decisions are no assignments.
    """

    def __init__(
        self, dim: int, num_experts: int, *, p: float = 0.2, gate: type[Router] | str = GShardRouter, **options: Any
    ) -> None:
        if not 0 <= p < 1:
            raise ValueError(f"OutputMaskingRouter: expected 0 <= p < 1, got {p}")
        super().__init__(dim, num_experts, num_experts, gate, options)
        self.p = p

    def forward(self, x: Tensor, **context: Any) -> Routing:
        """Route tokens x as the inner gate does."""
        routing = self._inner(x, context)
        if not self.training:
            return replace(routing, weight=routing.weight * (1 - self.p))
        return replace(routing, weight=routing.weight * (torch.rand_like(routing.weight) >= self.p))

    def extra_repr(self) -> str:
        """Options for `print(model)`."""
        return f"p={self.p}"
