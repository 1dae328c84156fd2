"""What all gates share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ..decision import Decision
from ..kernels import transformed


def is_recomputation() -> bool:
    """Whether this forward pass repeats one for activation checkpointing: then it runs inside a backward pass.

    Compiled code is told apart when it is traced, not when it runs: there torch.compile leaves recomputation out.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def added(before: Tensor | None, counted: Tensor) -> Tensor:
    """What was counted in earlier forward passes, None in the first, and in this one, to be kept by a gate."""
    counted = transformed.kept(counted)
    return counted if before is None else transformed.kept(before + counted)


@torch.no_grad()
def orthogonal_(weight: Tensor, gain: float = 1.0) -> None:
    """Fill with a matrix of orthogonal rows or columns of length `gain`; torch has it in 32 and 64 bits alone."""
    exact = torch.empty_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    weight.copy_(nn.init.orthogonal_(exact, gain))


def take_fixed(gate: nn.Module, options: dict[str, Any], **fixed: Any) -> None:
    """Take out of a caller's options what a gate fixes; raises ValueError, naming the gate, for another value."""
    for name, value in fixed.items():
        if name in options and (given := options.pop(name)) != value:
            raise ValueError(f"{type(gate).__name__}: {name} is {value!r} here, got {given!r}")


class Router(nn.Module, ABC):
    """Decides which of `num_experts` experts each token of width `dim` meets, and with what weight.

    Context keywords a caller may pass, each optional: mask (True for real tokens; the others are not routed and
    do not count in any loss), token_ids, causal (True where a token must not depend on later ones), and what single
    routers name, such as domain or task. A router ignores what it does not use.

    State that a forward pass in training moves, such as counts in a buffer, should stay where it is when
    `zoo.moe.is_recomputation()` says so: activation checkpointing runs the pass a second time.

    merges says that a decision averages experts into one (`Blend`), so that processes cannot share them out;
    unit_weights that every expert a token meets counts with weight one; label names the keyword of the context by which
    a gate goes instead of by x, a whole number below num_labels. of_tokens names parameters that are of what a gate
    reads, and have no row an expert.
    """

    merges = False
    unit_weights = False
    of_tokens: tuple[str, ...] = ()
    label = ""
    num_labels = 0

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("num_experts", num_experts)):
            if value < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be at least 1, got {value}")
        self.dim, self.num_experts = dim, num_experts

    @abstractmethod
    def forward(self, x: Tensor, **context: Any) -> Decision:
        """Route tokens x [T, D], or [B, S, D] where sequences matter (T = B*S)."""

    def together(self, decisions: list[Any]) -> dict[str, Tensor]:
        """Weighted losses of what all gates of this class decided in a step, which no layer can tell by itself."""
        return {}
