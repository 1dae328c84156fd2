from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from zoo.moe import MoE, ZeroComputationExperts
from zoo.moe.routers import MoEPlusPlusRouter
from zoo.moe.routers.moe_plus_plus import GatingResidual


def layer(**options: Any) -> MoE:
    moe = MoE(MoEPlusPlusRouter(6, 7, **options), ZeroComputationExperts(7, 6, 5, "silu")).double()
    for parameter in moe.parameters():
        parameter.data.normal_(std=0.5)
    return moe


def by_the_authors(moe: MoE, x: Tensor, below: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token and one expert at a time, as the published code computes it: 3 MLPs, 2 constants, copy, zero."""
    router, experts, rows, logits = moe.router, moe.experts, [], []
    for t in range(x.shape[0]):
        z = router.weight @ torch.tanh(router.hidden_weight @ x[t])  # type: ignore[operator]
        if below is not None:
            z = z + router.residual_weight @ below[t]  # type: ignore[operator]
        logits.append(z)
        gate, expert = z.softmax(0).topk(2)
        gate = torch.where(expert == 6, 0.0, gate)
        gate, y, scaled = gate / gate.sum(), torch.zeros(6, dtype=x.dtype), 2 * x[t]
        for g, e in zip(gate, expert.tolist()):
            if e < 3:
                out = experts.mlp.down_proj[e] @ F.silu(experts.mlp.up_proj[e] @ scaled)  # type: ignore[union-attr, index]
            elif e < 5:
                a = (experts.constant_weight[e - 3] @ scaled).softmax(0)  # type: ignore[index]
                out = a[0] * scaled + a[1] * experts.constant[e - 3]  # type: ignore[index]
            else:
                out = scaled if e == 5 else torch.zeros_like(scaled)
            y = y + g * out
        rows.append(y)
    return torch.stack(rows), torch.stack(logits)


def test_two_layers_and_their_gradients_are_those_of_the_published_code() -> None:
    first, second = layer(), layer()
    x = torch.randn(40, 6, dtype=torch.float64, requires_grad=True)
    gating = GatingResidual()
    found = x + first(x, gating=gating)
    found = found + second(found, gating=gating)
    y, logits = by_the_authors(first, x, None)
    expected = x + y
    expected = expected + by_the_authors(second, expected, logits)[0]
    torch.testing.assert_close(found, expected)
    assert all((first.router(x).counts > 0).tolist())
    inputs = [x, *(p for n, p in first.named_parameters() if "residual" not in n), *second.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad(out.square().sum(), inputs) for out in (found, expected))):
        torch.testing.assert_close(ours, theirs)


def test_checkpointing_repeats_what_each_layer_heard() -> None:
    layers = nn.ModuleList(layer() for _ in range(3))
    x = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)

    def gradients(repeat: bool) -> list[Tensor]:
        gating, y = GatingResidual(), x
        for moe in layers:
            y = y + (checkpoint(moe, y, use_reentrant=False, gating=gating) if repeat else moe(y, gating=gating))
        return list(torch.autograd.grad(y.square().sum(), [x, *layers[1].parameters()]))

    for ours, theirs in zip(gradients(True), gradients(False)):
        torch.testing.assert_close(ours, theirs)


def test_a_zero_expert_has_no_weight_and_the_rest_has_it_all() -> None:
    router = MoEPlusPlusRouter(6, 7, two_layers=False)
    logits = torch.randn(50, 7)
    logits[:, 6] = 9.0
    out = router.route(logits).dense()
    torch.testing.assert_close(out.amax(-1), torch.ones(50))
    assert not out[:, 6].any()
    alone = MoEPlusPlusRouter(6, 7, 1, two_layers=False).route(logits).dense()
    assert not alone.any()


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match="expected 0 <= zero < 4 experts, got zero=4"):
        MoEPlusPlusRouter(4, 4, zero=4)
    with pytest.raises(ValueError, match="4 experts with constant=2, copy=1, zero=1 leave 0 MLPs"):
        ZeroComputationExperts(4, 6, 5)


def test_a_layer_that_is_repeated_may_be_checkpointed() -> None:
    layer = MoE(MoEPlusPlusRouter(6, 8), ZeroComputationExperts(8, 6, 5)).double()
    for parameter in layer.parameters():
        parameter.data.normal_()
    x, gradients = torch.randn(9, 6, dtype=torch.float64), []
    for checkpointed in (False, True):
        gating, y = GatingResidual(), x.clone().requires_grad_()
        given = y
        for _ in range(4):
            y = y + (
                checkpoint(layer, y, use_reentrant=False, gating=gating) if checkpointed else layer(y, gating=gating)
            )
        for _ in range(2):
            gradients.append(torch.autograd.grad(y.square().sum(), [given, *layer.parameters()], retain_graph=True))
    for others in gradients[1:]:
        for found, expected in zip(others, gradients[0]):
            torch.testing.assert_close(found, expected)
