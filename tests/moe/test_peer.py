"""PEER: product keys find the best of all experts, and each is one neuron."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.moe import PEER, Experts, MoE, NeuronExperts, record, telemetry
from zoo.moe.kernels import ACTIVATIONS
from zoo.moe.routers import ProductKeyRouter, TopKRouter

DIM, EXPERTS, HEADS, K = 6, 25, 3, 4


def router(**options: Any) -> ProductKeyRouter:
    made = ProductKeyRouter(DIM, EXPERTS, K, heads=HEADS, key_dim=8, **options).double()
    for parameter in made.parameters():
        parameter.data.normal_()
    return made


def all_scores(made: ProductKeyRouter, x: Tensor) -> Tensor:
    """The score of every expert for every head, [T, heads, E]: each query against each whole key."""
    keys = torch.stack([torch.cat([made.keys[0, i], made.keys[1, j]]) for i in range(5) for j in range(5)])
    queries = torch.stack([x @ made.weight[8 * h : 8 * h + 8].T for h in range(HEADS)], dim=1)
    return queries @ keys.T


def weights_by_loop(made: ProductKeyRouter, x: Tensor) -> Tensor:
    """Combine weights [T, E], from the scores of all experts."""
    rows = []
    for token in all_scores(made, x):
        row = torch.zeros(EXPERTS, dtype=x.dtype)
        for head in token:
            best = sorted(range(EXPERTS), key=lambda e: -head[e].item())[:K]
            chosen = head[best]
            w = chosen.exp() / chosen.exp().sum() if made.score == "softmax" else 1 / (1 + (-chosen).exp())
            row = row.index_add(0, torch.tensor(best), w)
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_product_keys_find_the_best_of_all_experts(score: Any) -> None:
    made, x = router(score=score), torch.randn(30, DIM, dtype=torch.float64, requires_grad=True)
    found, expected = made(x).dense(), weights_by_loop(made, x)
    torch.testing.assert_close(found, expected)
    variables = (x, *made.parameters())
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), variables) for out in (found, expected))):
        torch.testing.assert_close(a, b)


def test_the_layer_is_the_weighted_sum_of_neurons() -> None:
    layer = PEER(DIM, EXPERTS, K, heads=HEADS, key_dim=8).double()
    x = torch.randn(2, 7, DIM, dtype=torch.float64, requires_grad=True)
    tokens, u, v = x.view(14, DIM), layer.experts.up_proj, layer.experts.down_proj
    weights = weights_by_loop(layer.router, tokens)  # type: ignore[arg-type]
    rows = []
    for t in range(14):
        hidden = torch.stack([torch.nn.functional.gelu(u[e, 0] @ tokens[t]) for e in range(EXPERTS)])  # type: ignore[index]
        rows.append(sum(weights[t, e] * hidden[e] * v[e, :, 0] for e in range(EXPERTS)))
    expected = torch.stack(rows).view(2, 7, DIM)  # type: ignore[arg-type]
    found = layer(x)
    torch.testing.assert_close(found, expected)
    variables = (x, *layer.parameters())
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), variables) for out in (found, expected))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("bias", [False, True])
def test_neurons_are_experts_of_width_one(activation: str, bias: bool) -> None:
    neurons = NeuronExperts(9, DIM, activation, bias).double()
    experts = Experts(9, DIM, 1, activation, bias, backend="reference").double()
    for parameter in neurons.parameters():
        parameter.data.normal_()
    experts.load_state_dict(neurons.state_dict())
    x = torch.randn(11, DIM, dtype=torch.float64)
    routing = TopKRouter(DIM, 9, 3)(x)
    outs = [module(x, routing) for module in (neurons, experts)]
    torch.testing.assert_close(*outs)
    grads = [torch.autograd.grad(y.square().sum(), list(m.parameters())) for y, m in zip(outs, (neurons, experts))]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_heads_may_choose_the_same_expert() -> None:
    made = router()
    made.weight.data[8:] = made.weight.data[:8].repeat(2, 1)  # all heads ask the same question
    routing = made(torch.randn(5, DIM, dtype=torch.float64))
    assert telemetry.kept_per_token(routing).tolist() == [HEADS * K] * 5
    assert (routing.dense() > 0).sum(-1).tolist() == [K] * 5
    assert routing.dense().sum(-1).tolist() == pytest.approx([HEADS] * 5)


def test_batch_norm_is_over_real_tokens_and_moves_its_statistics_once() -> None:
    made, x = router(query_norm="batch"), torch.randn(2, 20, DIM, dtype=torch.float64)
    norm: Any = made.query_norm
    mask = torch.rand(2, 20) > 0.3
    queries = x[mask] @ made.weight.T
    mean, var = queries.mean(0), queries.var(0, correction=0)
    expected = (queries - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias
    found = made._queries(x.view(40, DIM).where(mask.flatten()[:, None], 0), mask.flatten())
    torch.testing.assert_close(found[mask.flatten()].flatten(1), expected)
    torch.testing.assert_close(norm.running_mean, 0.1 * mean)
    made.eval()
    before = norm.running_mean.clone()
    made(x)
    assert torch.equal(norm.running_mean, before)


def test_a_million_experts() -> None:
    layer = PEER(8, 1024**2, key_dim=16)
    x = torch.randn(3, 8)
    with record(layer) as step:
        layer(x).sum().backward()
    (routing,) = step.routings[""]
    assert telemetry.kept_per_token(routing).tolist() == [128] * 3
    assert layer.experts.up_proj.grad.any(dim=-1).sum() <= 3 * 128  # type: ignore[union-attr, operator]


def test_telemetry_says_that_there_is_no_distribution() -> None:
    made = MoE(router(), NeuronExperts(EXPERTS, DIM).double())
    with record(made) as step:
        made(torch.randn(4, DIM, dtype=torch.float64), mask=torch.tensor([True, False, True, True]))
    (routing,) = step.routings[""]
    assert telemetry.asked_per_token(routing).tolist() == [HEADS * K, 0, HEADS * K, HEADS * K]
    assert telemetry.drop_rate(routing).item() == 0
    with pytest.raises(ValueError, match="carries no probabilities"):
        telemetry.entropy(routing)


def test_autocast_computes_neurons_low_as_it_does_other_experts() -> None:
    layer, x = PEER(32, 64, 4, heads=2, key_dim=8), torch.randn(50, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), record(layer) as step:
        y = layer(x)
    assert y.dtype == torch.bfloat16
    weight = step.routings[""][0].dense().detach().double()
    u, v = (w.squeeze().double() for w in (layer.experts.up_proj, layer.experts.down_proj.mT))
    exact = (weight * F.gelu(x.double() @ u.T)) @ v
    assert (y.double() - exact).norm() < 0.01 * exact.norm()
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in (x, *layer.parameters()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProductKeyRouter(3, 24), "must be a square, such as 16 or 25, got 24"),
        (lambda: ProductKeyRouter(3, 25, 6), "1 <= k <= 5 half keys"),
        (lambda: ProductKeyRouter(3, 25, 2, key_dim=3), "an even key_dim"),
        (lambda: ProductKeyRouter(3, 25, 2, score="relu"), "score must be"),  # type: ignore[arg-type]
    ],
)
def test_what_does_not_fit_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
