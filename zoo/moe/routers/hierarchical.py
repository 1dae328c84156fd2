"""Two levels of choice: groups of experts first, then experts inside them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import autocast
from ..auxiliary import AuxiliaryLosses, choice_sources
from ..routing import Routing
from .base import Router
from .context import label_sources
from .topk import NOISE_FLOOR

LOSSES = {"importance": 0.1, "hierarchical_load": 0.1}


class HierarchicalRouter(Router):
    """Hierarchical mixture of experts (Shazeer 1701.06538, appendix B): y = sum_ij G_i(x) G_ij(x) f_ij(x).

    G is a noisy top-k gate over num_groups groups, G_i one over the E / num_groups experts of group i, each the softmax
    over the k largest of x W^T + N(0, 1) (softplus(x W_n^T) + 0.01); noise (unless noise=False) in training only, W and
    W_n zero at first. A token meets group_k groups and k experts in each. Losses, each with weight 0.1: importance of
    the products G_i G_ij and hierarchical_load. Experts of a group are neighbours. Context: mask.

    Parameters: group_weight [G, D], weight [E, D], and group_noise_weight, noise_weight of the same shapes.
    Raises ValueError where experts do not split into groups, or there are too few to choose from.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 2,
        *,
        num_groups: int,
        group_k: int = 2,
        noise: bool = True,
        losses: Mapping[str, float | Mapping[str, Any]] | None = LOSSES,
        dtype: torch.dtype | None = torch.float32,
    ) -> None:
        super().__init__(dim, num_experts)
        if num_groups < 1 or num_experts % num_groups:
            raise ValueError(f"HierarchicalRouter: {num_experts} experts do not split into num_groups={num_groups}")
        if not 1 <= group_k <= num_groups or not 1 <= k <= num_experts // num_groups:
            raise ValueError(
                f"HierarchicalRouter: expected 1 <= group_k <= {num_groups} groups and 1 <= k <= "
                f"{num_experts // num_groups} experts in each, got group_k={group_k}, k={k}"
            )
        self.k, self.num_groups, self.group_k, self.dtype = k, num_groups, group_k, dtype
        self.losses = AuxiliaryLosses(losses)
        self.group_weight = nn.Parameter(torch.empty(num_groups, dim))
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.group_noise_weight = nn.Parameter(torch.empty(num_groups, dim)) if noise else None
        self.noise_weight = nn.Parameter(torch.empty(num_experts, dim)) if noise else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Zero every matrix; without noise, which tells experts apart, draw them within 1/sqrt(dim)."""
        bound = 1 / math.sqrt(self.dim) if self.noise_weight is None else 0.0
        for weight in self.parameters():
            weight.uniform_(-bound, bound)

    def forward(self, x: Tensor, mask: Tensor | None = None, **context: Any) -> Routing:
        """Route tokens x [T, D] or [B, S, D]; mask [T] or [B, S], False for tokens to leave out."""
        # Autocast would round the logits, and with them the choice.
        if autocast.is_on(x):
            with autocast.off(x):
                return self.forward(x, mask, **context)
        given = x
        x = x.reshape(-1, self.dim).to(x.dtype if x.dtype == torch.float64 else self.dtype or x.dtype)
        if mask is not None:
            mask = mask.reshape(-1).bool()
            x = x.where(mask[:, None], 0)  # nan there would reach W's gradient
        outer, outer_noisy, outer_std = self._level(x, self.group_weight, self.group_noise_weight)
        shape = (self.num_groups, -1)
        inner, inner_noisy, inner_std = self._level(x, self.weight, self.noise_weight, shape)
        group_logit, group = outer_noisy.topk(self.group_k, dim=-1)
        inside = inner_noisy.gather(1, group.unsqueeze(-1).expand(-1, -1, inner.shape[-1]))
        logit, member = inside.topk(self.k, dim=-1)
        weight = (group_logit.softmax(-1).unsqueeze(-1) * logit.softmax(-1)).flatten(1)
        expert = (group.unsqueeze(-1) * (self.num_experts // self.num_groups) + member).flatten(1)
        probs = product(outer, inner)
        keep = None if mask is None else mask[:, None].expand_as(expert)
        losses = {}
        if self.training and self.losses.terms:
            noisy_probs = product(outer_noisy, inner_noisy)
            sources = choice_sources(probs, probs, None, expert, weight, mask, lambda: probs, lambda: noisy_probs)
            for name in ("logits", "noisy_logits", "noise_std", "k"):  # there are two of each
                del sources[name]
            sources |= label_sources("HierarchicalRouter", context, given, mask)
            entered = torch.zeros_like(outer).scatter(-1, group, 1.0)
            sources["entered"] = lambda: entered
            sources["level_logits"] = lambda: (outer, inner)
            sources["level_noisy"] = lambda: (outer_noisy, inner_noisy)
            sources["level_std"] = lambda: None if outer_std is None else (outer_std, inner_std)
            sources["level_k"] = lambda: (self.group_k, self.k)
            losses = self.losses(sources, {})
        return Routing.from_choices(
            expert,
            weight,
            self.num_experts,
            keep=keep,
            losses=losses,
            probs=probs,
            asked=expert.shape[1] if mask is None else expert.shape[1] * mask,
        )

    def _level(
        self, x: Tensor, weight: Tensor, noise_weight: Tensor | None, shape: tuple[int, ...] | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits of a level, with noise, and its width, [T, G] or [T, G, M]."""

        def project(matrix: Tensor) -> Tensor:
            out = F.linear(x, matrix.to(x.dtype))
            return out if shape is None else out.unflatten(-1, shape)

        logits = project(weight)
        if noise_weight is None or not self.training:
            return logits, logits, None
        std = F.softplus(project(noise_weight)) + NOISE_FLOOR
        return logits, logits + torch.randn_like(logits) * std, std

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{self.dim}, num_experts={self.num_experts}, num_groups={self.num_groups}, {self.group_k} x {self.k}"


def product(outer: Tensor, inner: Tensor) -> Tensor:
    """Probabilities of a group [T, G] and inside it [T, G, M] as those of experts, [T, E]."""
    return (outer.softmax(-1).unsqueeze(-1) * inner.softmax(-1)).flatten(1)
