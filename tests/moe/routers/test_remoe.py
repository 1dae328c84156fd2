from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from zoo.moe.routers import ReMoERouter
from zoo.moe.routers.remoe import update_l1


@pytest.mark.parametrize("training", [True, False])
def test_weights_are_the_positive_logits(training: bool) -> None:
    router = ReMoERouter(4, 6, 2).double().train(training)
    x = torch.randn(15, 4, dtype=torch.float64)
    expected = (x @ router.weight.T).clamp(min=0)
    routing = router(x)
    torch.testing.assert_close(routing.dense(), expected)
    assert torch.equal(routing.counts.long(), (expected > 0).sum(0))
    assert set(routing.losses) == ({"l1"} if training else set())


def test_the_loss_is_the_authors_with_its_gradient() -> None:
    """lambda * sum_e (mass_e / T) * (count_e / (T k)) * E; counts have no gradient."""
    router = ReMoERouter(4, 6, 2, coefficient=0.3).double()
    logits = torch.randn(15, 6, dtype=torch.float64, requires_grad=True)
    loss, expected = router.route(logits).losses["l1"], torch.tensor(0.0).double()
    for e in range(6):
        column = logits[:, e]
        expected = expected + column[column > 0].sum() / 15 * int((column > 0).sum()) / (15 * 2) * 6
    torch.testing.assert_close(loss, 0.3 * expected, rtol=1e-6, atol=0)
    grads = [torch.autograd.grad(value, logits)[0] for value in (loss, 0.3 * expected)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=0)


def test_the_coefficient_follows_the_sparsity_of_all_gates_together() -> None:
    model = nn.ModuleList([ReMoERouter(4, 8, 2), ReMoERouter(4, 8, 2), nn.Linear(2, 2)])
    coefficient = 1e-8
    for positive in ([3, 3], [1, 2], [4, 1], [4, 0], [0, 0]):
        for gate, many in zip(model, positive):
            logits = torch.full((10, 8), -1.0)
            logits[:, :many] = 1.0
            gate.route(logits)  # type: ignore[operator]
        update_l1(model)
        coefficient = coefficient * 1.2 if sum(positive) / 16 > 2 / 8 else coefficient / 1.2
        for gate in list(model)[:2]:
            assert float(gate.l1_coefficient) == pytest.approx(coefficient, rel=1e-5)  # type: ignore[arg-type]


def test_micro_batches_and_padding_are_counted_right() -> None:
    router, logits, mask = ReMoERouter(4, 8, 1), torch.randn(30, 8), torch.rand(30) > 0.4
    router.route(logits, mask=mask)
    router.route(logits)
    met = int((logits > 0)[mask].sum() + (logits > 0).sum())
    assert router.met_since_update.tolist() == [met, 8 * (int(mask.sum()) + 30)]  # type: ignore[union-attr]
    router.eval().route(logits)
    assert router.met_since_update[0] == met  # type: ignore[index]


def test_recomputation_does_not_count_and_nothing_happens_without_tokens() -> None:
    router, x = ReMoERouter(4, 8), torch.randn(10, 4, requires_grad=True)
    dense: Any = checkpoint(lambda x: router(x).dense(), x, use_reentrant=False)
    dense.sum().backward()
    assert router.met_since_update[1] == 80  # type: ignore[index]
    update_l1(router)
    before = router.l1_coefficient.clone()
    update_l1(router)
    router(torch.randn(0, 4))
    update_l1(router)
    assert torch.equal(router.l1_coefficient, before)


def test_the_coefficient_is_saved_and_stays_float32() -> None:
    router = ReMoERouter(4, 8)
    router(torch.randn(10, 4).abs())
    update_l1(router)
    other = ReMoERouter(4, 8)
    other.load_state_dict(copy.deepcopy(router.state_dict()))
    assert torch.equal(other.l1_coefficient, router.l1_coefficient)
    assert router.l1_coefficient != 1e-8
    value = router.l1_coefficient.clone()
    assert router.bfloat16().l1_coefficient.dtype == torch.float32
    assert torch.equal(router.l1_coefficient, value)
    assert router.to("meta").bfloat16().l1_coefficient.dtype == torch.float32


def test_the_mean_number_of_experts_comes_near_k() -> None:
    torch.manual_seed(0)
    router = ReMoERouter(9, 8, 2, coefficient=1e-3)
    x, target = torch.cat([torch.randn(256, 8), torch.ones(256, 1)], dim=1), torch.randn(256).abs()
    optimizer, met = torch.optim.Adam(router.parameters(), lr=1e-2), []
    for _ in range(300):
        routing = router(x)
        loss = (routing.dense().sum(-1) - target).square().mean() + routing.losses["l1"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_l1(router)
        met.append(float(routing.counts.sum()) / 256)
    assert met[0] > 3.3
    assert 1.5 < sum(met[-100:]) / 100 < 2.5


@pytest.mark.parametrize("options", [{"k": 0}, {"k": 5}, {"multiplier": 1.0}])
def test_bad_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected 1 <= k <= 4 experts and multiplier > 1"):
        ReMoERouter(4, 4, **options)
