from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.moe import Routing


def by_loop(expert: Tensor, weight: Tensor, keep: Tensor, num_experts: int) -> tuple[list, list, list]:
    """Assignments expert by expert in token order: tokens, weights, and how many each expert has."""
    tokens, weights, counts = [], [], []
    for e in range(num_experts):
        before = len(tokens)
        for t in range(expert.shape[0]):
            for j in range(expert.shape[1]):
                if int(expert[t, j]) == e and keep[t, j]:
                    tokens.append(t)
                    weights.append(weight[t, j].item())
        counts.append(len(tokens) - before)
    return tokens, weights, counts


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize(
    ("tokens", "k", "num_experts"),
    [(0, 2, 4), (1, 1, 1), (13, 3, 5), (40, 2, 300), (64, 1, 255), (64, 2, 256), (9, 4, 4)],
)
def test_choices_are_sorted_by_expert_and_token(drop: bool, tokens: int, k: int, num_experts: int) -> None:
    expert = torch.rand(tokens, num_experts).topk(k).indices
    weight = torch.rand(tokens, k, dtype=torch.float64)
    keep = torch.rand(tokens, k) > 0.4 if drop else torch.ones(tokens, k, dtype=torch.bool)
    routing = Routing.from_choices(expert, weight, num_experts, keep=keep if drop else None)
    want_tokens, want_weights, want_counts = by_loop(expert, weight, keep, num_experts)
    assert routing.token_index.tolist() == want_tokens
    assert routing.weight.tolist() == want_weights
    assert routing.counts.tolist() == want_counts
    assert routing.offsets.dtype == torch.int32
    assert routing.token_index.dtype == torch.int64
    assert routing.num_experts == num_experts
    assert routing.expert_index.tolist() == [e for e, n in enumerate(want_counts) for _ in range(n)]


def test_the_same_from_a_matrix() -> None:
    expert = torch.rand(20, 6).topk(2).indices
    weight, keep = torch.rand(20, 2), torch.rand(20, 2) > 0.3
    choices = Routing.from_choices(expert, weight, 6, keep=keep)
    matrix = torch.zeros(20, 6).scatter(1, expert, weight)
    exists = torch.zeros(20, 6, dtype=torch.bool).scatter(1, expert, keep)
    again = Routing.from_matrix(matrix, exists)
    assert torch.equal(again.dense(), choices.dense())
    assert torch.equal(again.dense(), matrix * exists)
    for name in ("token_index", "offsets", "weight"):
        assert torch.equal(getattr(again, name), getattr(choices, name))


def test_a_token_may_choose_an_expert_twice() -> None:
    routing = Routing.from_choices(torch.tensor([[1, 1], [0, 1]]), torch.tensor([[0.25, 0.5], [1.0, 2.0]]), 3)
    assert routing.token_index.tolist() == [1, 0, 0, 1]
    assert routing.dense().tolist() == [[0.0, 0.75, 0.0], [1.0, 2.0, 0.0]]


def test_weights_keep_their_gradient_and_dropped_ones_have_none() -> None:
    expert = torch.rand(9, 5).topk(3).indices
    weight = torch.rand(9, 3, dtype=torch.float64, requires_grad=True)
    keep = torch.rand(9, 3) > 0.5
    scale = torch.rand(9, 5, dtype=torch.float64)
    (Routing.from_choices(expert, weight, 5, keep=keep).dense() * scale).sum().backward()
    assert torch.equal(weight.grad, scale.gather(1, expert) * keep)
