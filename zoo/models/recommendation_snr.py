"""Sub-network routing (Ma et al., AAAI 2019): which sub-networks feed which is learnt, and ends up sparse.

B rows, K tasks, I sub-networks of a level, O units of their outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..moe import Router, Routing
from ..moe.expert_stack import ExpertStack
from ..moe.layer import Recorded
from ..moe.multi_gate import Gate, combine_matrix, everywhere


class HardConcreteRouter(Router):
    """One weight in [0, 1] an expert, the same for all tokens, exactly 0 or 1 with some probability.

    In training z = clamp(s (zeta - gamma) + gamma, 0, 1), s = sigmoid((logit(u) + log_alpha) / beta), u uniform and
    drawn anew each step; outside s = sigmoid(log_alpha) (Louizos et al. 1712.01312, eq. 10 to 13, whose beta = 2/3,
    gamma = -0.1 and zeta = 1.1 these are). Training adds the loss l0 = l0 * sum P(z > 0) (eq. 12).
    """

    BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1

    def __init__(self, dim: int, num_experts: int, *, l0: float = 1e-4) -> None:
        super().__init__(dim, num_experts)
        if l0 < 0:
            raise ValueError(f"HardConcreteRouter: l0 must be at least 0, got {l0}")
        self.l0 = l0
        self.log_alpha = nn.Parameter(torch.empty(num_experts).normal_(0, 0.01))

    def forward(self, x: Tensor, **context: Any) -> Routing:
        """Route tokens x [T, D]."""
        losses = {}
        if self.training:
            u = torch.empty_like(self.log_alpha).uniform_(1e-6, 1 - 1e-6)
            s = torch.sigmoid((u.logit() + self.log_alpha) / self.BETA)
            if self.l0:
                reach = torch.sigmoid(self.log_alpha - self.BETA * math.log(-self.GAMMA / self.ZETA))
                losses["l0"] = self.l0 * reach.sum()
        else:
            s = torch.sigmoid(self.log_alpha)
        z = (s * (self.ZETA - self.GAMMA) + self.GAMMA).clamp(0, 1)
        return everywhere(z.expand(x.shape[0], -1), losses=losses)


class SNRTrans(nn.Module):
    """Levels of sub-networks: input j of a level, and of the towers after the last, is sum_i z_ij W_ij u_i.

    u_i are the outputs of the level before, W_ij a matrix and z_ij from a hard concrete gate of input j (SNR-Trans, eq.
    6 and 7 with section "Sub-Network Routing with Transformation"). Sub-networks of the first level see x.
    """

    def __init__(
        self,
        dim: int,
        num_tasks: int,
        num_experts: int,
        hidden: Sequence[int],
        num_levels: int,
        l0: float = 1e-4,
        **options: Any,
    ) -> None:
        super().__init__()
        if num_levels < 1:
            raise ValueError(f"num_levels must be at least 1, got {num_levels}")
        self.num_tasks, self.out_dim = num_tasks, hidden[-1]
        width = self.out_dim
        self.subnetworks, self.connections = nn.ModuleList(), nn.ModuleList()
        for level in range(num_levels):
            self.subnetworks.append(ExpertStack(num_experts, dim if level == 0 else width, hidden, **options))
            wanted = num_tasks if level == num_levels - 1 else num_experts
            self.connections.append(_Connections(width, num_experts, wanted, l0))

    def forward(self, x: Tensor, domain: Tensor | None = None) -> Tensor:
        """[K, B, O] from x [B, D]."""
        for subnetworks, connections in zip(self.subnetworks, self.connections):
            own = x if x.dim() == 2 else x.transpose(0, 1)
            x = connections(subnetworks(own))
        return x

    def last_experts(self) -> ExpertStack:
        """The sub-networks of the last level."""
        last: Any = self.subnetworks[-1]
        return last

    def task_gates(self) -> list[Recorded]:
        """What feeds each task's tower."""
        last: Any = self.connections[-1]
        return list(last.gates)


class _Connections(nn.Module):
    """From every sub-network u_i to every input j of what comes next."""

    def __init__(self, width: int, num_experts: int, wanted: int, l0: float) -> None:
        super().__init__()
        self.gates = nn.ModuleList(Gate(HardConcreteRouter(width, num_experts, l0=l0)) for _ in range(wanted))
        bound = (num_experts * width) ** -0.5
        self.weight = nn.Parameter(torch.empty(wanted, num_experts, width, width).uniform_(-bound, bound))

    def forward(self, u: Tensor) -> Tensor:
        """[J, B, O] from the outputs u [B, I, O]."""
        fed = []
        for gate, weight in zip(self.gates, self.weight):
            z = combine_matrix(gate(u[:, 0])).to(u.dtype)  # [B, I]
            fed.append((z.unsqueeze(-1) * u).flatten(1) @ weight.flatten(0, 1))
        return torch.stack(fed)
