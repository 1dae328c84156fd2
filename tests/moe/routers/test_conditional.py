"""NLLB's conditional routing, against the layer of the authors' code written out."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import zoo
from zoo.moe import Experts, MoE, record, telemetry
from zoo.moe.routers import ConditionalRouter, GShardRouter, SoftRouter, TopKRouter


def layer(**options: Any) -> MoE:
    experts = 5
    moe = MoE(ConditionalRouter(6, experts, **{"gate": TopKRouter, **options}), Experts(experts, 6, 7)).double()
    for parameter in moe.parameters():
        parameter.data.normal_()
    return moe


def by_the_authors_layer(moe: MoE, x: Tensor, mask: Tensor, noise: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Output [T, D] and the gates' sum over the number of real tokens; noise [T] is 0 where dropout hits."""
    router: Any = moe.router
    gates = (F.linear(x, router.budget_gate.weight).squeeze(-1) + router.budget_gate.bias).sigmoid() * noise / (1 - p)
    gates = gates * mask
    weights: Any = moe.experts.gate_up_proj, moe.experts.down_proj

    def expert(e: int, rows: Tensor) -> Tensor:
        gate, up = F.linear(rows, weights[0][e]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, weights[1][e])

    probs = F.linear(x, router.router.weight).softmax(-1)
    best = probs.topk(2, dim=-1)
    x_moe = sum((best.values * (best.indices == e)).sum(-1, keepdim=True) * expert(e, x) for e in range(probs.shape[1]))
    out = expert(4, x) * (1 - gates).unsqueeze(-1) + x_moe * gates.unsqueeze(-1)
    return out * mask.unsqueeze(-1), gates.sum() / mask.sum()


@pytest.mark.parametrize("training", [True, False])
def test_output_loss_and_gradients_are_those_of_the_authors_layer(training: bool, monkeypatch: Any) -> None:
    moe = layer(budget=0.7, budget_weight=0.3, dropout=0.25).train(training)
    x, mask = torch.randn(40, 6, dtype=torch.float64, requires_grad=True), torch.rand(40) > 0.3
    noise = (torch.rand(40) > 0.25).double() if training else torch.ones(40).double()
    p = 0.25 if training else 0.0
    monkeypatch.setattr(F, "dropout", lambda g, p, training: g * noise / (1 - p) if training else g)
    with record(moe) as step:
        found = moe(x, mask=mask)
    expected, share = by_the_authors_layer(moe, x, mask, noise, p)
    torch.testing.assert_close(found, expected)
    losses = step.losses()
    assert losses.keys() == ({"cmr"} if training else set())
    total, wanted = found.square().sum(), expected.square().sum()
    if training:
        torch.testing.assert_close(losses["cmr"], 0.3 * (share - 0.7).abs())
        total, wanted = total + losses["cmr"], wanted + 0.3 * (share - 0.7).abs()
    variables = [x, *moe.parameters()]
    for ours, theirs in zip(torch.autograd.grad(total, variables), torch.autograd.grad(wanted, variables)):
        torch.testing.assert_close(ours, theirs)


def test_dropout_leaves_a_token_to_the_dense_mlp_alone() -> None:
    router = ConditionalRouter(6, 4, dropout=0.5, gate="TopKRouter")
    dense = router(torch.randn(4000, 6)).dense()
    alone = dense[:, 3] == 1
    assert abs(float(alone.float().mean()) - 0.5) < 0.05
    assert not dense[alone][:, :3].any()


def test_a_dropped_token_still_meets_the_dense_mlp() -> None:
    router = ConditionalRouter(6, 4, dropout=0.0, gate=GShardRouter, capacity=zoo.moe.Capacity(tokens=1))
    routing = router(torch.randn(50, 6))
    kept, asked = telemetry.kept_per_token(routing), telemetry.asked_per_token(routing)
    assert (kept >= 1).all()
    assert (kept == 1).any()
    assert routing.counts[3] == 50
    assert set(asked.tolist()) <= {2, 3}  # the second expert is met by chance


def test_the_budget_is_met_by_training() -> None:
    torch.manual_seed(0)
    router = ConditionalRouter(6, 4, budget=0.3, budget_weight=1.0, dropout=0.0, gate="TopKRouter")
    x = torch.randn(200, 6)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        router(x).losses["cmr"].backward()
        optimizer.step()
    assert 1 - router(x).dense()[:, 3].mean().item() == pytest.approx(0.3, abs=0.02)


def test_yaml_names_it_and_its_inner_gate() -> None:
    spec = {"class_path": "zoo.moe.routers.ConditionalRouter", "init_args": {"gate": "GShardRouter", "budget": 0.6}}
    model = zoo.create_model("language/mixtral_tiny", num_hidden_layers=2, num_local_experts=4, router=spec)
    with record(model) as step:
        model(torch.randint(0, 1024, (2, 8)))
    assert set(step.losses()) == {"gshard", "cmr"}
    assert zoo.models.count_parameters(model)[1] > 0
    router = model.model.layers[0].mlp.router
    assert (router.router.num_experts, router.k, router.budget) == (3, 3, 0.6)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ConditionalRouter(4, 1), ValueError, "the last expert is the FFN; expected at least 2, got 1"),
        (lambda: ConditionalRouter(4, 3, budget=1.5), ValueError, "got 1.5 and 0.2"),
        (lambda: ConditionalRouter(4, 3, dropout=1.0), ValueError, "got 0.8 and 1.0"),
        (lambda: ConditionalRouter(4, 3, gate="TopRouter"), ValueError, "unknown gate 'TopRouter'; known: AttentionR"),
        (
            lambda: ConditionalRouter(4, 3, gate=SoftRouter, slots=1)(torch.randn(1, 2, 4)),
            TypeError,
            "ConditionalRouter: SoftRouter hands on a Slots, expected a Routing",
        ),
    ],
)
def test_what_does_not_fit_is_named(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make()
