"""What holds for every gate; the gates are rows of the table in `gate_cases.py`."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gate_cases import DIM, EXPERTS, GATES, HIDDEN, Gate, layer, tokens
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.moe import MLP, MoE, Router, portable, record, routers, schedule
from zoo.moe.routers.remoe import update_l1

every_gate = pytest.mark.parametrize("gate", GATES.values(), ids=GATES.keys())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small take longer on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(moe: nn.Module, x: Tensor, seed: int = 1, **context: Any) -> Tensor:
    torch.manual_seed(seed)
    return moe(x, **context)


def gradients(moe: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("_orig_mod."): p.grad.clone() for name, p in moe.named_parameters() if p.grad is not None}


def same(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max()) if value.numel() else 0.0
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=rtol * scale, msg=lambda m, n=name: f"{n}: {m}")


# Gates that no plain layer has, and the tests that they have instead.
ELSEWHERE = {"PatchRouter": "test_conv_experts.py", "SwitchHeadRouter": "test_switch_head.py"}


def test_no_gate_is_missing() -> None:
    known = {c for c in vars(routers).values() if isinstance(c, type) and issubclass(c, Router) and c is not Router}
    bases = {base for c in known for base in c.__bases__}  # what only others are made of
    met = {type(m) for gate in GATES.values() for m in gate.make(DIM, EXPERTS).modules()}
    assert {c.__name__ for c in known - met - bases} == set(ELSEWHERE)
    for name, file in ELSEWHERE.items():
        assert name in (Path(__file__).parents[1] / file).read_text()


@every_gate
def test_portable_operators_compute_the_same(gate: Gate) -> None:
    moe = layer(gate).eval()
    x, cluster = tokens()
    with torch.no_grad():
        expected = run(moe, x, **gate.context(x, cluster))
        with portable():
            found = run(moe, x, **gate.context(x, cluster))
    same({"y": found}, {"y": expected})


@every_gate
@pytest.mark.parametrize("training", [True, False])
def test_probabilities_are_a_distribution(gate: Gate, training: bool) -> None:
    moe = layer(gate, torch.float64).train(training)
    x, cluster = tokens(dtype=torch.float64)
    with record(moe) as step:
        run(moe, 3 * x, **gate.context(x, cluster))
    probs = getattr(step.routings[""][0], "probs", None)
    if probs is not None:
        assert probs.min() >= 0
        torch.testing.assert_close(probs.sum(-1), torch.ones(len(probs), dtype=probs.dtype), rtol=0, atol=1e-6)


@every_gate
@pytest.mark.parametrize("training", [True, False])
def test_masked_tokens_are_nowhere(gate: Gate, training: bool) -> None:
    moe = layer(gate, torch.float64).train(training)
    x, cluster = tokens(dtype=torch.float64)
    mask = torch.rand(3, 5) > 0.4
    mask[0] = False
    outs, grads = [], []
    for filler in (float("nan"), 7.0):
        filled = x.where(mask[..., None], filler).requires_grad_()
        moe.zero_grad()
        with record(moe) as step:
            y = run(moe, filled, mask=mask, **gate.context(filled, cluster))
        assert not y[~mask].any()
        (y.square().sum() + sum(step.losses().values())).backward()
        outs.append(y.detach())
        grads.append({**gradients(moe), "x": filled.grad})
        assert not filled.grad[~mask].any()  # type: ignore[index]
    torch.testing.assert_close(*outs)
    same(*grads, rtol=1e-9)
    assert all(g.isfinite().all() for g in grads[0].values())


@every_gate
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1)])
@pytest.mark.parametrize("training", [True, False])
def test_no_token_and_one_token(gate: Gate, shape: tuple[int, int], training: bool) -> None:
    moe = layer(gate).train(training)
    x, cluster = tokens(*shape)
    x.requires_grad_()
    with record(moe) as step:
        y = run(moe, x, **gate.context(x, cluster))
    loss = y.square().sum() + sum(step.losses().values())
    loss.backward()
    assert y.shape == x.shape
    assert y.isfinite().all()
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients(moe).values())


@pytest.mark.parametrize("gate", [g for g in GATES.values() if g.smooth], ids=[n for n, g in GATES.items() if g.smooth])
def test_gradient_is_that_of_finite_differences(gate: Gate) -> None:
    moe = layer(gate, torch.float64)
    x, cluster = tokens(dtype=torch.float64)
    context = gate.context(x, cluster)
    names = [name for name, _ in moe.router.named_parameters()]

    def forward(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        weights = {f"router.{name}": value for name, value in zip(names, values)}
        with record(moe) as step:
            y = torch.func.functional_call(moe, weights, (x,), context)
        return y, *step.losses().values()

    inputs = [x.requires_grad_(), *(p.detach().clone().requires_grad_() for p in moe.router.parameters())]
    assert torch.autograd.gradcheck(forward, inputs, fast_mode=True)


@every_gate
@pytest.mark.parametrize("training", [True, False])
def test_the_seed_decides(gate: Gate, training: bool) -> None:
    moe = layer(gate).train(training)
    x, cluster = tokens()
    first, again = (run(copy.deepcopy(moe), x, **gate.context(x, cluster)) for _ in range(2))
    assert torch.equal(first, again)


@every_gate
@pytest.mark.parametrize("training", [True, False])
def test_a_saved_state_gives_the_same_decisions(gate: Gate, training: bool) -> None:
    moe, other = layer(gate, seed=0), layer(gate, seed=9)
    x, cluster = tokens()
    for step in range(2):  # a state that training changes is part of it
        run(moe, x, seed=step, **gate.context(x, cluster)).sum().backward()
    other.load_state_dict(moe.state_dict())
    expected, found = (run(m.train(training), x, **gate.context(x, cluster)) for m in (moe, other))
    assert torch.equal(expected, found)


@every_gate
def test_made_on_the_meta_device_it_starts_as_any_other(gate: Gate) -> None:
    with torch.device("meta"):
        experts = [gate.experts(EXPERTS, DIM, HIDDEN) for _ in range(2)]
        moe, loaded = (MoE(gate.make(DIM, EXPERTS), own) for own in experts)  # type: ignore[arg-type]
    moe.to_empty(device="cpu")
    with torch.no_grad():  # what fresh memory may hold
        for tensor in [*moe.parameters(), *moe.buffers()]:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 99)
    for module in moe.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    fresh = layer(gate)
    for (name, ours), theirs in zip(moe.named_buffers(), fresh.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    x, cluster = tokens()
    assert run(moe, x, **gate.context(x, cluster)).isfinite().all()
    loaded.load_state_dict(fresh.state_dict(), assign=True)
    found, expected = (run(m.eval(), x, **gate.context(x, cluster)) for m in (loaded, fresh))
    assert torch.equal(found, expected)


@every_gate
@pytest.mark.parametrize("training", [True, False])
def test_autocast_changes_no_decision(gate: Gate, training: bool) -> None:
    moe = layer(gate).train(training)
    twin = copy.deepcopy(moe)
    x, cluster = tokens()
    decisions = []
    for model, enabled in ((moe, False), (twin, True)):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled), record(model) as step:
            run(model, x, **gate.context(x, cluster))
            decisions.append((step.routings[""][0].dense(), step.losses()))
    (expected, losses), (found, others) = decisions
    torch.testing.assert_close(found, expected)
    same(others, losses)


@every_gate
def test_it_trains_in_low_precision(gate: Gate) -> None:
    moe = layer(gate, torch.bfloat16)
    x, cluster = tokens(dtype=torch.bfloat16)
    with record(moe) as step:
        y = run(moe, x, **gate.context(x, cluster))
    assert y.dtype == torch.bfloat16
    for module in moe.modules():
        if hasattr(module, "reset_parameters"):  # torch draws no orthogonal matrix in 16 bits
            copy.deepcopy(module).reset_parameters()
    (y.float().square().sum() + sum(step.losses().values())).backward()
    assert all(g.isfinite().all() and g.dtype == torch.bfloat16 for g in gradients(moe).values())


@every_gate
def test_every_parameter_has_a_gradient(gate: Gate) -> None:
    """Data parallelism waits for one."""
    moe = layer(gate)
    x, cluster = tokens()
    with record(moe) as step:
        y = run(moe, x, **gate.context(x, cluster))
    (y.square().sum() + sum(step.losses().values())).backward()
    assert gradients(moe).keys() == {name for name, p in moe.named_parameters() if p.requires_grad}


def train_step(moe: nn.Module, call: Any, x: Tensor, context: dict[str, Any]) -> dict[str, Tensor]:
    moe.zero_grad()
    torch.manual_seed(1)
    with record(moe) as step:
        y = call(x, **context)
        losses = step.losses()
        (y.square().sum() + sum(losses.values())).backward()
    calls = [len(found) for found in step.routings.values()]
    assert calls == [1]
    return {"y": y.detach(), **{k: v.detach() for k, v in losses.items()}, **gradients(moe)}


@every_gate
def test_compiled_it_does_the_same(gate: Gate) -> None:
    torch._dynamo.reset()
    moe = layer(gate)
    x, cluster = tokens()
    context = gate.context(x, cluster)
    twin = copy.deepcopy(moe)
    expected = train_step(twin, twin, x, context)
    same(train_step(moe, torch.compile(moe, backend="aot_eager"), x, context), expected)


@pytest.mark.parametrize("name", ["BASE", "sinkhorn"])
def test_a_balanced_choice_is_part_of_one_graph(name: str) -> None:
    torch._dynamo.reset()
    moe = layer(GATES[name])
    twin, compiled = copy.deepcopy(moe), torch.compile(moe, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (5, 9):
        x, _ = tokens(3, length)
        same(train_step(moe, compiled, x, {}), train_step(twin, twin, x, {}))


@every_gate
def test_checkpointing_counts_losses_once(gate: Gate) -> None:
    moe = layer(gate)
    x, cluster = tokens()
    context, twin = gate.context(x, cluster), copy.deepcopy(moe)

    def recomputed(x: Tensor, **context: Any) -> Tensor:
        return checkpoint(moe, x, use_reentrant=False, **context)  # type: ignore[return-value]

    expected = train_step(twin, twin, x, context)
    same(train_step(moe, recomputed, x, context), expected)
    for ours, theirs in zip(moe.buffers(), twin.buffers()):
        torch.testing.assert_close(ours, theirs)


def clusters(whole_sequences: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of eight clusters of one size [8, 32, 8], the cluster of each, and targets: a linear map a cluster."""
    maps, noise = torch.randn(8, 8, 8) / 8**0.5, torch.randn(8, 32, 8)
    cluster = torch.arange(256).view(8, 32) // 32 if whole_sequences else torch.arange(256).view(8, 32) % 8
    return noise + 4 * torch.eye(8)[cluster], cluster, torch.einsum("bsd,bsde->bse", noise, maps[cluster])


