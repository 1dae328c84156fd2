"""What becomes of logits and scores before experts are chosen by them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def sqrt_softplus(logits: Tensor) -> Tensor:
    """sqrt(log(1 + e^z)), DeepSeek-V4's score of an expert; 0 with gradient 0 where e^z is lost."""
    tiny = torch.finfo(logits.dtype).tiny
    soft = F.softplus(logits)
    return soft.clamp(min=tiny).sqrt() * (soft >= tiny)


# Scores that an expert gets by itself, whatever the others'.
OF_EACH: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "sqrt_softplus": sqrt_softplus}


def standardized(logits: Tensor, scale: float) -> Tensor:
    """scale * (z - mean z) / std z over the experts of each token [T, E]; 0 where all are equal.

    Skywork-MoE (2406.06563, section 4.1), std unbiased as in the code of MoE++, which has the same option.
    """
    # By hand: var warns where there are no tokens. Selected before the root, or 0 would give a gradient of nan.
    centred = logits - logits.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / max(logits.shape[-1] - 1, 1)
    spread = variance > 1e-12
    return scale * centred * variance.where(spread, 1).rsqrt() * spread


def inside_best_groups(
    choice: Tensor, num_groups: int, group_topk: int, group_score: int | str, outside: float
) -> Tensor:
    """Scores [T, E] with the value `outside` for the experts outside each token's best groups."""
    grouped = choice.unflatten(-1, (num_groups, -1))
    if group_score == "max":
        best_of_group = grouped.amax(-1)
    else:
        best = 2 if group_score == "top2_sum" else int(group_score)
        best_of_group = grouped.topk(min(best, grouped.shape[-1]), dim=-1).values.sum(-1)
    chosen = best_of_group.topk(group_topk, dim=-1).indices
    allowed = torch.zeros_like(best_of_group, dtype=torch.bool).scatter_(-1, chosen, True)
    return grouped.masked_fill(~allowed.unsqueeze(-1), outside).flatten(-2)


def shares(scores: Tensor, eps: float) -> Tensor:
    """Scores [.., N] divided by their sum plus eps."""
    total = scores.sum(-1, keepdim=True) + eps
    if scores.dtype == torch.float16:
        total = total.where(total > 0, 1)  # an eps of 1e-20 is lost there, and so are sigmoids below 3e-8
    return scores / total
