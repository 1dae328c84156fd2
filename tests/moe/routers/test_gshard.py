from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.moe import Capacity
from zoo.moe.routers import BASERouter, GShardRouter, SentenceRouter, SMoEDropoutRouter, StableMoERouter


def by_the_algorithm(
    logits: Tensor, second: str, threshold: float, places: int, uniform: Tensor, before: bool
) -> Tensor:
    """Combine weights [T, E], a token at a time: mesh-tensorflow's form, or with before=False fairscale's."""
    tokens, experts = logits.shape
    out, used, asks = torch.zeros_like(logits), [0] * experts, []
    for t in range(tokens):
        p = logits[t].softmax(0)
        e1 = int(p.argmax())
        e2 = int(p.masked_fill(torch.arange(experts) == e1, -1).argmax())
        g1, g2 = p[e1], p[e2]
        if before:
            g1, g2 = g1 / (g1 + g2 + 1e-9), g2 / (g1 + g2 + 1e-9)
        wanted = {"all": True, "none": False, "threshold": g2 > threshold, "random": uniform[t] < g2 / threshold}
        asks.append([(e1, g1)] + ([(e2, g2)] if wanted[second] else []))
    for place in range(2):
        for t in range(tokens):
            if len(asks[t]) > place:
                e, g = asks[t][place]
                used[e] += 1
                if used[e] <= places:
                    out[t, e] = g
    return out if before else out / out.sum(-1, keepdim=True).clamp(min=torch.finfo(out.dtype).eps)


@pytest.mark.parametrize("second", ["all", "none", "random", "threshold"])
@pytest.mark.parametrize("renormalize", ["before", "after"])
@pytest.mark.parametrize(("threshold", "factor"), [(0.5, 1.0), (0.2, 0.6), (0.2, 5.0)])
@pytest.mark.parametrize("training", [True, False])
def test_weights_and_gradients_are_those_of_the_algorithm(
    second: Any, renormalize: Any, threshold: float, factor: float, training: bool
) -> None:
    logits = torch.randn(60, 4, dtype=torch.float64, requires_grad=True)
    router = GShardRouter(
        3, 4, second=second, threshold=threshold, renormalize=renormalize, capacity=Capacity(factor)
    ).train(training)
    torch.manual_seed(7)
    found = router.route(logits).dense()
    torch.manual_seed(7)
    uniform = torch.rand(60, dtype=torch.float64)
    places = router.capacity.places(60, 2, 4, True)  # type: ignore[union-attr]
    expected = by_the_algorithm(logits, second, threshold, places, uniform, renormalize == "before")
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(out.square().sum(), logits)[0] for out in (found, expected)]
    torch.testing.assert_close(*grads)


def test_the_loss_counts_first_experts_whatever_becomes_of_them() -> None:
    logits = torch.randn(50, 4, dtype=torch.float64)
    probs = logits.softmax(-1)
    share = torch.bincount(probs.argmax(1), minlength=4) / 50
    loss = GShardRouter(3, 4, capacity=Capacity(0.3)).route(logits).losses["gshard"]
    torch.testing.assert_close(loss, 1e-2 * (probs.mean(0) * share).mean() * 16)


def test_a_second_expert_is_kept_as_often_as_its_weight_says() -> None:
    logits = torch.tensor([[2.0, 1.0, -5.0]]).expand(20000, 3)
    share = torch.tensor([2.0, 1.0]).softmax(0)[1]
    for threshold in (0.5, 0.3):
        router = GShardRouter(2, 3, threshold=threshold, capacity=None)
        kept = router.route(logits).counts[1] / 20000
        assert abs(kept - share / threshold) < 5 * (0.25 / 20000) ** 0.5
    assert GShardRouter(2, 3, threshold=0.2, capacity=None).route(logits).counts[1] == 20000


def test_sampling_draws_the_second_expert_from_the_others() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0, -1.0]], dtype=torch.float64).expand(20000, 4)
    routing = GShardRouter(2, 4, second="sampling", capacity=None).route(logits)
    drawn = routing.counts[1:] / 20000
    expected = logits[0, 1:].softmax(0)
    assert routing.counts[0] == 20000
    assert ((drawn - expected).abs() < 5 * (0.25 / 20000) ** 0.5).all()
    probs, dense = logits[0].softmax(0), routing.dense()
    for e in (1, 2, 3):  # its weight is its own probability against the first's
        mine = dense[:, e] > 0
        torch.testing.assert_close(dense[mine, e], (probs[e] / (probs[0] + probs[e])).expand(int(mine.sum())))


def test_evaluation_may_have_a_rule_of_its_own() -> None:
    router, logits = GShardRouter(2, 4, second="none", eval_second="all", capacity=None), torch.randn(30, 4)
    assert router.route(logits).counts.sum() == 30
    assert router.eval().route(logits).counts.sum() == 60


def test_a_second_expert_declined_was_not_asked_for() -> None:
    router, logits = GShardRouter(2, 4, second="none", capacity=None), torch.randn(30, 4)
    assert router.route(logits).asked.tolist() == [1] * 30  # type: ignore[union-attr]
    mask = torch.rand(30) > 0.5
    assert router.route(logits, mask=mask).asked.tolist() == mask.long().tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"second": "some"}, "second must be one of all, none, random, threshold, sampling, got 'some'"),
        ({"eval_second": "some"}, "eval_second must be one of"),
        ({"renormalize": "never"}, "renormalize must be 'before' or 'after', got 'never'"),
        ({"k": 1}, "GShardRouter: k is 2 here, got 1"),
        ({"normalize": False}, "GShardRouter: normalize is True here, got False"),
        ({"num_groups": 3}, "GShardRouter: 4 experts do not split into num_groups=3"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        GShardRouter(4, 4, **options)


def test_what_a_gate_fixes_may_be_said() -> None:
    for gate, said in (
        (GShardRouter, {"k": 2, "normalize": True}),
        (SentenceRouter, {"k": 2}),
        (BASERouter, {"k": 1}),
        (functools.partial(StableMoERouter, vocab_size=3), {"k": 1}),
    ):
        made = gate(4, 4, **said)
        assert made.k == said["k"]
        with pytest.raises(ValueError, match=rf"{type(made).__name__}: k is {made.k} here, got 3"):
            gate(4, 4, k=3)
    with pytest.raises(ValueError, match="SMoEDropoutRouter: k grows from k_min to k_max; give these, not k=2"):
        SMoEDropoutRouter(4, 4, steps=3, k=2)
