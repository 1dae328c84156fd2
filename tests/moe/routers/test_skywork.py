"""Skywork-MoE's gate: logits of mean zero and width lambda, and a balance loss that follows what was dropped."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.moe import Capacity, Experts, MoE, balance, record, schedule, telemetry
from zoo.moe.routers import DenseRouter, SkyworkRouter
from zoo.moe.routers.scores import standardized


def skewed(tokens: int = 64, experts: int = 4) -> Tensor:
    return torch.randn(tokens, experts) + torch.tensor([3.0, 0, 0, 0])


def test_logits_are_normalised_before_the_softmax() -> None:
    logits = 5 * torch.randn(30, 6, dtype=torch.float64) + 2
    router = SkyworkRouter(3, 6, normalize_logits=2.0, capacity=None)
    rows = [
        [2 * (v - sum(r) / 6) / (sum((u - sum(r) / 6) ** 2 for u in r) / 5) ** 0.5 for v in r] for r in logits.tolist()
    ]
    probs = torch.tensor(rows, dtype=torch.float64).softmax(-1)
    best = probs.topk(2, dim=-1)
    torch.testing.assert_close(
        router.route(logits).dense(), torch.zeros(30, 6).double().scatter(1, best.indices, best.values)
    )
    torch.testing.assert_close(standardized(logits, 1.0).std(-1), torch.ones(30).double())


def test_one_expert_has_logits_of_zero_and_learns_nothing() -> None:
    layer = MoE(SkyworkRouter(3, 1, 1), Experts(1, 3, 4))
    x = torch.randn(5, 3, requires_grad=True)
    with record(layer) as step:
        y = layer(x)
    losses = step.losses()  # of one expert there is no balance to learn, but a gradient, zero
    assert losses["switch"].item() == pytest.approx(0.01)
    (y.sum() + sum(losses.values())).backward()
    torch.testing.assert_close(y, layer.experts(x, DenseRouter(3, 1)(x)))
    assert torch.equal(layer.router.weight.grad, torch.zeros(1, 3))


def test_the_coefficient_is_a_moving_average_of_the_clamped_drop_rate() -> None:
    """alpha' = beta alpha + (1 - beta) min(xi d, alpha_max), d over all micro-batches of the step."""
    router = SkyworkRouter(3, 4, capacity=Capacity(1.0), decay=0.9, sensitivity=0.03, max_coefficient=0.01)
    expected = 0.01
    for micro_batches in (1, 3, 2):
        dropped = asked = 0.0
        for _ in range(micro_batches):
            routing = router.route(skewed())
            dropped += float(128 - telemetry.kept_per_token(routing).sum())
            asked += 128
        assert dropped > 0
        schedule.advance(router)
        expected = 0.9 * expected + 0.1 * min(0.03 * dropped / asked, 0.01)
        assert router.coefficient.item() == pytest.approx(expected, rel=1e-5)
    wild = SkyworkRouter(3, 4, capacity=Capacity(tokens=1), decay=0.0, sensitivity=5.0)
    wild.route(skewed())
    schedule.advance(wild)
    assert wild.coefficient.item() == pytest.approx(0.01)


def test_the_loss_is_weighed_by_the_coefficient_of_its_time() -> None:
    router = SkyworkRouter(3, 4, adaptive={"switch": 1.0}, losses={"z": 0.5}, decay=0.5, capacity=Capacity(4.0))
    logits = torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
    first = router.route(logits)
    probs = standardized(logits, 1.0).softmax(-1)
    plain = balance.load_balance(probs, torch.zeros(50, 4).double().scatter(1, probs.topk(2, dim=-1).indices, 1.0))
    torch.testing.assert_close(first.losses["switch"], 0.01 * plain, rtol=1e-6, atol=0)
    schedule.advance(router)  # nothing was dropped
    torch.testing.assert_close(router.route(logits).losses["switch"], 0.005 * plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(router.route(logits).losses["z"], first.losses["z"])
    first.losses["switch"].backward()  # in spite of the step between


def test_evaluation_and_steps_without_tokens_change_nothing() -> None:
    router = SkyworkRouter(3, 4, decay=0.5)
    router.eval().route(skewed())
    schedule.advance(router)
    router.train().route(skewed(), mask=torch.zeros(64, dtype=torch.bool))
    schedule.advance(router)
    assert router.coefficient.item() == pytest.approx(0.01)


def test_the_coefficient_is_part_of_the_state_and_stays_in_single_precision() -> None:
    router = SkyworkRouter(3, 4, decay=0.5, capacity=Capacity(4.0)).bfloat16()
    router.route(skewed())
    schedule.advance(router)
    assert router.coefficient.dtype == torch.float32
    other = SkyworkRouter(3, 4)
    other.load_state_dict(router.state_dict())
    assert other.coefficient.item() == pytest.approx(0.005)
    other.reset_parameters()
    assert other.coefficient.item() == pytest.approx(0.01)
    assert other.to("meta").bfloat16().coefficient.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, "expected 0 <= decay < 1"),
        ({"sensitivity": 0.0}, "sensitivity > 0"),
        ({"losses": {"switch": 0.1}}, "switch cannot be both adaptive and of fixed weight"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SkyworkRouter(4, 4, **options)