def fitted(model: nn.Module, gate: Gate) -> float:
    """Share of the targets' variance that is left after training."""
    torch.manual_seed(3)
    x, cluster, y = clusters(gate.whole_sequences)
    context = gate.context(x, cluster) if isinstance(model, MoE) else {}
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(150):
        with record(model) as step:
            loss = (model(x, **context) - y).square().mean() + sum(step.losses().values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.advance(model)
        update_l1(model)
    model.train(gate.chooses_otherwise_in_training)
    with torch.no_grad():
        return float((model(x, **context) - y).square().mean() / y.var())


@functools.cache
def error_of_dense(active: int, whole_sequences: bool) -> float:
    """The same of a dense layer with so many active experts' parameters."""
    torch.manual_seed(2)
    alike = next(g for g in GATES.values() if (g.active, g.whole_sequences) == (active, whole_sequences))
    return fitted(MLP(8, active * 16, "silu", bias=True), alike)


@every_gate
def test_it_trains(gate: Gate) -> None:
    """At equal active parameters its error is below half of a dense layer's; or it is not, and the row says why."""
    torch.manual_seed(2)
    moe = MoE(gate.make(8, EXPERTS), gate.experts(EXPERTS, 8, 16))  # type: ignore[arg-type]
    dense, sparse = error_of_dense(gate.active, gate.whole_sequences), fitted(moe, gate)
    assert (sparse > dense / 2) if gate.cannot else (sparse < dense / 2), f"{sparse:.3f} against {dense:.3f} dense"
