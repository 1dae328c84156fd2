"""SwitchHead: each head's value and output experts, chosen by sigmoid gates of their own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from attention_cases import DIM, attend_by_loop, made, same_with_gradients, seen_by, turned
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from zoo.moe import SwitchHead, record, rotary
from zoo.moe.routers import SwitchHeadRouter

HEADS, EXPERTS, WIDTH = 2, 4, 6


def gates_by_loop(weight: Tensor, x: Tensor, k: int) -> list[list[tuple[int, Tensor]]]:
    """Of each head the k experts with the largest sigmoid(w . x), and that: weight [H * E, D], x [D]."""
    scores = 1 / (1 + (-(weight @ x)).exp())
    found = []
    for h in range(HEADS):
        mine = range(h * EXPERTS, (h + 1) * EXPERTS)
        found.append([(e, scores[e]) for e in sorted(mine, key=lambda e: -float(scores[e].detach()))[:k]])
    return found


def by_loop(layer: Any, x: Tensor, k: int, causal: bool, mask: Tensor | None, width: int) -> Tensor:
    out = []
    for b in range(x.shape[0]):
        length, rows = x.shape[1], []
        queries, keys = (p(x[b]).view(length, HEADS, WIDTH) for p in (layer.q_proj, layer.k_proj))
        values = []
        for t in range(length):
            source = gates_by_loop(layer.value.router.weight, x[b, t], k)
            values.append(
                torch.stack([sum(s * (layer.value.weight[e] @ x[b, t]) for e, s in of_head) for of_head in source])  # type: ignore[misc]
            )
        value = torch.stack(values)
        for t, seen in enumerate(seen_by(length, causal, None if mask is None else mask[b])):
            y = torch.zeros(DIM, dtype=x.dtype)
            if mask is not None and not mask[b, t]:
                rows.append(y)
                continue
            for h, of_head in enumerate(gates_by_loop(layer.output.router.weight, x[b, t], k)):
                turned_keys = torch.stack([turned(keys[j, h], j, width) for j in range(length)])
                head = attend_by_loop(turned(queries[t, h], t, width), turned_keys, value[:, h], seen)
                y = y + sum(s * (layer.output.weight[e] @ head) for e, s in of_head)
            rows.append(y)
        out.append(torch.stack(rows))
    return torch.stack(out)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_values_and_outputs_are_mixtures_within_each_head(k: int, causal: bool, padded: bool) -> None:
    layer = made(lambda: SwitchHead(DIM, HEADS, WIDTH, EXPERTS, k, causal=causal))
    x = torch.randn(2, 5, DIM, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 5, [False, True, True, False, True]]) if padded else None
    same_with_gradients(layer, x, layer(x, mask=mask), by_loop(layer, x, k, causal, mask, 0))


def test_positions_may_turn_a_part_of_each_head() -> None:
    layer = made(lambda: SwitchHead(DIM, HEADS, WIDTH, EXPERTS, causal=True))
    x = torch.randn(2, 5, DIM, dtype=torch.float64)
    found = layer(x, rotary=rotary(torch.arange(5)[None], 4))
    # Cosines are of single precision.
    torch.testing.assert_close(found, by_loop(layer, x, 2, True, None, 4), rtol=1e-5, atol=1e-6)


def test_both_gates_are_recorded_with_their_losses() -> None:
    layer = made(lambda: SwitchHead(DIM, HEADS, WIDTH, EXPERTS, losses={"switch": 0.5}))
    x = torch.randn(2, 5, DIM, dtype=torch.float64)
    with record(layer) as step:
        layer(x)
    assert set(step.routings) == {"value", "output"}
    total = 0.0
    for name in ("value", "output"):
        router = getattr(layer, name).router
        (routing,) = step.routings[name]
        assert routing.asked == 2 * HEADS  # type: ignore[union-attr]
        scores = (x.view(10, DIM) @ router.weight.T).sigmoid()
        probs = scores / scores.sum(-1, keepdim=True)
        share = (routing.dense() > 0).double().sum(0) / (10 * 2 * HEADS)
        total += 0.5 * HEADS * EXPERTS * (probs.mean(0) * share).sum().item()
    assert step.losses()["switch"].item() == pytest.approx(total)


def test_experts_that_were_not_chosen_cost_nothing() -> None:
    flops = []
    for experts in (2, 32):
        layer, x = SwitchHead(DIM, HEADS, WIDTH, experts, 2), torch.randn(2, 16, DIM)
        with FlopCounterMode(display=False) as counter:
            layer(x)
        flops.append(counter.get_total_flops() - 2 * 2 * 32 * DIM * HEADS * experts)  # but for the gates' logits
    assert flops[0] == flops[1]


def test_a_choice_in_each_head_is_in_order_and_sigmoid_scores_do_not_compete() -> None:
    router = SwitchHeadRouter(DIM, 6, 2, num_heads=2).double()
    weights = router(torch.randn(50, DIM, dtype=torch.float64)).dense()
    assert ((weights > 0).view(50, 2, 3).sum(-1) == 2).all()
    one = copy.deepcopy(router)
    one.weight.data[0] += 5.0  # makes no other expert's weight smaller
    x = torch.randn(50, DIM, dtype=torch.float64)
    before, after = router(x).dense()[:, 1:], one(x).dense()[:, 1:]
    both = (before > 0) & (after > 0)
    assert torch.equal(before[both], after[both])
    assert torch.equal(before[:, 2:], after[:, 2:])  # nor a head's choice another's


def test_experts_left_out_at_random_are_not_chosen_and_the_weights_stay() -> None:
    router = SwitchHeadRouter(DIM, 8, 1, num_heads=2, expert_dropout=0.5).double()
    x = torch.randn(2000, DIM, dtype=torch.float64)
    kept = router.eval()(x).dense()
    torch.manual_seed(0)
    found = router.train()(x).dense()
    scores = (x @ router.weight.T).sigmoid()
    torch.testing.assert_close(found[found > 0], scores[found > 0])
    best = ((found > 0) & (kept > 0)).double().sum() / 4000
    assert best.item() == pytest.approx(0.5 + 0.5**4 / 4, abs=0.04)  # where all four are left out, any is taken


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SwitchHeadRouter(DIM, 9, 2, num_heads=2), "9 experts do not split into num_heads=2 of at least k=2"),
        (lambda: SwitchHeadRouter(DIM, 8, 5, num_heads=2), "8 experts do not split into num_heads=2 of at least k=5"),
        (lambda: SwitchHeadRouter(DIM, 8, num_heads=2, score="softmax"), "score has no meaning"),
        (lambda: SwitchHeadRouter(DIM, 8, expert_dropout=1.0), "expert_dropout must be at least 0 and below 1"),
        (lambda: SwitchHead(DIM, 0, 4, 3), "num_heads and head_dim must be at least 1"),
    ],
)
def test_what_does_not_fit_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
