"""M3oE (Zhang et al., SIGIR 2024, 2404.18465): shared, domain and task experts for many tasks in many domains.

B rows, K tasks, M domains, O units of what an expert gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..moe.expert_stack import ExpertStack
from ..moe.layer import Recorded
from ..moe.multi_gate import Gate, combine_matrix
from .recommendation_sharing import gates


class M3oE(nn.Module):
    """For a row of domain d, task t sees shared + a_d domain + a_t task, as its authors' code computes them.

    h = layer(x (W ∘ W_d) + b + b_d) + skip(x); shared = sum_e gate_(d,t)(h)_e f_e(h), with no gradient into h from
    the gates; domain = c_d f_d(h) + (1 - c_d) mean of the other domains' experts, and task likewise with c_t. a_d, a_t,
    c_d and c_t are the sigmoids of single learnt numbers, which start at `start`. Every layer is linear, layer norm,
    ReLU. The paper searches those four by bi-level optimisation on validation batches; here they train with the rest.
    """

    def __init__(
        self,
        dim: int,
        num_tasks: int,
        num_domains: int,
        num_experts: int,
        bottom: Sequence[int],
        hidden: Sequence[int],
        router: Any,
        losses: Any = None,
        dropout: float = 0.0,
        start: float = 0.5,
    ) -> None:
        super().__init__()
        if len(bottom) != 2:
            raise ValueError(f"M3oE: expected two widths in bottom_dims, got {list(bottom)}")
        self.num_tasks, self.num_domains, self.out_dim = num_tasks, num_domains, hidden[-1]
        first, width = bottom
        options: dict[str, Any] = {"norm": "layer", "dropout": dropout}
        self.shared_weight = nn.Parameter(torch.empty(dim, first))
        self.shared_bias = nn.Parameter(torch.zeros(first))
        self.domain_weight = nn.Parameter(torch.empty(num_domains, dim, first))
        self.domain_bias = nn.Parameter(torch.zeros(num_domains, first))
        for weight in (self.shared_weight, *self.domain_weight):
            nn.init.xavier_uniform_(weight)
        self.layer, self.skip = ExpertStack(1, first, [width], **options), ExpertStack(1, dim, [width], **options)
        self.experts = ExpertStack(num_experts, width, hidden, **options)
        self.domain_experts = ExpertStack(num_domains, width, hidden, **options)
        self.task_experts = ExpertStack(num_tasks, width, hidden, **options)
        make = gates(router, width, num_experts, losses)
        # Task by task, the gates of all domains.
        self.gates = nn.ModuleList(Gate(make()) for _ in range(num_tasks * num_domains))
        self.weigh_domain, self.weigh_task, self.keep_domain, self.keep_task = (
            nn.Parameter(torch.tensor(start).logit()) for _ in range(4)
        )

    def forward(self, x: Tensor, domain: Tensor | None = None) -> Tensor:
        """[K, B, O] from x [B, D] and domain [B]."""
        rows = x.shape[0]
        domain = torch.zeros(rows, dtype=torch.long, device=x.device) if domain is None else domain
        weight = (self.shared_weight * self.domain_weight).transpose(0, 1).flatten(1)  # [D, M * first]
        starred = (x @ weight).unflatten(1, (self.num_domains, -1)) + self.domain_bias + self.shared_bias
        h = self.layer(_of(starred, domain))[:, 0] + self.skip(x)[:, 0]

        still = h.detach()
        weights = torch.stack([combine_matrix(gate(still)) for gate in self.gates])
        weights = weights.unflatten(0, (self.num_tasks, self.num_domains)).permute(2, 1, 0, 3)  # [B, M, K, E]
        shared = torch.bmm(_of(weights, domain).to(h.dtype), self.experts(h))  # [B, K, O]
        by_domain = _of(_balanced(self.domain_experts(h), self.keep_domain.sigmoid()), domain)
        by_task = _balanced(self.task_experts(h), self.keep_task.sigmoid())
        fused = shared + self.weigh_domain.sigmoid() * by_domain.unsqueeze(1) + self.weigh_task.sigmoid() * by_task
        return fused.transpose(0, 1)

    def last_experts(self) -> ExpertStack:
        """Those that all tasks and domains share."""
        return self.experts

    def task_gates(self) -> list[Recorded]:
        """The gate of each task in the first domain."""
        return [gates[0] for gates in self.domain_gates()]

    def domain_gates(self) -> list[list[Recorded]]:
        """The gates of each task, one a domain."""
        own: list[Any] = list(self.gates)
        return [own[i : i + self.num_domains] for i in range(0, len(own), self.num_domains)]


def _of(choices: Tensor, which: Tensor) -> Tensor:
    """choices[b, which[b]] of choices [B, M, ...]."""
    index = which.view(-1, *[1] * (choices.dim() - 1)).expand(-1, 1, *choices.shape[2:])
    return choices.gather(1, index).squeeze(1)


def _balanced(outputs: Tensor, keep: Tensor) -> Tensor:
    """keep f_i + (1 - keep) mean of the others, for outputs [B, N, O]; f_i alone keeps all."""
    count = outputs.shape[1]
    if count == 1:
        return keep * outputs
    others = (outputs.sum(1, keepdim=True) - outputs) / (count - 1)
    return torch.lerp(others, outputs, keep)
