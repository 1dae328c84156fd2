"""What a router hands on: which tokens meet which experts, and how much each result counts.

T tokens, E experts, K choices a token, A assignments (token, expert) that were kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .kernels import transformed
from .kernels.choices import sort_choices
from .kernels.portable import expert_of_rows


@dataclass
class Routing:
    """A sparse decision: A assignments sorted by expert and, within an expert, in token order.

    token_index [A] int64; offsets [E+1] int32, the assignments of expert e being offsets[e]:offsets[e+1];
    weight [A], the differentiable combine weights; losses, weighted scalars ready to add to the objective.
    place [T, K] int32 is the assignment of each choice where every token has K, None where it is not known.
    For telemetry only: probs [T, E], the router's distribution before any choice, and asked [T] or a number,
    how many experts each token asked for before capacity dropped some.
    """

    token_index: Tensor
    offsets: Tensor
    weight: Tensor
    num_tokens: int
    losses: dict[str, Tensor] = field(default_factory=dict)
    probs: Tensor | None = None
    asked: Tensor | int | None = None
    place: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """E, the number of experts."""
        return self.offsets.numel() - 1

    @property
    def counts(self) -> Tensor:
        """Assignments kept per expert, [E] int32."""
        return self.offsets.diff()

    @property
    def expert_index(self) -> Tensor:
        """Expert of every assignment, [A] int64."""
        return expert_of_rows(self.offsets, self.token_index.numel())

    def dense(self) -> Tensor:
        """The same decision as a matrix [T, E] of combine weights, zero where a token is not sent."""
        out = self.weight.new_zeros(self.num_tokens * self.num_experts)
        flat = self.token_index * self.num_experts + self.expert_index
        return out.index_add(0, flat, self.weight).view(self.num_tokens, self.num_experts)

    def apply(self, x: Tensor, experts: Callable[[Tensor, Routing], Tensor]) -> Tensor:
        """Run tokens x [T, D] through stacked experts; tokens without an expert give zero."""
        return experts(x, self)

    @classmethod
    def from_choices(
        cls,
        expert: Tensor,
        weight: Tensor,
        num_experts: int,
        *,
        keep: Tensor | None = None,
        losses: dict[str, Tensor] | None = None,
        probs: Tensor | None = None,
        asked: Tensor | int | None = None,
    ) -> Routing:
        """Build from each token's choices: expert [T, K] int64, weight [T, K], keep [T, K] bool or None.

        asked is K for every token where it is not given, so that what keep leaves out counts as dropped; a gate that
        leaves out padding says asked [T], 0 there.
        """
        choices = sort_choices(expert, weight, num_experts, keep)
        return cls(
            token_index=choices.token_index,
            offsets=choices.offsets,
            weight=choices.weight,
            num_tokens=expert.shape[0],
            losses=losses or {},
            probs=probs,
            asked=expert.shape[1] if asked is None else asked,
            place=choices.place,
        )

    @classmethod
    def from_matrix(cls, weight: Tensor, keep: Tensor, **extra: object) -> Routing:
        """Build from a matrix of combine weights [T, E] and a mask [T, E] of the assignments that exist."""
        if transformed.is_batched(keep):
            # Under vmap sizes hang on no values: what does not exist stays, without weight.
            weight, keep = weight.where(keep, 0), torch.ones(keep.shape, dtype=torch.bool, device=keep.device)
        expert, token = keep.T.nonzero(as_tuple=True)
        offsets = torch.zeros(weight.shape[1] + 1, dtype=torch.int32, device=weight.device)
        offsets[1:] = keep.sum(0).cumsum(0)
        return cls(token, offsets, weight[token, expert], weight.shape[0], **extra)  # type: ignore[arg-type]


def count_experts(expert: Tensor, num_experts: int) -> Tensor:
    """How often each expert occurs in `expert` (any shape), [E] int64; id num_experts is not counted."""
    # bincount synchronises with the host on a GPU; a scatter does not.
    flat = expert.reshape(-1)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert.device)
    return counts.scatter_add(0, flat, torch.ones_like(flat))[:num_experts]
