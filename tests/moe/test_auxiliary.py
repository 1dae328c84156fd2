"""What a router says of losses that it cannot compute: which one, and what it would take."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.moe import balance
from zoo.moe.auxiliary import LOSSES
from zoo.moe.routers import DSelectKRouter, DynamicRouter, HierarchicalRouter, Router, TopKRouter


def spread(probs: Tensor) -> Tensor:
    """A loss that knows no mask."""
    return probs.std()


def scaled(probs: Tensor, factor: float) -> Tensor:
    """A loss with an option."""
    return factor * probs.sum()


@pytest.fixture(autouse=True)
def losses_of_a_user() -> Iterator[None]:
    module = ModuleType("losses_of_a_user")
    module.spread, module.scaled, module.factors = spread, scaled, [1.0]  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    yield
    del sys.modules[module.__name__]


def top_k(**options: Any) -> Router:
    return TopKRouter(4, 8, 2, **options)


def hierarchical(**options: Any) -> Router:
    return HierarchicalRouter(4, 8, num_groups=2, **options)


@pytest.mark.parametrize(
    ("make", "losses", "message"),
    [
        (top_k, {"null_load": 0.1}, "auxiliary loss 'null_load' needs num_null: give it as an option"),
        (top_k, {"device_level": 0.1}, "auxiliary loss 'device_level' needs num_devices"),
        (top_k, {"losses_of_a_user.scaled": 0.1}, "auxiliary loss 'losses_of_a_user.scaled' needs factor"),
        (top_k, {"switch": {"weight": 0.1, "selected": "unbiasd"}}, "'switch': selected names 'unbiasd', which is no"),
        (top_k, {"switch": None}, "'switch': expected a number or a table with 'weight', got None"),
        (top_k, {"switch": "much"}, "'switch': expected a number or a table with 'weight', got 'much'"),
        (
            top_k,
            {"losses_of_a_user.factors": 0.1},
            "'losses_of_a_user.factors': expected a function of tensors, found a",
        ),
        (top_k, {spread: 0.1}, "losses: expected names or import paths of functions, got <function spread"),
        (top_k, ["switch"], "losses: expected a table of names and weights, got ['switch']"),
        # There is no such logit, and a loss on noise must not be left out without a word.
        (lambda **o: DSelectKRouter(4, 8, **o), {"z": 0.1}, "auxiliary loss 'z' needs logits"),
        (lambda **o: DSelectKRouter(4, 8, **o), {"load": 0.1}, "auxiliary loss 'load' needs logits"),
        (lambda **o: DynamicRouter(4, 8, **o), {"load": 0.1}, "auxiliary loss 'load' needs noisy_logits"),
        (hierarchical, {"load": 0.1}, "auxiliary loss 'load' needs logits"),
        (hierarchical, {"switch": {"weight": 0.1, "scope": "sequence"}}, "or this gate has one decision for all"),
    ],
)
def test_what_a_loss_lacks_is_named(make: Any, losses: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make(losses=losses)(torch.randn(2, 3, 4))


def test_a_short_last_group_needs_a_loss_with_a_mask() -> None:
    losses = {"losses_of_a_user.spread": {"weight": 2.0, "scope": "group"}}
    router = TopKRouter(4, 8, 2, group_size=4, losses=losses)
    with pytest.raises(ValueError, match="takes no mask, but 6 tokens do not fill 2 groups of 4"):
        router(torch.randn(6, 4))
    x = torch.randn(8, 4)
    expected = 2 * (x @ router.weight.T).softmax(-1).std()
    torch.testing.assert_close(router(x).losses["losses_of_a_user.spread"], expected)


def test_an_option_of_a_users_loss() -> None:
    router = top_k(losses={"losses_of_a_user.scaled": {"weight": 0.5, "factor": 3.0}})
    torch.testing.assert_close(router(torch.randn(6, 4)).losses["losses_of_a_user.scaled"], torch.tensor(9.0))


def test_every_loss_is_in_the_module_of_losses() -> None:
    known = {getattr(function, "func", function) for function in LOSSES.values()}
    assert known <= {getattr(balance, name) for name in balance.__all__}
