"""What happened in a step, read off routing decisions that `zoo.moe.record` kept.

Nothing here runs unless it is called, and no layer computes anything for it: these are plain functions of a `Routing`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .routing import Routing


def load(routing: Routing) -> Tensor:
    """Share of the kept assignments that each expert got, [E]; sums to 1 (all zero when nothing was kept)."""
    counts = routing.counts.float()
    return counts / counts.sum().clamp(min=1)


def max_violation(routing: Routing) -> Tensor:
    """How far the busiest expert is above the mean load: max / mean - 1 (MaxVio of 2408.15664), 0 when even."""
    share = load(routing)
    return share.max() * share.numel() - 1


def weight_mass(routing: Routing) -> Tensor:
    """Share of the combine weight that each expert carries, [E]."""
    mass = routing.weight.detach().float().new_zeros(routing.num_experts)
    mass.index_add_(0, routing.expert_index, routing.weight.detach().float())
    return mass / mass.sum().clamp(min=torch.finfo(mass.dtype).tiny)


def kept_per_token(routing: Routing) -> Tensor:
    """How many experts each token met, [T]."""
    return torch.bincount(routing.token_index, minlength=routing.num_tokens)


def asked_per_token(routing: Routing) -> Tensor:
    """How many experts each token asked for, before capacity, [T]; a masked token asked for none."""
    asked = routing.asked
    if asked is None:
        return kept_per_token(routing)
    if isinstance(asked, int):
        return torch.full((routing.num_tokens,), asked, device=routing.token_index.device)
    return asked


def drop_rate(routing: Routing) -> Tensor:
    """Share of the assignments asked for that capacity dropped, a scalar."""
    asked = asked_per_token(routing).sum()
    return 1 - routing.token_index.numel() / asked.clamp(min=1) if asked else asked.float()


def drop_rate_by_position(routing: Routing, sequence_length: int) -> Tensor:
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


def entropy(routing: Routing) -> Tensor:
    """Mean entropy of the tokens' distributions over experts, in nats; log E is undecided, 0 is certain."""
    return _entropy(_probs(routing)).mean()


def mean_entropy(routing: Routing) -> Tensor:
    """Entropy of the mean distribution over experts, in nats; log E is balanced, 0 is collapsed."""
    return _entropy(_probs(routing).mean(0))


def _probs(routing: Routing) -> Tensor:
    """The distributions of the tokens that were routed, [T', E]."""
    if routing.probs is None:
        raise ValueError("this routing carries no probabilities: its router has no distribution over experts")
    probs = routing.probs.detach().float()
    return probs if isinstance(routing.asked, int) else probs[asked_per_token(routing) > 0]


def _entropy(probs: Tensor) -> Tensor:
    return torch.special.entr(probs).sum(-1)
