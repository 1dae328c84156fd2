from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from zoo.moe import Capacity
from zoo.moe.capacity import as_capacity
from zoo.moe.routers import TopKRouter

DROPS = ("choice", "position", "probability", "priority", "priority_sum", "random", "unordered")


def kept_by_loop(expert: Tensor, weight: Tensor, num_experts: int, places: int, drop: str) -> Tensor:
    """One group, [N, K]: walk through the claims in the documented order and hand out places."""
    tokens, k = expert.shape
    by_token = list(range(tokens))
    if drop == "priority":
        by_token.sort(key=lambda t: -weight[t].max().item())
    if drop == "priority_sum":
        by_token.sort(key=lambda t: -weight[t].sum().item())
    if drop == "position":
        claims = [(t, j) for t in by_token for j in range(k)]
    elif drop == "probability":
        claims = sorted(((t, j) for t in by_token for j in range(k)), key=lambda c: -weight[c].item())
    else:
        claims = [(t, j) for j in range(k) for t in by_token]
    used = [0] * num_experts
    keep = torch.zeros(tokens, k, dtype=torch.bool)
    for t, j in claims:
        e = int(expert[t, j])
        if e < num_experts and used[e] < places:
            used[e] += 1
            keep[t, j] = True
    return keep


def random_choices(groups: int, tokens: int, k: int, num_experts: int) -> tuple[Tensor, Tensor]:
    scores = torch.rand(groups, tokens, num_experts).square()
    weight, expert = scores.topk(k, dim=-1)
    # Some choices ask for no place, as those of masked tokens do.
    expert = expert.where(torch.rand(groups, tokens, 1) > 0.2, num_experts)
    return expert, weight


@pytest.mark.parametrize("drop", ["choice", "position", "probability", "priority", "priority_sum"])
@pytest.mark.parametrize(
    ("groups", "tokens", "k", "num_experts", "places"),
    [(1, 40, 2, 4, 9), (3, 17, 3, 5, 4), (2, 8, 1, 8, 1), (1, 1, 2, 2, 1), (2, 30, 4, 4, 30), (1, 0, 2, 4, 3)],
)
def test_places_go_out_in_the_documented_order(
    drop: str, groups: int, tokens: int, k: int, num_experts: int, places: int
) -> None:
    expert, weight = random_choices(groups, tokens, k, num_experts)
    keep = Capacity(drop=drop).keep(expert, weight, num_experts, places)  # type: ignore[arg-type]
    for g in range(groups):
        assert torch.equal(keep[g], kept_by_loop(expert[g], weight[g], num_experts, places, drop))


@pytest.mark.parametrize("drop", DROPS)
def test_an_expert_is_as_full_as_its_claims_and_places_allow(drop: str) -> None:
    expert, weight = random_choices(4, 25, 3, 6)
    keep = Capacity(drop=drop).keep(expert, weight, 6, 5)  # type: ignore[arg-type]
    for g in range(4):
        for e in range(6):
            asked = expert[g] == e
            assert (asked & keep[g]).sum() == min(5, int(asked.sum()))
    assert not keep[expert == 6].any()


def test_equal_weights_give_way_in_token_order() -> None:
    expert, weight = torch.zeros(1, 9, 1, dtype=torch.int64), torch.ones(1, 9, 1)
    for drop in ("probability", "priority", "priority_sum", "choice", "position"):
        keep = Capacity(drop=drop).keep(expert, weight, 1, 4)  # type: ignore[arg-type]
        assert keep.flatten().tolist() == [True] * 4 + [False] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_sums_that_only_rounding_tells_apart_give_way_in_token_order(dtype: torch.dtype) -> None:
    # With k = E a token's weights are a whole distribution: every sum is one, and a place short drops the last token.
    for tokens, num_experts in ((40, 2), (200, 8), (100, 64)):
        logits = torch.randn(1, tokens, num_experts, dtype=torch.float64) * 3
        weight, expert = logits.to(dtype).softmax(-1).sort(descending=True)
        keep = Capacity(drop="priority_sum").keep(expert, weight, num_experts, tokens - 3)
        expected = kept_by_loop(expert[0], torch.ones_like(weight[0]), num_experts, tokens - 3, "priority_sum")
        assert torch.equal(keep[0], expected)


def test_small_differences_between_sums_still_count() -> None:
    # Three tokens, one place: the last one's sum is larger by a hundred thousandth.
    for size in (1e-6, 1.0, 1e4):
        weight = torch.tensor([[[0.5, 0.25], [0.5, 0.25], [0.5, 0.25]]], dtype=torch.float64) * size
        weight[0, 2, 1] *= 1 + 3e-5
        keep = Capacity(drop="priority_sum").keep(torch.tensor([[[0, 1]] * 3]), weight.float(), 2, 1)
        assert keep[0].all(-1).tolist() == [False, False, True]


