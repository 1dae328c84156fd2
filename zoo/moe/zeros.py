"""How much of what experts give is exactly zero: with ReLU, an expert that gives little else is dead.

HoME (2408.05430, section 2.1) found over 90% zeros in some experts of a trained MMoE; T tokens, E experts, O units.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .expert_stack import ExpertStack
from .routing import Routing


class ZeroActivations:
    """Zeros among the outputs of every `ExpertStack` in `module`, counted while a `watch` block runs."""

    def __init__(self, module: nn.Module) -> None:
        self._stacks = {name: m for name, m in module.named_modules() if isinstance(m, ExpertStack)}
        self.sums: dict[str, Tensor] = {}

    @contextmanager
    def watch(self, real: Tensor | None = None) -> Iterator[None]:
        """Count what passes during the block; of tokens that all experts meet, only those of `real` [T]."""

        def count(name: str) -> Any:
            def hook(stack: ExpertStack, inputs: tuple[Any, ...], output: Tensor) -> None:
                routing = inputs[1] if len(inputs) > 1 else None
                sums = _zeros(output.detach(), routing, stack.num_experts, real)
                self.sums[name] = self.sums[name] + sums if name in self.sums else sums

            return hook

        handles = [stack.register_forward_hook(count(name)) for name, stack in self._stacks.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def shares(self) -> dict[str, Tensor]:
        """Of each stack by its name, the share of zeros of every expert, [E]; nan for one that nothing came to."""
        return {name: zeros / count for name, (zeros, count) in self.sums.items()}


def _zeros(output: Tensor, routing: Routing | None, num_experts: int, real: Tensor | None) -> Tensor:
    """Zeros, and all outputs, of each expert, [2, E], from outputs [T, E, O] or, with a routing, [A, O]."""
    zeros = (output == 0).double().sum(-1)
    if routing is None:
        mask = torch.ones_like(zeros[:, 0]) if real is None else real.double()
        counts = mask.sum().expand(num_experts)
        found = mask @ zeros
    else:
        counts = routing.counts.double()
        found = counts.new_zeros(num_experts).index_add(0, routing.expert_index, zeros)
    return torch.stack([found, counts * output.shape[-1]])
