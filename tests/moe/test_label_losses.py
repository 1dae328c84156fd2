"""Losses that know what kind a token is of, by loops, and on their way from the context of a layer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.moe import Experts, MoE, balance, record
from zoo.moe.routers import DenseRouter, TopKRouter


def entropy(p: Tensor) -> float:
    return -sum(v * math.log(v) for v in p.tolist() if v > 0)


def draw(tokens: int = 40, experts: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    probs = (2 * torch.randn(tokens, experts, dtype=torch.float64)).softmax(-1)
    return probs, torch.randint(3, (tokens,)), torch.rand(tokens) > 0.3


def test_local_entropy_is_the_mean_over_a_modalitys_tokens() -> None:
    probs, modality, mask = draw()
    for only in (0, [0, 2], [1, 5]):  # nobody is of modality 5
        expected = 0.0
        for m in [only] if isinstance(only, int) else only:
            mine = [entropy(p) for p, c, real in zip(probs, modality, mask) if c == m and real]
            expected += sum(mine) / max(len(mine), 1)
        assert balance.local_entropy(probs, modality, only, mask).item() == pytest.approx(expected)
    probs.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: balance.local_entropy(p, modality, 1, mask), probs)


def test_global_entropy_is_that_of_the_mean_and_stops_at_its_threshold() -> None:
    probs, modality, mask = draw()
    mean = {m: probs[(modality == m) & mask].mean(0) for m in range(3)}
    plain = balance.global_entropy(probs, modality, [0, 1], mask=mask)
    assert plain.item() == pytest.approx(-entropy(mean[0]) - entropy(mean[1]))
    for minimum in (2.0, 5.9):
        expected = max(0.0, math.log(minimum) - entropy(mean[2]))
        assert balance.global_entropy(probs, modality, 2, minimum, mask).item() == pytest.approx(expected)
    assert balance.global_entropy(probs, modality, 5, minimum=6, mask=mask).item() == 0  # no token, nothing to spread
    each = sum(balance.global_entropy(probs, modality, m, s, mask) for m, s in ((2, 5.9), (0, 5.8)))
    assert balance.global_entropy(probs, modality, [2, 0], [5.9, 5.8], mask).item() == pytest.approx(float(each))
    with pytest.raises(ValueError, match="3 minima for 2 modalities"):
        balance.global_entropy(probs, modality, [0, 1], [2, 3, 4], mask)


def by_loramoe(gates: Tensor, types: Tensor, delta: float, form: str) -> float:
    """Z of the authors' code: the first half of the experts fits type 1, the second type 0."""
    batch, _, experts = gates.shape
    z = [
        float(gates[b, :, e].sum()) * (1 + delta if (types[b] == 1) == (e < experts // 2) else 1 - delta)
        for b in range(batch)
        for e in range(experts)
    ]
    mean = sum(z) / len(z)
    squares = sum((v - mean) ** 2 for v in z)
    return squares / (len(z) - 1) / (mean**2 + 1e-10) if form == "code" else squares / len(z) / mean


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("delta", [0.0, 0.3, -0.3])
def test_localized_balancing_by_loop(form: Any, delta: float) -> None:
    gates = torch.randn(3, 7, 4, dtype=torch.float64).softmax(-1).requires_grad_()
    types, mask = torch.tensor([1, 0, 1]), torch.rand(3, 7) > 0.3
    found = balance.localized_balance(gates, types[:, None].expand(3, 7), delta, form, mask)
    assert found.item() == pytest.approx(by_loramoe(gates.detach() * mask[..., None], types, delta, form), rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda g: balance.localized_balance(g, types[:, None].expand(3, 7), delta, form, mask), gates
    )
    with pytest.raises(ValueError, match="3 experts do not split into two halves"):
        balance.localized_balance(gates[..., :3], types[:, None].expand(3, 7), delta, form)
    with pytest.raises(ValueError, match="must be 'code' or 'paper'"):
        balance.localized_balance(gates, types[:, None].expand(3, 7), delta, "other")  # type: ignore[arg-type]


@pytest.mark.parametrize(("delta", "own"), [(0.3, False), (-0.3, True)])
def test_the_sign_of_delta_decides_which_experts_a_sample_turns_to(delta: float, own: bool) -> None:
    """Z is even at the minimum: as published, samples leave the experts of their own type."""
    logits = torch.zeros(2, 1, 4, requires_grad=True)
    types = torch.tensor([[1], [0]])
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        balance.localized_balance(logits.softmax(-1), types, delta).backward()
        optimizer.step()
    first_half = logits.softmax(-1)[:, 0, :2].sum(-1).tolist()
    assert (first_half[0] > first_half[1]) == own
    assert first_half[0] == pytest.approx((1 - delta) / 2, abs=0.02)


@pytest.mark.parametrize(
    "losses",
    [
        {"local_entropy": {"weight": 1.0, "only": 1}},
        {"global_entropy": {"weight": 1.0, "only": [0, 1], "minimum": 3}},
        {"task_mutual_information": {"weight": 1.0, "num_tasks": 2, "task": "modality"}},
        {"localized_balance": {"weight": 1.0, "delta": 0.2, "sample_type": "modality"}},
    ],
    ids=lambda losses: next(iter(losses)),
)
@pytest.mark.parametrize("gate", [DenseRouter, TopKRouter])
def test_labels_reach_a_loss_from_the_context(losses: dict[str, Any], gate: Any) -> None:
    moe = MoE(gate(6, 4, losses=losses), Experts(4, 6, 5))
    x, modality, mask = torch.randn(2, 5, 6), torch.tensor([0, 1]), torch.rand(2, 5) > 0.3
    with record(moe) as step:
        moe(x, modality=modality, mask=mask)
    name = next(iter(losses))
    label = modality[:, None].expand(2, 5)
    probs = (x @ moe.router.weight.T).softmax(-1)  # type: ignore[operator, union-attr]
    chosen = probs if gate is DenseRouter else probs * (probs >= probs.topk(2, dim=-1).values[..., -1:])
    expected = {
        "local_entropy": lambda: balance.local_entropy(probs.view(10, 4), label.reshape(10), 1, mask.view(10)),
        "global_entropy": lambda: balance.global_entropy(
            probs.view(10, 4), label.reshape(10), [0, 1], 3, mask.view(10)
        ),
        "task_mutual_information": lambda: balance.task_mutual_information(
            probs.view(10, 4), label.reshape(10), 2, mask.view(10)
        ),
        "localized_balance": lambda: balance.localized_balance(chosen, label, 0.2, mask=mask),
    }[name]()
    torch.testing.assert_close(step.losses()[name], expected)
    with pytest.raises(ValueError, match="needs modality in the context: call the layer as moe"):
        moe(x)
