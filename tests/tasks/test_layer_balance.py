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


@pytest.mark.parametrize("a_row", [1, 3])
@pytest.mark.parametrize("asked", ["number", "of each token"])
def test_rows_that_fill_up_a_batch_do_not_count(asked, a_row):
    torch.manual_seed(0)
    rows, experts, k = 7, 5, 2
    real = torch.tensor([True, False, True, True, False, True, False])
    here = real.repeat_interleave(a_row)
    probs = torch.randn(rows * a_row, experts).softmax(-1)
    expert = probs.topk(k).indices
    keep = torch.rand(rows * a_row, k) > 0.3
    wanted = k if asked == "number" else torch.randint(1, k + 1, (rows * a_row,)) * (torch.rand(rows * a_row) > 0.2)

    # By hand, over the real tokens alone.
    tokens = here.nonzero().flatten().tolist()
    counts = [sum(int(e == expert[t, c]) for t in tokens for c in range(k) if keep[t, c]) for e in range(experts)]
    asks = [k if asked == "number" else int(wanted[t]) for t in tokens]
    entropies = [-sum(p * math.log(p) for p in probs[t].tolist()) for t, n in zip(tokens, asks) if n]

    whole = Routing.from_choices(expert, torch.ones(expert.shape), experts, keep=keep, probs=probs, asked=wanted)
    balance = LayerBalance()
    balance.update(step_of({"layer": [whole]}), real)
    balance.update(step_of({"layer": [whole]}), torch.zeros_like(real))  # a batch of nothing else
    found = balance.compute()["layer"]
    assert found["load_max"] == pytest.approx(max(counts) * experts / sum(counts))
    assert found["drop_rate"] == pytest.approx(1 - sum(counts) / sum(asks))
    assert found["entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)


def test_a_layer_that_saw_other_tokens_counts_them_all():
    balance, whole = LayerBalance(), routing([[0], [0], [1], [1], [1]], 2)
    balance.update(step_of({"layer": [whole]}), torch.tensor([True, False]))
    assert balance.compute()["layer"]["load_max"] == pytest.approx(1.2)
