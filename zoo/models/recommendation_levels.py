"""Levels of experts that belong to tasks: CGC and PLE, and AdaTT.

B rows, K tasks, G groups of experts: one a task, and behind them the shared one; E experts in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..moe.expert_stack import ExpertStack
from ..moe.layer import Recorded
from ..moe.multi_gate import Gate, combine_matrix, mix
from .recommendation_sharing import gates


class Level(nn.Module):
    """Experts in groups, and a gate for every group that the next level, or a tower, wants.

    sees="own": a task's gate weighs its own and the shared experts, in this order, and the shared group's gate all
    experts (CGC and PLE; Tang et al., RecSys 2020, eq. 1 to 7). sees="all": every gate weighs all experts, and to what
    it gives comes a learnt combination of the group's own ones, with weights 1 where no group has more than one
    (AdaTT; 2304.04959, section 4).
    """

    owner: Tensor

    def __init__(
        self,
        dim: int,
        sizes: Sequence[int],
        hidden: Sequence[int],
        wanted: int,
        sees: Literal["own", "all"],
        router: Any,
        losses: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        tasks, owners = len(sizes) - 1, [group for group, size in enumerate(sizes) for _ in range(size)]
        self.register_buffer("owner", torch.tensor(owners), persistent=False)
        self.experts = ExpertStack(len(owners), dim, hidden, **options)
        # Which experts each gate sees, by number.
        self.gates = nn.ModuleList()
        for group in range(wanted):
            seen = [e for e, o in enumerate(owners) if sees == "all" or group == tasks or o in (group, tasks)]
            self.register_buffer(f"seen{group}", torch.tensor(seen), persistent=False)
            self.gates.append(Gate(gates(router, dim, len(seen), losses)()))
        self.residual = sees == "all"
        self.own = None
        if self.residual and max(sizes) > 1:
            bounds = [sizes[group] ** -0.5 for group in range(wanted)]
            self.own = nn.ParameterList(torch.empty(size).uniform_(-b, b) for size, b in zip(sizes[:wanted], bounds))
        starts = [0, *accumulate(sizes)]
        self._spans = [(starts[g], starts[g + 1]) for g in range(wanted)]

    def forward(self, x: Tensor) -> Tensor:
        """[wanted, B, O] from x [B, D], or from inputs of every group, [G, B, D]."""
        if x.dim() == 2:
            outputs, inputs = self.experts(x), [x] * len(self.gates)
        else:
            outputs = self.experts(x.index_select(0, self.owner).transpose(0, 1))
            inputs = list(x.unbind())
        rows = []
        for i, gate in enumerate(self.gates):
            weight, seen = combine_matrix(gate(inputs[i])), getattr(self, f"seen{i}")
            if len(seen) < self.experts.num_experts:
                weight = weight.new_zeros(weight.shape[0], self.experts.num_experts).index_add(1, seen, weight)
            if self.residual:
                start, end = self._spans[i]
                own = weight.new_ones(end - start) if self.own is None else self.own[i]
                weight = weight + nn.functional.pad(own, (start, self.experts.num_experts - end))
            rows.append(weight)
        return mix(torch.stack(rows), outputs)


class Levels(nn.Module):
    """`num_levels` levels of `task_experts` experts a task and `shared_experts` shared ones, each an MLP of `hidden`.

    One level of sees="own" is CGC, several are PLE; sees="all" is AdaTT, AdaTT-sp where no expert is shared. The shared
    group of the last level has no gate, since no tower wants it.
    """

    def __init__(
        self,
        dim: int,
        num_tasks: int,
        task_experts: int,
        shared_experts: int,
        hidden: Sequence[int],
        num_levels: int,
        sees: Literal["own", "all"],
        router: Any,
        losses: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("num_levels", num_levels, 1),
            ("task_experts", task_experts, 1),
            ("shared_experts", shared_experts, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.num_tasks = num_tasks
        sizes = [task_experts] * num_tasks + [shared_experts]
        groups = num_tasks + (shared_experts > 0)
        self.levels = nn.ModuleList()
        for level in range(num_levels):
            wanted = num_tasks if level == num_levels - 1 else groups
            self.levels.append(Level(dim, sizes, hidden, wanted, sees, router, losses, **options))
            dim = hidden[-1]
        self.out_dim = dim

    def forward(self, x: Tensor, domain: Tensor | None = None) -> Tensor:
        """[K, B, O] from x [B, D]."""
        for level in self.levels:
            x = level(x)
        return x

    def last_experts(self) -> ExpertStack:
        """Those of the last level."""
        last: Any = self.levels[-1]
        return last.experts

    def task_gates(self) -> list[Recorded]:
        """The gate of each task in the last level: over its own experts, then the shared ones; all of them in AdaTT."""
        last: Any = self.levels[-1]
        return list(last.gates)
