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

from .masked import cv_squared, everywhere, surprise, token_count, token_sum

IMAGE, TEXT = 0, 1  # modalities, as LIMoE's models give them


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
    some = (tokens > 0).to(probs.dtype)
    weight = some / some.sum(-2, keepdim=True).clamp(min=1)
    return ((weight * surprise(given)).sum(-2) - surprise((weight * given).sum(-2))).sum(-1).mean()


def local_entropy(
    probs: Tensor,
    modality: Tensor,
    only: int | Sequence[int],
    mask: Tensor | None = None,
    global_batch: bool = False,
) -> Tensor:
    """Mean entropy of the routing of a modality's tokens (LIMoE 2206.02770): every token sure of its expert.

    `only` names the modalities that the loss is for, several are summed; one without a token here adds nothing. LIMoE
    has it for text. `global_batch` takes the tokens of all processes: the value is that of one process with all of
    them, and so is the mean of the gradients over the processes, as data parallelism takes it.
    """
    return _of_each(only, modality, mask, lambda _, m: _mean(surprise(probs), m, global_batch)[0].sum(-1)).mean()


def global_entropy(
    probs: Tensor,
    modality: Tensor,
    only: int | Sequence[int],
    minimum: float | Sequence[float] | None = None,
    mask: Tensor | None = None,
    global_batch: bool = False,
) -> Tensor:
    """Minus the entropy of a modality's mean routing (LIMoE 2206.02770): the modality as a whole spread over experts.

    With `minimum` = S the thresholded form, max(0, log S - H): it is content once about S experts are used, the "soft
    minimum"; several are one for each modality in `only`. Without it all experts are wanted. `only` and `global_batch`
    as in `local_entropy`. Raises ValueError where there are not as many minima as modalities.
    """
    kinds = 1 if isinstance(only, int) else len(only)
    minima = [minimum] * kinds if minimum is None or isinstance(minimum, (int, float)) else list(minimum)
    if len(minima) != kinds:
        raise ValueError(f"global_entropy: {len(minima)} minima for {kinds} modalities; expected one each, or one")

    def spread(place: int, m: Tensor) -> Tensor:
        mean, tokens = _mean(probs, m, global_batch)
        entropy, least = surprise(mean).sum(-1), minima[place]
        return -entropy if least is None else (math.log(least) - entropy).clamp(min=0) * (tokens > 0).squeeze(-1)

    return _of_each(only, modality, mask, spread).mean()


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
    shares = token_sum(gates, mask)
    z = torch.where(same, shares * (1 + delta), shares * (1 - delta)).flatten()
    if not z.numel():
        return z.sum()
    return cv_squared(z, correction=1) if form == "code" else z.var(correction=0) / z.mean().clamp(min=1e-10)


def _of_each(
    only: int | Sequence[int], label: Tensor, mask: Tensor | None, loss: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Sum over the labels in `only` of loss(place in `only`, which tokens have the label), a group each."""
    labels = (only,) if isinstance(only, int) else tuple(only)
    found = []
    for place, value in enumerate(labels):
        here = label == value if mask is None else (label == value) & mask
        found.append(loss(place, here))
    return torch.stack(found).sum(0)


def _mean(values: Tensor, mask: Tensor, global_batch: bool) -> tuple[Tensor, Tensor]:
    """Mean over tokens, [..., E], and how many there are, [..., 1]."""
    total, tokens = everywhere(token_sum(values, mask), global_batch), token_count(values, mask)
    tokens = everywhere(tokens, global_batch)
    return total / tokens.clamp(min=1), tokens
