"""ReMoE: ReLU gates, sparse because an L1 term that adapts makes them so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import balance
from ..routing import Routing
from .base import added, is_recomputation
from .linear import LinearRouter


class ReMoERouter(LinearRouter):
    """ReMoE (2412.14711, section 3): weights are ReLU(x W^T), and a token meets the experts where that is positive.

    How many those are differs between tokens and is kept at k in the mean by the loss "l1" = lambda E / (k T^2) sum_e
    mass_e count_e (`balance.relu_l1`). lambda, the buffer `l1_coefficient`, starts at 1e-8 and is multiplied by 1.2 in
    every optimizer step in which fewer than 1 - k/E of all gates are zero, else divided (by `update_l1`, which
    `tasks.training.Task` calls); it is part of the state, and stays float32. Everything is differentiable, and nothing
    is chosen. Evaluation differs only in having no loss. `losses` may add others. Context: mask.

    Raises ValueError unless 1 <= k <= E and multiplier > 1.
    """

    l1_coefficient: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 1,
        *,
        coefficient: float = 1e-8,
        multiplier: float = 1.2,
        losses: Mapping[str, float | Mapping[str, Any]] | None = None,
        dtype: torch.dtype | None = torch.float32,
    ) -> None:
        if not 1 <= k <= num_experts or multiplier <= 1:
            raise ValueError(
                f"ReMoERouter: expected 1 <= k <= {num_experts} experts and multiplier > 1, got {k} and {multiplier}"
            )
        super().__init__(dim, num_experts, losses=losses, dtype=dtype)
        self.k, self.coefficient, self.multiplier = k, coefficient, multiplier
        self.register_buffer("l1_coefficient", torch.tensor(coefficient, dtype=torch.float32))
        # How many gates were positive, and of how many; not a buffer, since it differs between processes on purpose.
        self.met_since_update: Tensor | None = None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W uniformly within 1/sqrt(dim), and lambda begins anew."""
        super().reset_parameters()
        if hasattr(self, "l1_coefficient"):  # not yet, when the parent class is made
            self.l1_coefficient.fill_(self.coefficient)
            self.met_since_update = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ReMoERouter:
        before = self.l1_coefficient
        super()._apply(fn, recurse)
        after = self.l1_coefficient
        if after.dtype.itemsize < 4:
            # 1e-8 times 1.2 is lost in bfloat16: model.bfloat16() leaves this buffer float32.
            self.l1_coefficient = after.float() if before.is_meta else before.to(after.device)
        return self

    def route(self, logits: Tensor, mask: Tensor | None = None, **context: Any) -> Routing:
        """Decide from logits [T, E] or [B, S, E]."""
        logits, mask, split = self._flat(logits, mask)
        weight = logits.relu()
        met = weight > 0
        if mask is not None:
            met = met & mask[:, None]
        self._count(met, mask)
        total = weight.detach().sum(-1, keepdim=True)
        routing = Routing.from_matrix(weight, met, probs=weight.detach() / total.where(total > 0, 1))
        if self.training:
            l1 = balance.relu_l1(weight, met.to(weight.dtype), self.k, mask)
            routing.losses = {
                "l1": l1 * self.l1_coefficient.clone().to(l1.dtype),
                **self._losses(logits, weight, met, mask, split, context),
            }
        return routing

    @torch.no_grad()
    def _count(self, met: Tensor, mask: Tensor | None) -> None:
        """Remember how many gates were positive; a recomputation does not count."""
        if not self.training or is_recomputation():
            return
        tokens = torch.full((), met.shape[0], device=met.device) if mask is None else mask.sum()
        counted = torch.stack([met.sum(), tokens * self.num_experts])
        self.met_since_update = added(self.met_since_update, counted)


@torch.no_grad()
def update_l1(model: nn.Module) -> None:
    """Move the L1 coefficient of every ReMoE gate in `model` by one step, and forget what it was based on.

    Call once an optimizer step. As in the authors' code there is one sparsity, that of all gates, micro-batches and
    processes together: coefficients that are equal stay equal. A step without a token changes nothing.
    """
    gates = [module for module in model.modules() if isinstance(module, ReMoERouter)]
    if not gates:
        return
    total = torch.zeros(2, dtype=torch.float64, device=gates[0].l1_coefficient.device)
    for gate in gates:
        if gate.met_since_update is not None:
            total += gate.met_since_update.to(total.device)
            gate.met_since_update = None
    met, possible = balance.all_reduce(total)
    for gate in gates:
        dense = met / possible > gate.k / gate.num_experts
        factor = torch.where(dense, gate.multiplier, 1 / gate.multiplier).where(possible > 0, 1.0)
        gate.l1_coefficient.mul_(factor.to(gate.l1_coefficient.device))
