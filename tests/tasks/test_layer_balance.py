import math
from types import SimpleNamespace

import pytest
import torch

from tasks.balance import LayerBalance
from zoo.moe import Routing


def step_of(routings):
    """As much of a recorded step as telemetry looks at."""
    return SimpleNamespace(routings=routings)


def routing(choices, num_experts, keep=None):
    expert = torch.tensor(choices)
    probs = torch.full((len(choices), num_experts), 1 / num_experts)
    return Routing.from_choices(
        expert, torch.ones(expert.shape), num_experts, keep=None if keep is None else torch.tensor(keep), probs=probs
    )


def test_a_collapsed_layer_shows_beside_an_even_one():
    balance = LayerBalance()
    even, collapsed = routing([[0], [1], [2], [3]], 4), routing([[2], [2], [2], [2]], 4)
    balance.update(step_of({"model.a": [even], "model.b": [collapsed]}))
    figures = balance.compute()
    assert figures["a"]["load_max"] == pytest.approx(1.0)
    assert figures["b"]["load_max"] == pytest.approx(4.0)


def test_steps_add_up_before_they_are_compared():
    balance = LayerBalance()
    for step in ([[0], [0]], [[1], [1]]):  # each step lopsided, both together even
        balance.update(step_of({"layer": [routing(step, 2)]}))
    assert balance.compute()["layer"]["load_max"] == pytest.approx(1.0)


def test_drops_and_entropy():
    balance = LayerBalance()
    balance.update(step_of({"layer": [routing([[0, 1], [0, 1]], 4, keep=[[True, True], [False, True]])]}))
    figures = balance.compute()["layer"]
    assert figures["drop_rate"] == pytest.approx(0.25)
    assert figures["entropy"] == pytest.approx(math.log(4))


def test_nothing_routed_is_no_division_by_zero():
    balance = LayerBalance()
    assert balance.compute() == {}
    empty = Routing.from_choices(torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2), 4)
    balance.update(step_of({"layer": [empty]}))
    assert balance.compute()["layer"] == {"load_max": 0.0, "drop_rate": 0.0}
