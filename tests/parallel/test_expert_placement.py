"""Experts in an order in which those chosen together are neighbours: the same model, and fewer rows on their way."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.moe import Experts, MoE, record
from zoo.moe.routers import ExpertChoiceRouter, TopKRouter
from zoo.parallel.placement import choices, crossings, place, reorder


def drawn(pairs: list[tuple[int, ...]], experts: int, tokens: int = 200, noise: float = 0.1) -> Tensor:
    """Tokens that choose one of some sets of experts, but for a few that choose anything."""
    torch.manual_seed(0)
    chosen = torch.zeros(tokens, experts, dtype=torch.bool)
    for t in range(tokens):
        own = pairs[t % len(pairs)]
        if torch.rand(()) < noise:
            own = tuple(torch.randperm(experts)[: len(own)].tolist())
        chosen[t, list(own)] = True
    return chosen


def by_loop(chosen: Tensor, order: Tensor, processes: int) -> int:
    part = chosen.shape[1] // processes
    holder = {int(e): i // part for i, e in enumerate(order)}
    return sum(len({holder[e] for e in row.nonzero().flatten().tolist()}) for row in chosen)


def test_crossings_are_those_of_a_loop() -> None:
    chosen = torch.rand(50, 8) < 0.3
    for processes in (1, 2, 4, 8):
        order = torch.randperm(8)
        assert crossings(chosen, order, processes) == by_loop(chosen, order, processes)


@pytest.mark.parametrize("pairs", [[(0, 5), (1, 4), (2, 7), (3, 6)], [(0, 3, 6), (1, 4, 7), (2, 5, 8)]], ids=str)
def test_experts_chosen_together_become_neighbours(pairs: list[tuple[int, ...]]) -> None:
    experts, size = len(pairs) * len(pairs[0]), len(pairs[0])
    chosen = drawn(pairs, experts)
    order = place(chosen, len(pairs))
    assert {frozenset(part) for part in order.view(-1, size).tolist()} == {frozenset(p) for p in pairs}
    plain = crossings(chosen, torch.arange(experts), len(pairs))
    assert crossings(chosen, order, len(pairs)) < 0.65 * plain


def test_two_choices_of_six_experts_are_placed_as_well_as_any_order_does() -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        weights = torch.rand(6, 6)
        pairs = torch.multinomial(weights.triu(1).flatten(), 60, replacement=True)
        chosen = torch.zeros(60, 6, dtype=torch.bool)
        chosen[torch.arange(60), pairs // 6] = chosen[torch.arange(60), pairs % 6] = True
        best = min(crossings(chosen, torch.tensor(p), 3) for p in permutations(range(6)))
        found = crossings(chosen, place(chosen, 3), 3)
        assert found <= crossings(chosen, torch.arange(6), 3)
        assert found <= 1.05 * best


def layer() -> MoE:
    options: dict[str, Any] = {"selection_bias": True, "bias": True, "losses": {"switch": 0.1}}
    router = TopKRouter(6, 8, 2, **options)
    torch.nn.init.normal_(router.selection_bias, std=0.05)
    return MoE(router, Experts(8, 6, 5, "swiglu", bias=True)).double()


def test_a_reordered_layer_is_the_same_layer_with_fewer_crossings() -> None:
    torch.manual_seed(1)
    moe, x = layer(), torch.randn(300, 6, dtype=torch.float64)
    with record(moe) as step:
        before = moe(x)
    ((routing,),) = step.routings.values()
    chosen = choices(routing)
    assert torch.equal(chosen.sum(1), torch.full((300,), 2))
    order = place(chosen, 4)
    reorder(moe, order)
    with record(moe) as after:
        torch.testing.assert_close(moe(x), before)
    ((again,),) = after.routings.values()
    assert torch.equal(choices(again), chosen[:, order])
    torch.testing.assert_close(after.losses(), step.losses())
    plain = torch.arange(8)
    assert crossings(choices(again), plain, 4) == crossings(chosen, order, 4) < crossings(chosen, plain, 4)


def test_what_has_no_order_to_change_is_refused() -> None:
    with pytest.raises(ValueError, match="8 experts do not divide over 3 processes"):
        place(torch.ones(2, 8, dtype=torch.bool), 3)
    moe = layer()
    with pytest.raises(ValueError, match="expected each of 8 experts once"):
        reorder(moe, torch.zeros(8, dtype=torch.long))
    with pytest.raises(ValueError, match="ExpertChoiceRouter with these options"):
        reorder(MoE(ExpertChoiceRouter(6, 8), Experts(8, 6, 5)), torch.arange(8))
    with pytest.raises(ValueError, match="TopKRouter with these options"):
        reorder(MoE(TopKRouter(6, 8, 2, num_groups=2, group_topk=1), Experts(8, 6, 5)), torch.arange(8))


def test_one_token_or_none_changes_nothing() -> None:
    assert place(torch.zeros(0, 4, dtype=torch.bool), 2).tolist() == [0, 1, 2, 3]
    one = torch.zeros(1, 4, dtype=torch.bool)
    one[0, 0] = True
    assert place(one, 2).tolist() == [0, 1, 2, 3]
