"""Balanced assignment: one expert a token, as many tokens an expert, the largest sum of scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.register import operator

SWEEPS = 16  # of the smoothed problem, which gives the auction its opening prices
SAMPLE = 2048  # tokens that prices are found on
WARM, COLD = 0.1, 0.003  # first and last temperature of the sweeps, in units of the scores' range


def balanced_assignment(
    scores: Tensor, tolerance: float = 2e-3, rounds: int = 64, mask: Tensor | None = None
) -> Tensor:
    """Expert of each token, [T] int64, from scores [T, E], so that the loads differ by one at most.

    An auction (Bertsekas 1988; BASE, 2103.16716, section 3.1): tokens without a place bid for the expert that is worth
    most to them at its price, an expert keeps its highest bidders and its price becomes the least bid it keeps. Opening
    prices come from the same problem with an entropy term (Sinkhorn), which is smooth and quick to solve; so few tokens
    are left after few rounds, and those take the best place that is free. With rounds enough for every token to win its
    place, the sum is within T * tolerance * (largest - least score) of the best; 64 are for training, where that costs
    about as much as one linear layer of width 1024.

    With T no multiple of E one token more goes to each of the experts of highest opening price. Scores that are not
    finite count as the least finite one. Tokens that mask [T] leaves out (False) do not count in T; theirs is E.
    An operator, so that torch.compile does not look inside.
    """
    return _op(scores.detach(), tolerance, rounds, mask)


def _balanced(scores: Tensor, tolerance: float, rounds: int, mask: Tensor | None) -> Tensor:
    if mask is None:
        return _assigned(scores, tolerance, rounds)
    nowhere = torch.full(scores.shape[:1], scores.shape[1], dtype=torch.int64, device=scores.device)
    return nowhere.masked_scatter(mask, _assigned(scores[mask], tolerance, rounds))


def _assigned(scores: Tensor, tolerance: float, rounds: int) -> Tensor:
    tokens, experts = scores.shape
    if experts == 1 or not tokens:
        return torch.zeros(tokens, dtype=torch.int64, device=scores.device)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    finite = scores.isfinite()
    lowest = scores.where(finite, math.inf).amin()
    scores = scores.where(finite, lowest if lowest.isfinite() else 0.0)
    span = (scores.amax() - scores.amin()).clamp(min=1e-6)
    price = _opening_prices(scores, span)
    if tokens < experts:  # the most wanted take one each
        wanted = price.topk(tokens).indices
        return wanted[_assigned(scores[:, wanted], tolerance, rounds)]
    places = torch.full((experts,), tokens // experts, dtype=torch.int64, device=scores.device)
    places[price.topk(tokens % experts).indices] += 1
    expert, price, homeless = _auction(scores, price, places, tolerance * span, rounds)
    return _settle(scores - price, expert, places, homeless)


def _opening_prices(scores: Tensor, span: Tensor) -> Tensor:
    """Prices [E] at which softmax((scores - price) / temperature) is about balanced."""
    tokens, experts = scores.shape
    sample = scores[:: max(tokens // SAMPLE, 1)]
    price = scores.new_zeros(experts)
    for i in range(SWEEPS):
        temperature = span * WARM * (COLD / WARM) ** (i / (SWEEPS - 1))
        share = ((sample - price) / temperature).softmax(-1).mean(0)
        price = price + temperature * (share.clamp(min=1e-9) * experts).log()
    return price


def _auction(
    scores: Tensor, price: Tensor, places: Tensor, increment: Tensor, rounds: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Expert of each token (E for none), prices, and the tokens without a place."""
    tokens, experts = scores.shape
    position = torch.arange(tokens, device=scores.device)
    expert = torch.full_like(position, experts)
    bid = scores.new_zeros(tokens)
    homeless = position
    for _ in range(rounds):
        if not homeless.numel():
            break
        value, best = (scores[homeless] - price).topk(2, dim=-1)
        choice = best[:, 0]
        bid[homeless] = price[choice] + (value[:, 0] - value[:, 1]) + increment
        expert[homeless] = choice
        contested = torch.zeros(experts + 1, dtype=torch.bool, device=scores.device)
        contested[choice] = True
        rivals = contested[expert].nonzero().squeeze(-1)
        rivals, start = _by_expert(rivals, expert[rivals], bid[rivals], experts)
        at = expert[rivals]
        homeless = rivals[position[: at.numel()] - start[at] >= places[at]]
        full = contested[:experts] & (start.diff() >= places)
        least = bid[rivals[(start[:-1] + places - 1).clamp(max=at.numel() - 1)]]
        price = torch.where(full, torch.maximum(price, least), price)
        expert[homeless] = experts
    return expert, price, homeless


def _settle(value: Tensor, expert: Tensor, places: Tensor, homeless: Tensor) -> Tensor:
    """Give tokens without a place the free one of largest value, those that value it most first."""
    experts = places.numel()
    free = places - torch.bincount(expert, minlength=experts + 1)[:experts]
    while homeless.numel():
        worth, choice = value[homeless].masked_fill(free == 0, -math.inf).max(-1)
        position = torch.arange(homeless.numel(), device=value.device)
        order, start = _by_expert(position, choice, worth, experts)
        at = choice[order]
        fits = position - start[at] < free[at]
        expert[homeless[order[fits]]] = at[fits]
        free = free - torch.bincount(at[fits], minlength=experts)
        homeless = homeless[order[~fits]]
    return expert


def _by_expert(items: Tensor, expert: Tensor, bid: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Items sorted by expert and then from the highest bid down, and where each expert's begin [E+1]."""
    order = bid.argsort(descending=True, stable=True)
    order = order[expert[order].argsort(stable=True)]
    bounds = torch.arange(experts + 1, device=expert.device)
    return items[order], torch.searchsorted(expert[order], bounds)


_op = operator(
    "balanced_assignment(Tensor scores, float tolerance, int rounds, Tensor? mask) -> Tensor",
    *(_balanced, lambda scores, *_: scores.new_empty(scores.shape[:1], dtype=torch.int64)),
)
