"""What happened in a step, read off the decisions that `zoo.moe.record` kept.

Nothing here runs unless it is called, and no layer computes anything for it: these are plain functions of a `Routing`,
of `Slots` or of a `Blend`. With slots an expert's load is its share of the slots, which is even by construction; where
weights are merged no token goes to any expert, and the load is the share of the weights. Neither drops anything. A
token meets every expert whose weight is not zero, and its distribution over experts is that of its combine weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .blend import Blend
from .decision import Decision
from .routing import Routing
from .slots import Slots


def load(routing: Decision) -> Tensor:
    """Share of the kept assignments that each expert got, [E]; sums to 1 (all zero when nothing was kept)."""
    if isinstance(routing, Blend):
        return weight_mass(routing)
    counts = routing.counts.float()
    return counts / counts.sum().clamp(min=1)


def max_violation(routing: Decision) -> Tensor:
    """How far the busiest expert is above the mean load: max / mean - 1 (MaxVio of 2408.15664), 0 when even."""
    share = load(routing)
    return share.max() * share.numel() - 1


def weight_mass(routing: Decision) -> Tensor:
    """Share of the combine weight that each expert carries, [E]."""
    if not isinstance(routing, Routing):
        mass = routing.dense().detach().float().sum(0)
    else:
        mass = routing.weight.detach().float().new_zeros(routing.num_experts)
        mass.index_add_(0, routing.expert_index, routing.weight.detach().float())
    return mass / mass.sum().clamp(min=torch.finfo(mass.dtype).tiny)


def kept_per_token(routing: Decision) -> Tensor:
    """How many experts each token met, [T]."""
    if isinstance(routing, Blend):
        return (routing.dense() != 0).sum(-1)
    if not isinstance(routing, Slots):
        return torch.bincount(routing.token_index, minlength=routing.num_tokens)
    if routing.mask is not None:
        return routing.mask * routing.num_experts
    return torch.full((routing.num_tokens,), routing.num_experts, device=routing.combine.device)


def asked_per_token(routing: Decision) -> Tensor:
    """How many experts each token asked for, before capacity, [T]; a masked token asked for none."""
    asked = routing.asked if isinstance(routing, Routing) else None
    if asked is None:
        return kept_per_token(routing)
    if isinstance(asked, int):
        return torch.full((routing.num_tokens,), asked, device=routing.weight.device)
    return asked


def drop_rate(routing: Decision) -> Tensor:
    """Share of the assignments asked for that capacity dropped, a scalar; 0 where experts choose, and for slots."""
    asked = asked_per_token(routing).sum()
    return 1 - kept_per_token(routing).sum() / asked.clamp(min=1) if asked else asked.float()


def drop_rate_by_position(routing: Decision, sequence_length: int) -> Tensor:
    """Dropped share at each position of sequences packed as [B, S], [S]: OpenMoE's drop towards the end.

    Raises ValueError when the tokens are no whole number of sequences.
    """
    if sequence_length < 1 or routing.num_tokens % sequence_length:
        raise ValueError(
            f"drop_rate_by_position: {routing.num_tokens} tokens are no whole number of sequences of {sequence_length}"
        )
    asked = asked_per_token(routing).view(-1, sequence_length).sum(0)
    kept = kept_per_token(routing).view(-1, sequence_length).sum(0)
    return (asked - kept) / asked.clamp(min=1)


def entropy(routing: Decision) -> Tensor:
    """Mean entropy of the tokens' distributions over experts, in nats; log E is undecided, 0 is certain."""
    return entropies(routing).mean()


def entropies(routing: Decision) -> Tensor:
    """The entropy of every token's distribution over experts, in nats, [T'], tokens that were left out having none."""
    return _entropy(_probs(routing))


def mean_entropy(routing: Decision) -> Tensor:
    """Entropy of the mean distribution over experts, in nats; log E is balanced, 0 is collapsed."""
    return _entropy(_probs(routing).mean(0))


def _probs(routing: Decision) -> Tensor:
    """The distributions of the tokens that were routed, [T', E]."""
    if not isinstance(routing, Routing):
        probs = routing.dense().detach().float()
        probs = probs / probs.sum(-1, keepdim=True).clamp(min=torch.finfo(probs.dtype).tiny)
        return probs if routing.mask is None else probs[routing.mask]
    if routing.probs is None:
        raise ValueError("this routing carries no probabilities: its router has no distribution over experts")
    probs = routing.probs.detach().float()
    if isinstance(routing.asked, int):
        return probs
    # Where experts choose no token asks, and those left out have no distribution.
    return probs[probs.sum(-1) > 0 if routing.asked is None else asked_per_token(routing) > 0]


def _entropy(probs: Tensor) -> Tensor:
    return torch.special.entr(probs).sum(-1)


def similarity(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Least, largest and mean cosine similarity between different vectors of a set, [..., N, D] (N > 1); sets apart.

    What google-research/vmoe watches in Soft MoE, of the combine weights of tokens (`slots.combine.flatten(2)`), the
    dispatch weights of slots (`slots.dispatch.flatten(2).mT`) and μ (`router.weight.flatten(0, 1)`): all near 1 when
    slots have become the same.
    """
    unit = torch.nn.functional.normalize(vectors.detach().float(), dim=-1)
    pairs = unit @ unit.mT
    different = ~torch.eye(pairs.shape[-1], dtype=torch.bool, device=pairs.device)
    pairs = pairs[..., different]
    return pairs.min(), pairs.max(), pairs.mean()
