"""Gates of low-rank experts that read a label's learnt embedding, and not the token."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import autocast
from ..routing import Routing
from .base import Router
from .context import per_token
from .dense import DenseRouter


class TaskMixtureRouter(DenseRouter):
    """MOELoRA for medical tasks (2310.18339, section 3.4): weights softmax(W t) of all experts, t the task's embedding.

    Not to be confused with MoELoRA (2402.12851), whose gate chooses experts for each token. As weights are a task's,
    a task's experts can be merged into the layer they stand beside. Embeddings [num_tasks, task_dim] start from
    N(0, 1), W [E, task_dim] as `nn.Linear` does. Options as in `DenseRouter`. Context: the keyword `label`
    ("task"), a number for all, one a sequence [B] or one a token; mask. Raises ValueError without it and for a task out
    of range.
    """

    def __init__(
        self, dim: int, num_experts: int, *, num_tasks: int, task_dim: int = 64, label: str = "task", **options: Any
    ) -> None:
        if num_tasks < 1 or task_dim < 1:
            raise ValueError(f"TaskMixtureRouter: num_tasks={num_tasks} and task_dim={task_dim} must be at least 1")
        super().__init__(task_dim, num_experts, **options)
        self.dim, self.label, self.num_labels = dim, label, num_tasks
        self.task_embedding = nn.Parameter(torch.empty(num_tasks, task_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W uniformly within 1/sqrt(task_dim), and the embeddings from N(0, 1)."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        self.weight.uniform_(-bound, bound)
        if hasattr(self, "task_embedding"):  # not yet, when the parent class is made
            self.task_embedding.normal_()

    def forward(self, x: Tensor, **context: Any) -> Routing:
        """Weigh experts for tokens x [T, D] or [B, S, D] by their tasks alone."""
        with autocast.off(x):
            task = per_token(type(self).__name__, context, self.label, x, self.task_embedding.shape[0])
            table = _logits(self.task_embedding, self.weight, self.dtype)
            return self.route(F.embedding(task, table).view(*x.shape[:-1], self.num_experts), **context)


class MoCLERouter(Router):
    """MoCLE (2312.12379, section 3): the expert of a token's cluster, and one that is universal: g f_e + (1 - g) f_u.

    p = softmax(W c / temperature) of the embedding c of the cluster of instructions that a sample belongs to, e its
    largest and g = p_e; the universal expert u is the last of the E. Clusters come from k-means on embeddings of
    instructions, which is the caller's. Neither the weight 1 - g nor the temperature is checked against the paper.
    Embeddings [num_clusters, cluster_dim] start from N(0, 1), W [E - 1, cluster_dim] as `nn.Linear` does.

    Context: cluster, a number for all, one a sequence [B] or one a token; mask. Raises ValueError without it, for a
    cluster out of range, and for fewer than two experts.
    """

    k = 2
    label = "cluster"

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        num_clusters: int,
        cluster_dim: int = 64,
        temperature: float = 0.05,
        dtype: torch.dtype | None = torch.float32,
    ) -> None:
        super().__init__(dim, num_experts)
        if num_experts < 2 or num_clusters < 1 or cluster_dim < 1 or temperature <= 0:
            raise ValueError(
                f"MoCLERouter: expected two experts or more, a cluster and a width or more and a temperature above 0, "
                f"got {num_experts}, {num_clusters}, {cluster_dim} and {temperature}"
            )
        self.temperature, self.dtype, self.num_labels = temperature, dtype, num_clusters
        self.weight = nn.Parameter(torch.empty(num_experts - 1, cluster_dim))
        self.cluster_embedding = nn.Parameter(torch.empty(num_clusters, cluster_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W uniformly within 1/sqrt(cluster_dim), and the embeddings from N(0, 1)."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        self.weight.uniform_(-bound, bound)
        self.cluster_embedding.normal_()

    def forward(self, x: Tensor, **context: Any) -> Routing:
        """Route tokens x [T, D] or [B, S, D] by their clusters alone."""
        with autocast.off(x):
            cluster = per_token("MoCLERouter", context, self.label, x, self.cluster_embedding.shape[0])
            table = _logits(self.cluster_embedding, self.weight, self.dtype) / self.temperature
            probs = F.embedding(cluster, table.softmax(-1))
            gate, own = probs.max(-1, keepdim=True)
            weight = torch.cat([gate, 1 - gate], dim=-1)
            expert = torch.cat([own, torch.full_like(own, self.num_experts - 1)], dim=-1)
            mask = context.get("mask")
            if mask is None:
                return Routing.from_choices(expert, weight, self.num_experts)
            mask = mask.reshape(-1).bool()
            keep = mask[:, None].expand_as(expert)
            return Routing.from_choices(expert, weight, self.num_experts, keep=keep, asked=2 * mask)

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{self.dim}, num_experts={self.num_experts}, num_clusters={self.cluster_embedding.shape[0]}"


def _logits(embedding: Tensor, weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    if embedding.dtype != torch.float64:
        embedding = embedding.to(dtype or embedding.dtype)
    return F.linear(embedding, weight.to(embedding.dtype))
