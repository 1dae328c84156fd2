"""Steps of gates whose number of assignments is known: the host waits for no device, and sends it nothing.

On a CPU: nothing is called that would wait for a GPU, and no tensor is made of Python's numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent / "routers"))
from gate_cases import DIM, GATES, HIDDEN, layer, tokens

from zoo.models.recommendation_levels import Level
from zoo.moe import DepthRouter, Experts, MixtureOfDepths, MoE, gate_losses, record
from zoo.moe.routers import ReMoERouter, TopKRouter

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "bincount", "equal"}
# Gates that choose or drop as many as values say, those that solve for balance, those whose labels the CPU checks.
OTHERS = (
    *(
        "top-any",
        "expert output masking",
        "null experts",
        "ReMoE",
        "DSelect-k",
        "dense to sparse",
        "expert choice, capped",
    ),
    *("GShard", "SiRA", "Skywork", "token rounding", "top-2 with capacity", "BASE", "sinkhorn"),
    *("StableMoE", "domain", "hash", "PanGu", "MoCLE", "task"),
)
KNOWN = [name for name in GATES if not name.startswith(OTHERS)]


class Waiting(TorchDispatchMode):
    """Fails where the host would wait for a GPU."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        given = [i for a in args if isinstance(a, (list, tuple)) for i in a]
        masks = name.startswith("index") and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in given)
        assert not masks, f"{name} of a mask"
        assert name not in WAITS, name
        return function(*args, **(kwargs or {}))


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Run something so that it fails where a GPU would be waited for, or be sent Python's numbers."""

    def refuse(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("a tensor of Python's numbers")

    def run(step: Callable[[], object]) -> None:
        step()  # what is made once
        with monkeypatch.context() as patch, Waiting():
            patch.setattr(torch, "tensor", refuse)
            patch.setattr(Tensor, "new_tensor", refuse)
            step()

    return run


def step(moe: nn.Module, x: Tensor, **context: Any) -> None:
    x = x.clone().requires_grad_()
    with record(moe) as found:
        y = moe(x, **context)
    (y.square().sum() + sum(found.losses().values())).backward()


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", KNOWN)
def test_a_step_waits_for_nothing(name: str, training: bool, strict: Callable[..., None]) -> None:
    x, cluster = tokens()
    strict(partial(step, layer(GATES[name]).train(training), x, **GATES[name].context(x, cluster)))


def test_gates_with_noise_do_not_either(strict: Callable[..., None]) -> None:
    for noise in ("fixed", "learned"):
        router = TopKRouter(DIM, 4, 2, noise=noise, noise_std=0.25, jitter=0.01, losses={"load": 0.1, "switch": 0.1})
        strict(partial(step, MoE(router, Experts(4, DIM, HIDDEN)), torch.randn(7, DIM)))


def test_depth_does_not_either(strict: Callable[..., None]) -> None:
    moe = MixtureOfDepths(nn.Linear(DIM, DIM), DepthRouter(DIM, 0.5))
    strict(partial(step, moe, torch.randn(3, 8, DIM)))


def test_levels_of_shared_and_own_experts_do_not_either(strict: Callable[..., None]) -> None:
    level, x = Level(DIM, [2, 1, 1], [HIDDEN], 2, "own", "DenseRouter"), torch.randn(5, DIM)
    strict(lambda: level(x).sum().backward())


def test_losses_of_gates_do_not_either(strict: Callable[..., None]) -> None:
    gates, met = torch.rand(9, 4), torch.rand(9, 4) > 0.5
    strict(lambda: gate_losses.top_any_cost(gates))
    strict(lambda: gate_losses.conditional_budget(gates[:, 0], 0.2))
    assert gate_losses.top_any_cost(gates) == pytest.approx(float(gates.mean()), rel=1e-5)
    assert gate_losses.conditional_budget(gates[:, 0], 0.2) == pytest.approx(
        abs(float(gates[:, 0].mean()) - 0.2), rel=1e-5
    )
    router = ReMoERouter(DIM, 4)
    strict(lambda: router.train()._count(met, None))
    assert router.met_since_update is not None
    assert router.met_since_update.tolist() == [2 * int(met.sum()), 2 * met.numel()]
