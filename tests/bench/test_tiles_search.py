"""The search for the fastest tiles, on times that are made up: what it tries, and where it ends."""

import random
from dataclasses import replace

import pytest

from zoo.bench.gpu import search

pytest.importorskip("triton")
from zoo.moe.kernels.triton.plans import PLANS

KERNELS = {"up", "down", "d_hidden", "d_x", "d_weight"}
KEYS = [("90", 2, "few"), ("90", 2, "some"), ("90", 2, "many"), ("80", 2, "many")]


@pytest.mark.parametrize("key", KEYS, ids=str)
@pytest.mark.parametrize("described", [False, True])
def test_candidates_are_plans_whose_pairs_agree(key, described):
    plan = PLANS[key]
    found = search.candidates(plan, described)
    assert {name for one in found for name in one.kernels} == KERNELS
    assert any(tile.described for one in found for tile in vars(one.plan).values()) == described
    for one in found:
        changed = {n for n, t in vars(one.plan).items() if t != getattr(plan, n)}
        assert changed == set(one.kernels)
        assert one.plan.up.m == one.plan.down.m
        assert one.plan.d_hidden.m == one.plan.d_x.m
        assert all(t.m * t.n <= 128 * 256 for t in (getattr(one.plan, n) for n in changed))


class Landscape:
    """Seconds that grow with the distance of every size of every tile from one that was drawn."""

    def __init__(self, plan, seed):
        draw = random.Random(seed)
        # The best plan is some steps away: candidates of candidates.
        for _ in range(6):
            plan = draw.choice(search.candidates(plan)).plan
        self.best, self.asked = plan, []

    def __call__(self, plan, forward):
        self.asked.append((plan, forward))
        seconds = 1.0
        for name, tile in vars(plan).items():
            if (name in search.FORWARD) == forward:
                best = getattr(self.best, name)
                for size in ("m", "n", "k", "warps", "stages", "group"):
                    ratio = getattr(tile, size) / getattr(best, size)
                    seconds *= 1 + 0.1 * abs(ratio - 1)
                seconds *= 1.2 if tile.described != best.described else 1
        return seconds


@pytest.mark.parametrize("key", KEYS[:3], ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_it_ends_where_no_single_change_is_faster(key, seed):
    seconds, prepared = Landscape(PLANS[key], seed), []
    found = search.search(PLANS[key], seconds, prepared.extend, rounds=40)
    assert found.whole
    for forward in (True, False):
        assert found.before[forward] == seconds(PLANS[key], forward)
        assert found.after[forward] == seconds(found.plan, forward) <= found.before[forward]
        assert found.gain(forward) == found.before[forward] / found.after[forward] >= 1
    for one in search.candidates(found.plan):
        assert seconds(one.plan, one.forward) * search.GAIN >= found.after[one.forward]
    timed = {plan for plan, _ in seconds.asked}
    assert set(prepared) <= timed


@pytest.mark.parametrize("seed", range(3))
def test_no_tiles_are_timed_twice(seed):
    plan = PLANS["90", 2, "many"]
    seconds = Landscape(plan, seed)
    assert search.search(plan, seconds, rounds=40).rounds > 1
    asked = [({n: t for n, t in vars(p).items() if (n in search.FORWARD) == f}, f) for p, f in seconds.asked]
    assert all(each not in asked[:i] for i, each in enumerate(asked))


def test_what_cannot_run_is_noted_and_passed_over():
    plan = PLANS["90", 2, "many"]

    def seconds(plan, forward):
        if plan.d_x.stages == 5:
            raise RuntimeError("out of resource: shared memory")
        return 1.0 if forward and plan.up.stages == 2 else 2.0

    found = search.search(plan, seconds)
    assert found.plan == replace(plan, up=replace(plan.up, stages=2))
    assert (found.gain(True), found.gain(False)) == (2, 1)
    errors = [entry for entry in found.tried if "error" in entry]
    assert errors
    assert all("shared memory" in entry["error"] for entry in errors)


def test_changes_that_only_help_alone_are_not_put_together():
    plan = PLANS["90", 2, "many"]

    def seconds(plan, forward):
        fewer = {name for name in ("up", "down") if getattr(plan, name).stages == 2}
        return 2.0 if not forward else {0: 1.0, 1: 0.8 if "up" in fewer else 0.9, 2: 1.5}[len(fewer)]

    found = search.search(plan, seconds)
    assert found.plan.up.stages == 2
    assert found.plan.down.stages == plan.down.stages
    assert found.after == {True: 0.8, False: 2.0}


def test_noise_changes_nothing():
    plan = PLANS["90", 2, "many"]
    draw = random.Random(1)
    found = search.search(plan, lambda plan, forward: 1 - 0.004 * draw.random())
    assert found.plan == plan
    assert found.whole
    assert found.rounds == 1


def test_a_search_that_is_cut_short_keeps_what_it_found():
    plan = PLANS["90", 2, "many"]
    left = iter([True] * 3 + [False] * 100)
    # The first candidates are those of `up`.
    found = search.search(plan, lambda each, forward: 1.0 if each.up == plan.up else 0.5, more=lambda: next(left))
    assert found.plan.up != plan.up
    assert not found.whole
    assert len(found.tried) == 3
    assert found.gain(True) == 2
