"""Losses on routing that know what kind a token is of: its task, its modality, the type of its sample.

Tensors are those of `zoo.moe.balance`; labels [..., T] are whole numbers, and reach a router by the context keyword of
the same name, one a token or one a sequence: moe(x, modality=...).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from .masked import cv_squared, surprise, token_count, token_sum


def task_mutual_information(probs: Tensor, task: Tensor, num_tasks: int, mask: Tensor | None = None) -> Tensor:
    """-I(E; task): minus the information that a token's task gives about its expert (Mod-Squad 2212.08066, section 3).

    task [..., T] in 0..num_tasks-1. P(e | task) is the mean of its tokens' probabilities, and tasks count alike, as in
    the paper, those without a token here not at all.
    """
    member = torch.nn.functional.one_hot(task, num_tasks).to(probs.dtype)
    if mask is not None:
        member, probs = member * mask.unsqueeze(-1), probs.where(mask.unsqueeze(-1), 0)
    tokens = member.sum(-2).unsqueeze(-1)
    given = member.transpose(-1, -2) @ probs / tokens.clamp(min=1)
    weight = (tokens > 0) / (tokens > 0).sum(-2, keepdim=True).clamp(min=1)
    return ((weight * surprise(given)).sum(-2) - surprise((weight * given).sum(-2))).sum(-1).mean()


def local_entropy(probs: Tensor, modality: Tensor, only: int | Sequence[int], mask: Tensor | None = None) -> Tensor:
    """Mean entropy of the routing of a modality's tokens (LIMoE 2206.02770): every token sure of its expert.

    `only` names the modalities that the loss is for, several are summed; one without a token here adds nothing. LIMoE
    has it for text.
    """
    return _of_each(only, probs, modality, mask, lambda p, m: _mean(surprise(p), m).sum(-1))


def global_entropy(
    probs: Tensor,
    modality: Tensor,
    only: int | Sequence[int],
    minimum: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Minus the entropy of a modality's mean routing (LIMoE 2206.02770): the modality as a whole spread over experts.

    With `minimum` = S the thresholded form, max(0, log S - H): it is content once about S experts are used, the "soft
    minimum"; without it all experts are wanted. `only` as in `local_entropy`.
    """

    def spread(p: Tensor, m: Tensor) -> Tensor:
        entropy = surprise(_mean(p, m)).sum(-1)
        return -entropy if minimum is None else (math.log(minimum) - entropy).clamp(min=0) * m.any(-1)

    return _of_each(only, probs, modality, mask, spread)


def localized_balance(
    gates: Tensor,
    sample_type: Tensor,
    delta: float,
    form: Literal["code", "paper"] = "code",
    mask: Tensor | None = None,
) -> Tensor:
    """LoRAMoE's localized balancing (2312.09979): dispersion of Z = I Q over samples and experts together.

    Q [B, E] is what the tokens of a sample give an expert, gates [B, S, E] summed; I is 1 + delta where the sample's
    type is the expert's and 1 - delta elsewhere. The first half of the experts is of type 1, the other of type 0, as in
    the code; a sample has the type of its tokens, sample_type [B, S]. "code", the default as the authors' code is what
    ran, has the unbiased variance over the squared mean (plus 1e-10), "paper" the variance over the mean.

    It is least where Z is even, so that experts with the factor 1 + delta end up with *less* weight, against what the
    paper means by it: with delta > 0 as published a sample turns to experts of the other type, with delta < 0 to its
    own. Raises ValueError for an odd number of experts.
    """
    experts = gates.shape[-1]
    if experts % 2:
        raise ValueError(f"localized_balance: {experts} experts do not split into two halves")
    if mask is not None:
        sample_type = sample_type.where(mask, 0)
    if form not in ("code", "paper"):
        raise ValueError(f"localized_balance: form must be 'code' or 'paper', got {form!r}")
    same = (sample_type.sum(-1, keepdim=True) > 0) == (torch.arange(experts, device=gates.device) < experts // 2)
    z = (token_sum(gates, mask) * torch.where(same, 1 + delta, 1 - delta)).flatten()
    if not z.numel():
        return z.sum()
    return cv_squared(z, correction=1) if form == "code" else z.var(correction=0) / (z.mean() + 1e-10)


def _of_each(
    only: int | Sequence[int],
    probs: Tensor,
    label: Tensor,
    mask: Tensor | None,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Sum over the labels in `only` of loss(probs, which tokens have the label), groups averaged."""
    total = probs.new_zeros(probs.shape[:-2])
    for value in (only,) if isinstance(only, int) else only:
        here = label == value if mask is None else (label == value) & mask
        total = total + loss(probs, here)
    return total.mean()


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return token_sum(values, mask) / token_count(values, mask).clamp(min=1)
