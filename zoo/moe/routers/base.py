"""What all gates share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from ..routing import Routing


class Router(nn.Module, ABC):
    """Decides which of `num_experts` experts each token of width `dim` meets, and with what weight.

    Context keywords a caller may pass, each optional: mask (True for real tokens; the others are not routed and
    do not count in any loss), token_ids. A router ignores what it does not use.
    """

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("num_experts", num_experts)):
            if value < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be at least 1, got {value}")
        self.dim, self.num_experts = dim, num_experts

    @abstractmethod
    def forward(self, x: Tensor, **context: Any) -> Routing:
        """Route tokens x [T, D], or [B, S, D] where sequences matter (T = B*S)."""
