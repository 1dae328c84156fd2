"""SparseMixer against the code of Phi-3.5-MoE in transformers."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.moe import telemetry
from zoo.moe.routers import SparseMixerRouter


def by_phimoe(logits: Tensor, threshold: float, training: bool) -> Tensor:
    """Weights of two experts a token as a matrix [T, E]."""
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    weight, expert = sparsemixer(logits, threshold, training)
    return torch.zeros_like(logits).scatter(-1, expert, weight)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("threshold", [0.01, 0.5])
def test_weights_and_gradients_are_those_of_phimoe(training: bool, threshold: float, monkeypatch: Any) -> None:
    logits = torch.randn(200, 6, dtype=torch.float64).requires_grad_()
    uniform = iter([torch.rand(200, 1).double() for _ in range(2)] * 2)
    # Its second round throws a draw away and takes another.
    monkeypatch.setattr(torch, "rand_like", lambda like: next(uniform).as_subclass(Drawn))
    router = SparseMixerRouter(3, 6, threshold=threshold).train(training)
    torch.manual_seed(5)
    found = router.route(logits).dense()
    torch.manual_seed(5)
    expected = by_phimoe(logits, threshold, training)
    # They have 0.3333 and 0.6667 for a third and two thirds.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    target = torch.randn_like(found)
    grads = [torch.autograd.grad((out * target).sum(), logits)[0] for out in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


class Drawn(torch.Tensor):
    def uniform_(self) -> Tensor:  # type: ignore[override]
        return self


def test_an_expert_is_drawn_as_often_as_its_probability() -> None:
    logits = torch.tensor([[1.0, 0.5, 0.0, -3.0]]).expand(20000, 4)
    routing = SparseMixerRouter(2, 4, k=1, threshold=0.6).route(logits)  # 3 is (1 + 3) / 3 below
    expected = torch.tensor([1.0, 0.5, 0.0, float("-inf")]).softmax(0)
    assert (routing.counts / 20000 - expected).abs().max() < 5 * (0.25 / 20000) ** 0.5
    assert routing.counts[3] == 0


@pytest.mark.parametrize("training", [True, False])
def test_losses_and_telemetry_get_the_softmax_of_all_experts(training: bool) -> None:
    """GRIN's balance loss, E sum_e f_e P_e, in a loop (transformers' auxiliary loss takes the same softmax)."""
    logits = (3 * torch.randn(17, 6, dtype=torch.float64)).requires_grad_()
    router = SparseMixerRouter(3, 6, threshold=0.3, losses={"switch": 0.7}, eval_losses=True).train(training)
    routing = router.route(logits)
    probs = torch.stack([row.exp() / row.exp().sum() for row in logits.unbind()])
    torch.testing.assert_close(routing.probs, probs)
    share = routing.counts.double() / routing.counts.sum()
    expected = 0.7 * 6 * sum(share[e] * probs[:, e].mean() for e in range(6))
    torch.testing.assert_close(routing.losses["switch"], expected)
    grads = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (routing.losses["switch"], expected)]
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(telemetry.entropy(routing), -(probs * probs.log()).sum(-1).mean().float())


def test_the_third_of_an_output_is_a_third_in_double_precision(monkeypatch: Any) -> None:
    logits = torch.randn(300, 4, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand_like", torch.zeros_like)  # never the end, unless the largest was drawn
    routing = SparseMixerRouter(2, 4, k=1, threshold=9.0).route(logits)
    probs, best = logits.softmax(-1), logits.argmax(-1)
    token, expert = routing.token_index, routing.expert_index
    expected = [float(probs[t, e]) / (1 if e == best[t] else 3) for t, e in zip(token.tolist(), expert.tolist())]
    assert (expert != best[token]).any()
    torch.testing.assert_close(routing.weight, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "sigmoid"}, "score has no meaning where experts are drawn"),
        ({"selection_bias": True}, "selection_bias has no meaning"),
        ({"threshold": -0.1}, "expected threshold >= 0, got -0.1"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SparseMixerRouter(4, 4, **options)
