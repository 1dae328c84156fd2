from __future__ import annotations

from typing import Any

import pytest
import torch

from zoo.moe import Experts, MoE
from zoo.moe.routers import NullExpertRouter


@pytest.mark.parametrize(("k", "num_null"), [(1, 1), (3, 4), (7, 2)])
def test_weights_and_loss_are_those_of_the_paper(k: int, num_null: int) -> None:
    router = NullExpertRouter(4, 5, k, num_null=num_null, losses={"null_load": 0.5}).double()
    x = torch.randn(30, 4, dtype=torch.float64, requires_grad=True)
    probs = (x @ router.weight.T).softmax(-1)
    expected, chosen = torch.zeros(30, 5, dtype=torch.float64), torch.zeros(30, 5 + num_null, dtype=torch.float64)
    for t in range(30):
        best = probs[t].topk(k).indices
        chosen[t, best] = 1
        true = best[best < 5]
        expected[t, true] = probs[t, true] / probs[t, true].sum()
    load = chosen.mean(0)
    load[5:] = load[5:].mean()
    loss = 0.5 * (5 + num_null) * (load * probs.mean(0)).sum()
    routing = router(x)
    torch.testing.assert_close(routing.dense(), expected)
    torch.testing.assert_close(routing.losses["null_load"], loss)
    assert torch.equal(routing.asked, (expected > 0).sum(-1))  # type: ignore[arg-type]
    ours, theirs = routing.dense().square().sum() + routing.losses["null_load"], expected.square().sum() + loss
    for a, b in zip(*(torch.autograd.grad(out, [x, router.weight]) for out in (ours, theirs))):
        torch.testing.assert_close(a, b)


def test_the_loss_of_the_authors_code_is_that_of_transformers_over_all_experts() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    router = NullExpertRouter(4, 5, 3, num_null=4, losses={"transformers": 1.0})
    x = torch.randn(30, 4)
    expected = load_balancing_loss_func((x @ router.weight.T,), num_experts=9, top_k=3)
    torch.testing.assert_close(router(x).losses["transformers"], expected)


def test_a_token_that_chose_null_experts_only_gives_zero() -> None:
    moe = MoE(NullExpertRouter(4, 3, 2, num_null=2), Experts(3, 4, 5))
    moe.router.weight.data[:3] = -torch.ones(3, 4)  # type: ignore[index]
    moe.router.weight.data[3:] = torch.ones(2, 4)  # type: ignore[index]
    x = torch.rand(6, 4) + 1
    assert not moe(x).any()
    moe(-x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in moe.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("options", [{"k": 0, "num_null": 1}, {"k": 7, "num_null": 2}, {"k": 1, "num_null": 0}])
def test_bad_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected num_null >= 1 and 1 <= k"):
        NullExpertRouter(4, 4, **options)
