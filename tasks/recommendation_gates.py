"""Which experts each task of a recommendation model uses: the mean weight that its gate gives to every expert."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from zoo.moe import Routing, Step


class TaskGates:
    """Sums of the weights of every task's gate over the rows added so far.

    In `model.task_gates()` order of experts: those that the gate chooses from, so of PLE the task's own, then the
    shared ones. Models without gates have none.
    """

    def __init__(self, model: Any) -> None:
        names = {id(module): name for name, module in model.named_modules()}
        self._gates = {task: names[id(gate)] for task, gate in model.task_gates().items()}
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, step: Step, real: Tensor) -> None:
        """Add what the gates of `step` decided for the rows [B] that are real."""
        routings = step.routings
        for task, name in self._gates.items():
            for routing in routings[name]:
                assert isinstance(routing, Routing)
                weight = routing.weight.double() * real[routing.token_index]
                sums = weight.new_zeros(routing.num_experts + 1)
                sums.index_add_(0, routing.expert_index, weight)
                sums[-1] = real.sum()
                self._sums[task] = self._sums[task] + sums if task in self._sums else sums

    def compute(self) -> dict[str, float]:
        """Mean weights by "gate/<task>/<expert>", over all processes, which must call it together."""
        if not self._sums:
            return {}
        flat = torch.cat(list(self._sums.values()))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(flat)
        figures = {}
        for task, sums in zip(self._sums, flat.cpu().split([len(s) for s in self._sums.values()])):
            means = sums[:-1] / sums[-1].clamp(min=1)
            figures.update({f"gate/{task}/{expert}": value for expert, value in enumerate(means.tolist())})
        return figures
