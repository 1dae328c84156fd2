"""What the experts of a recommendation model do for its tasks: how gates weigh them, and how much they give is zero."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from zoo.moe import Routing, Step, record
from zoo.moe.zeros import ZeroActivations


class ExpertUse:
    """Sums over the rows of an evaluation, of the weights in every task's gate and of zeros in what experts give.

    A gate weighs the experts it chooses from: in PLE the task's own, then the shared ones. Where domains have gates of
    their own, as in M3oE, a row counts with its domain's. Models without gates have zeros alone.
    """

    def __init__(self, model: Any) -> None:
        names = {id(module): name for name, module in model.named_modules()}
        self._model, self._zeros = model, ZeroActivations(model.sharing)
        self._gates = {task: [names[id(gate)] for gate in gates] for task, gates in model.domain_gates().items()}
        self._sums: dict[str, Tensor] = {}

    @contextmanager
    def watch(self, real: Tensor, domain: Tensor | None = None) -> Iterator[Step]:
        """Add what the model does in the block for the rows [B] that are real, of `domain` [B]; gives the step."""
        with record(self._model) as step, self._zeros.watch(real):
            yield step
        routings = step.routings
        with torch.no_grad():
            for task, names in self._gates.items():
                for number, name in enumerate(names):
                    rows = real if len(names) == 1 or domain is None else real & (domain == number)
                    for routing in routings[name]:
                        assert isinstance(routing, Routing)
                        sums = _weights(routing, rows)
                        self._sums[task] = self._sums[task] + sums if task in self._sums else sums

    def compute(self) -> dict[str, float]:
        """Mean weights by "gate/<task>/<expert>" and shares of zeros by "zeros/<experts>/<expert>".

        Over all processes, which must call it together.
        """
        if dist.is_available() and dist.is_initialized():
            for sums in (*self._sums.values(), *self._zeros.sums.values()):
                dist.all_reduce(sums)
        found = {f"gate/{task}": sums[:-1] / sums[-1] for task, sums in self._sums.items()}
        found |= {f"zeros/{name}": shares for name, shares in self._zeros.shares().items()}
        return {f"{name}/{i}": value for name, values in found.items() for i, value in enumerate(values.tolist())}


def _weights(routing: Routing, real: Tensor) -> Tensor:
    """Summed weights of the experts, and rows, [E + 1]."""
    weight = routing.weight.double() * real[routing.token_index]
    sums = weight.new_zeros(routing.num_experts + 1)
    sums.index_add_(0, routing.expert_index, weight)
    sums[-1] = real.sum()
    return sums
