from __future__ import annotations

import math

import pytest
import torch

from zoo.moe import Capacity, Routing, telemetry
from zoo.moe.routers import TopKRouter

# Six tokens, three experts. Expert 0 has room for two: the third and fourth first choice of it are dropped.
EXPERT = torch.tensor([[0, 1], [0, 2], [0, 1], [0, 2], [1, 2], [2, 1]])
WEIGHT = torch.tensor([[0.6, 0.4], [0.5, 0.5], [0.9, 0.1], [0.7, 0.3], [0.8, 0.2], [0.5, 0.5]])
KEEP = torch.ones(6, 2, dtype=torch.bool)
KEEP[2:4, 0] = False


def routing() -> Routing:
    probs = torch.tensor([[1.0, 0, 0]] * 3 + [[0, 0.5, 0.5]] * 3)
    return Routing.from_choices(EXPERT, WEIGHT, 3, keep=KEEP, probs=probs)


def test_load_and_violation() -> None:
    assert telemetry.load(routing()).tolist() == pytest.approx([2 / 10, 4 / 10, 4 / 10])
    assert telemetry.max_violation(routing()).item() == pytest.approx(0.4 * 3 - 1)


def test_weight_mass() -> None:
    mass = [0.6 + 0.5, 0.4 + 0.1 + 0.8 + 0.5, 0.5 + 0.3 + 0.2 + 0.5]
    assert telemetry.weight_mass(routing()).tolist() == pytest.approx([m / sum(mass) for m in mass])


def test_drop_rate_over_all_and_by_position() -> None:
    assert telemetry.drop_rate(routing()).item() == pytest.approx(2 / 12)
    assert telemetry.kept_per_token(routing()).tolist() == [2, 2, 1, 1, 2, 2]
    # Two sequences of three: the drops are at positions 2 and 0.
    assert telemetry.drop_rate_by_position(routing(), 3).tolist() == pytest.approx([1 / 4, 0, 1 / 4])
    assert telemetry.drop_rate_by_position(routing(), 6).tolist() == pytest.approx([0, 0, 0.5, 0.5, 0, 0])
    for length in (0, 4):
        with pytest.raises(ValueError, match=f"6 tokens are no whole number of sequences of {length}"):
            telemetry.drop_rate_by_position(routing(), length)


def test_entropy_of_tokens_and_of_their_mean() -> None:
    assert telemetry.entropy(routing()).item() == pytest.approx(math.log(2) / 2)
    assert telemetry.mean_entropy(routing()).item() == pytest.approx(0.5 * math.log(2) + 2 * 0.25 * math.log(4))


def test_masked_tokens_asked_for_nothing_and_have_no_entropy() -> None:
    mask = torch.tensor([True, False, True, True])
    logits = torch.tensor([[9.0, 0, 0], [0, 0, 0], [9.0, 0, 0], [9.0, 0, 0]])
    router = TopKRouter(2, 3, 1, capacity=Capacity(tokens=2))
    found = router.route(logits, mask=mask)
    assert telemetry.asked_per_token(found).tolist() == [1, 0, 1, 1]
    assert telemetry.drop_rate(found).item() == pytest.approx(1 / 3)
    row = logits[0].double().softmax(-1)
    assert telemetry.entropy(found).item() == pytest.approx(-(row * row.log()).sum().item(), rel=1e-3)
    nothing = router.route(logits, mask=torch.zeros(4, dtype=torch.bool))
    assert telemetry.drop_rate(nothing).item() == 0
    assert telemetry.load(nothing).tolist() == [0, 0, 0]
    assert telemetry.weight_mass(nothing).tolist() == [0, 0, 0]


@pytest.mark.parametrize("score", ["softmax", "softmax_topk", "sigmoid"])
def test_probabilities_are_the_routers_distribution_before_noise(score: str) -> None:
    logits = torch.randn(10, 4)
    router = TopKRouter(2, 4, 2, score=score, noise="fixed")  # type: ignore[arg-type]
    probs = router.route(logits).probs
    expected = logits.sigmoid() if score == "sigmoid" else logits.exp()
    torch.testing.assert_close(probs, expected / expected.sum(-1, keepdim=True))


def test_a_router_without_a_distribution_says_so() -> None:
    with pytest.raises(ValueError, match="carries no probabilities"):
        telemetry.entropy(Routing.from_choices(EXPERT, WEIGHT, 3))
