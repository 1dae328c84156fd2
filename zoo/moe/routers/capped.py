"""Expert choice with a cap: no token is to meet more than so many experts."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.register import operator

ROUNDS = 50
WARM, COLD = 0.1, 1e-3  # temperatures: the last is the paper's
COOLING = 0.8  # of the rounds


def capped_plan(scores: Tensor, places: int, cap: int, mask: Tensor | None = None) -> Tensor:
    """What experts choose by, [G, N, E], when no token shall meet more than `cap`, from scores [G, N, E] in 0..1.

    The logarithm of the A that maximises sum scores A + temperature H(A) where every expert takes `places` tokens of a
    group, sum_n A = places, no token meets more than its share, sum_e A <= cap, and 0 <= A <= 1 (2202.09368, capped
    variant): A = min(1, exp((scores - u - v) / temperature)), a price u an expert and v >= 0 a token being found in
    turn. The paper takes 100 rounds of Dykstra's projections at temperature 0.001; from cold these hardly move (of a
    64 x 8 problem's mass they find a sixteenth), so here it falls from 0.1 and each price is exact given the others.
    Masked tokens ([G, N], False) are wanted last. It has no gradient. An operator, so that torch.compile does not look
    inside.
    """
    return _op(scores.detach(), places, cap, mask)


def _plan(scores: Tensor, places: int, cap: int, mask: Tensor | None) -> Tensor:
    scores = scores.float()
    if mask is not None:
        scores = scores.where(mask.unsqueeze(-1), -1e4)
    of_expert = of_token = scores.new_zeros(())
    temperature = WARM
    for i in range(ROUNDS):
        temperature = WARM * (COLD / WARM) ** min(i / (COOLING * ROUNDS - 1), 1.0)
        of_expert = temperature * _level(((scores - of_token) / temperature).mT, places).mT
        of_token = (temperature * _level((scores - of_expert) / temperature, cap)).clamp(min=0)
    return ((scores - of_expert - of_token) / temperature).clamp(max=0).contiguous()


def _level(values: Tensor, total: int) -> Tensor:
    """The u at which sum min(1, exp(values - u)) over the last dimension is `total`, kept as one of size 1."""
    if total >= values.shape[-1]:
        return values.amin(-1, keepdim=True)
    ordered = values.sort(-1, descending=True).values
    # The m largest are cut off at 1: what is left, of the others, must make up total - m.
    rest = ordered.flip(-1).logcumsumexp(-1).flip(-1)[..., :total]
    level = rest - (total - torch.arange(total, device=values.device)).to(values.dtype).log()
    m = (ordered[..., :total] <= level).to(torch.uint8).argmax(-1, keepdim=True)
    return level.gather(-1, m)


def within_cap(scores: Tensor, chosen: Tensor, cap: int) -> Tensor:
    """Which of the tokens that experts chose [E, G, C] are among the `cap` best of their token, by scores [G, N, E]."""
    taken = torch.zeros_like(scores, dtype=torch.bool).permute(2, 0, 1).scatter(-1, chosen, True)
    ranked = scores.detach().permute(2, 0, 1).where(taken, -1.0)
    best = ranked.topk(min(cap, ranked.shape[0]), dim=0).indices
    kept = torch.zeros_like(taken).scatter(0, best, True)
    return kept.gather(-1, chosen)


_op = operator(
    "capped_plan(Tensor scores, SymInt places, int cap, Tensor? mask) -> Tensor",
    *(_plan, lambda scores, *_: scores.new_empty(scores.shape, dtype=torch.float32)),
)
