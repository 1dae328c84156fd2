"""What the tasks of a recommendation model share: from inputs x [B, D] to what each of K tasks' towers see, [K, B, O].

Every module has num_tasks K, out_dim O, `task_gates`, the gate of each task where tasks have gates, and `last_experts`,
the last MLPs that tasks share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..gates import gate_factory
from ..moe import Router
from ..moe.expert_stack import ExpertStack
from ..moe.layer import Recorded
from ..moe.multi_gate import MultiGateMoE


class SharedBottom(nn.Module):
    """One MLP for all tasks (Caruana 1997)."""

    def __init__(self, dim: int, num_tasks: int, hidden: Sequence[int], **options: Any) -> None:
        super().__init__()
        self.num_tasks, self.experts = num_tasks, ExpertStack(1, dim, hidden, **options)
        self.out_dim = self.experts.out_dim

    def forward(self, x: Tensor, domain: Tensor | None = None) -> Tensor:
        """[K, B, O] from x [B, D], the same for all tasks."""
        return self.experts(x).transpose(0, 1).expand(self.num_tasks, -1, -1)

    def last_experts(self) -> ExpertStack:
        """The bottom."""
        return self.experts

    def task_gates(self) -> list[Recorded]:
        """None."""
        return []


class SingleTask(nn.Module):
    """An MLP of its own for every task, on inputs of its own."""

    def __init__(self, dim: int, num_tasks: int, hidden: Sequence[int], **options: Any) -> None:
        super().__init__()
        self.num_tasks, self.experts = num_tasks, ExpertStack(num_tasks, dim, hidden, **options)
        self.out_dim = self.experts.out_dim

    def forward(self, x: Tensor, domain: Tensor | None = None) -> Tensor:
        """[K, B, O] from each task's x, [K, B, D]."""
        return self.experts(x.transpose(0, 1)).transpose(0, 1)

    def last_experts(self) -> None:
        """Nothing is shared."""

    def task_gates(self) -> list[Recorded]:
        """None."""
        return []


class MultiGate(nn.Module):
    """Experts under a gate a task (MMoE; Ma et al., KDD 2018, eq. 6 and 7), or under one for all (OMoE)."""

    def __init__(
        self,
        dim: int,
        num_tasks: int,
        num_experts: int,
        hidden: Sequence[int],
        router: Any,
        losses: Any = None,
        one_gate: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.num_tasks, self.one_gate = num_tasks, one_gate
        make = gates(router, dim, num_experts, losses)
        self.moe = MultiGateMoE(
            [make() for _ in range(1 if one_gate else num_tasks)], ExpertStack(num_experts, dim, hidden, **options)
        )
        self.out_dim = self.moe.experts.out_dim

    def forward(self, x: Tensor, domain: Tensor | None = None) -> Tensor:
        """[K, B, O] from x [B, D]."""
        y = self.moe(x)
        return y.expand(self.num_tasks, -1, -1) if self.one_gate else y

    def last_experts(self) -> ExpertStack:
        """The experts."""
        return self.moe.experts

    def task_gates(self) -> list[Recorded]:
        """The gate of each task; all the same one in OMoE."""
        own: list[Any] = list(self.moe.gates)
        return own * self.num_tasks if self.one_gate else own


def gates(router: Any, dim: int, num_experts: int, losses: Any = None) -> Callable[[], Router]:
    """A function that makes a new gate each time, of what a user says about it (see `zoo.gates.gate_factory`)."""
    return gate_factory(router, dim, num_experts, **({} if losses is None else {"losses": losses}))