def test_random_order_follows_the_seed_and_is_fair() -> None:
    expert, weight = torch.zeros(1, 10, 1, dtype=torch.int64), torch.rand(1, 10, 1)
    capacity = Capacity(drop="random")
    torch.manual_seed(3)
    first = capacity.keep(expert, weight, 1, 5)
    torch.manual_seed(3)
    assert torch.equal(capacity.keep(expert, weight, 1, 5), first)
    mean = torch.stack([capacity.keep(expert, weight, 1, 5) for _ in range(2000)]).double().mean(0)
    # Each token survives half of the time: five standard deviations of 2000 draws.
    assert (mean - 0.5).abs().max() < 5 * math.sqrt(0.25 / 2000)


def test_random_order_keeps_first_choices_first() -> None:
    # Three tokens ask for expert 0 first, three second: two places go to first choices always.
    expert = torch.tensor([[[0, 1], [0, 1], [0, 1], [1, 0], [1, 0], [1, 0]]])
    for _ in range(20):
        keep = Capacity(drop="random").keep(expert, torch.rand(1, 6, 2), 2, 2)
        assert not keep[0, 3:, 1].any()
        assert keep[0, :3, 0].sum() == 2


@pytest.mark.parametrize(
    ("options", "tokens", "k", "num_experts", "places"),
    [
        ({"factor": 1.0}, 48, 2, 8, 12),
        ({"factor": 1.25}, 10, 1, 4, 4),
        ({"factor": 1.25, "rounding": "floor"}, 10, 1, 4, 3),
        ({"factor": 1.0, "rounding": "round"}, 196, 1, 128, 2),
        ({"factor": 1.0, "minimum": 4}, 8, 1, 8, 4),
        ({"factor": 1.0, "multiple_of": 4}, 36, 1, 4, 12),
        ({"factor": 1.0, "minimum": 5, "multiple_of": 4}, 8, 1, 8, 8),
        ({"factor": 2.0, "count_choices": False}, 64, 2, 8, 16),
        ({"tokens": 7}, 64, 2, 8, 7),
        ({"factor": 1.1}, 240, 1, 8, 33),
        ({"factor": 1.1}, 100, 8, 8, 110),
        ({"factor": 0.25 * 8, "count_choices": False}, 50, 2, 8, 13),
    ],
)
def test_places_per_expert(options: dict, tokens: int, k: int, num_experts: int, places: int) -> None:
    assert Capacity(**options).places(tokens, k, num_experts, training=True) == places


def test_evaluation_has_its_own_capacity() -> None:
    capacity = Capacity(1.0, eval_factor=2.0)
    assert [capacity.places(40, 1, 4, training) for training in (True, False)] == [10, 20]
    assert Capacity(1.0, eval_tokens=3).places(40, 1, 4, training=False) == 3
    assert Capacity(tokens=3).places(40, 1, 4, training=False) == 3
    assert Capacity(tokens=3, eval_factor=1.0).places(40, 1, 4, training=False) == 10
    assert Capacity(1.0, eval_factor=math.inf).places(40, 2, 4, training=False) == 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": "first"}, "unknown drop 'first'; known: choice, position"),
        ({"rounding": "up"}, "unknown rounding 'up'; known: ceil, floor, round"),
        ({"multiple_of": 0}, "multiple_of must be at least 1, got 0"),
        ({"eval_factor": float("nan")}, "eval_factor must be a number, got nan"),
    ],
)
def test_unknown_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Capacity(**options)


def test_a_capacity_below_one_is_an_error() -> None:
    for options in ({"factor": -1.0}, {"factor": 0.1, "rounding": "floor"}, {"tokens": 0}):
        with pytest.raises(ValueError, match="places an expert; expected at least 1"):
            Capacity(**options).places(8, 1, 8, training=True)


def test_a_capacity_is_read_from_its_factor_or_its_arguments():
    own = Capacity(2.0, drop="priority")
    assert as_capacity(own, multiple_of=4) is own
    assert as_capacity(1.5) == as_capacity({"factor": 1.5}) == Capacity(1.5)
    assert as_capacity(2, multiple_of=4) == Capacity(2.0, multiple_of=4)
    assert as_capacity({"factor": 3.0, "multiple_of": 2}, multiple_of=4) == Capacity(3.0, multiple_of=2)
    for said in (True, "1.5", [1.5]):
        with pytest.raises(ValueError, match=r"capacity must be a factor, arguments of a Capacity, or one itself, got"):
            as_capacity(said)


def test_infinite_places_compile_for_any_number_of_tokens() -> None:
    torch.manual_seed(0)
    capacity = Capacity(1.05, eval_factor=math.inf, multiple_of=4, drop="priority")
    router = TopKRouter(8, 4, k=1, capacity=capacity).eval()
    compiled = torch.compile(lambda x: router(x).dense(), backend="eager", dynamic=True)
    for tokens in (12, 7, 30):
        x = torch.randn(tokens, 8)
        probs = (x @ router.weight.T).softmax(-1)
        expected = probs.where(probs == probs.amax(-1, keepdim=True), 0)
        torch.testing.assert_close(compiled(x), expected)
