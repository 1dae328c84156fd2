"""Losses, routings and loads are counted exactly once, whatever runs the model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import zoo.moe
from zoo.moe import MoE, Router, Routing, record
from zoo.moe.routers import TopKRouter

LOSSES = {"switch": 0.5, "z": 0.1}


class Block(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.moe = MoE(TopKRouter(12, 6, 2, selection_bias=True, losses=LOSSES, **options), zoo.moe.Experts(6, 12, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(x))


class Model(nn.Module):
    """Two blocks, run in turn; `calls` names the blocks of one pass, `checkpointing` is use_reentrant or None."""

    def __init__(self, calls: tuple[int, ...] = (0, 1), checkpointing: bool | None = None, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(**options) for _ in range(2))
        self.calls, self.checkpointing = calls, checkpointing

    def forward(self, x: Tensor) -> Tensor:
        for i in self.calls:
            block = self.blocks[i]
            if self.checkpointing is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointing)  # type: ignore[assignment]
        return x


def tokens(batch: int = 4) -> Tensor:
    return torch.randn(batch, 9, 12, generator=torch.Generator().manual_seed(1))


def loads(model: nn.Module) -> list[list[int]]:
    seen = [m.load_since_update for m in model.modules() if isinstance(m, TopKRouter)]
    return [[] if load is None else load.tolist() for load in seen]


def train_step(model: nn.Module, x: Tensor, run: Callable[..., Tensor] | None = None, inside: bool = False) -> dict:
    """One step; what it made of losses, calls, gradients and loads."""
    run = model if run is None else run
    with record(model) as step:
        loss = run(x).square().mean() + sum(step.losses().values())
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    return {
        "losses": {name: value.item() for name, value in step.losses().items()},
        "calls": {name.removeprefix("_orig_mod."): len(calls) for name, calls in step.routings.items()},
        "loads": loads(model),
        "gradients": {
            name.removeprefix("_orig_mod.").removeprefix("module."): p.grad for name, p in model.named_parameters()
        },
    }


def same(found: dict, expected: dict) -> None:
    assert found["calls"] == expected["calls"]
    assert found["loads"] == expected["loads"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_losses_are_summed_over_layers_and_reach_the_router() -> None:
    model, x = Model(), tokens()
    made = train_step(model, x)
    alone = [block.moe for block in Model().blocks]
    routings = []
    for moe, block in zip(alone, model.blocks):
        routings.append(moe.router(block.norm(x)))  # type: ignore[operator]
        x = block(x).detach()
    for name in LOSSES:
        assert made["losses"][name] == pytest.approx(sum(r.losses[name].item() for r in routings), rel=1e-5)
    assert made["calls"] == {"blocks.0.moe": 1, "blocks.1.moe": 1}
    assert [sum(load) for load in made["loads"]] == [4 * 9 * 2] * 2
    assert made["gradients"]["blocks.0.moe.router.weight"].any()


@pytest.mark.parametrize("inside", [False, True])
def test_checkpointing_counts_once(inside: bool) -> None:
    same(train_step(Model(checkpointing=False), tokens(), inside=inside), train_step(Model(), tokens()))


def test_reentrant_checkpointing_is_refused_rather_than_losing_gradients() -> None:
    model = Model(checkpointing=True)
    with record(model) as step:
        y = model(tokens().requires_grad_())
        with pytest.raises(RuntimeError, match=r"'blocks\.0\.moe' have no gradient.*use_reentrant=False"):
            step.losses()
        with torch.no_grad():
            assert set(step.losses()) == set(LOSSES)
    y.sum().backward()
    assert [len(calls) for calls in step.routings.values()] == [1, 1]


def test_values_without_gradients_are_fine_where_none_are_wanted() -> None:
    model = Model()
    with torch.no_grad(), record(model) as step:
        model(tokens())
        assert not step.losses()["z"].requires_grad
    for block in model.blocks:
        block.moe.router.requires_grad_(False)
    with record(model) as step:
        model(tokens())
    assert set(step.losses()) == set(LOSSES)


@pytest.mark.parametrize("checkpointing", [None, False])
def test_a_compiled_model_counts_once_in_one_graph(checkpointing: bool | None) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Model(checkpointing=checkpointing)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    same(train_step(model, tokens(), compiled), train_step(Model(), tokens()))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    model.zero_grad()
    with record(model) as step:
        for _ in range(6):
            compiled(tokens())
    assert [len(calls) for calls in step.routings.values()] == [6, 6]
    # A second graph is for loads that are added to instead of started; no further one for more calls.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= graphs + 1
    assert [sum(load) for load in loads(model)] == [7 * 72] * 2


def test_compiled_blocks_under_checkpointing_count_once() -> None:
    torch._dynamo.reset()
    model = Model()
    compiled = [torch.compile(block, backend="aot_eager", fullgraph=True) for block in model.blocks]

    def run(x: Tensor) -> Tensor:
        for block in compiled:
            x = checkpoint(block, x, use_reentrant=False)  # type: ignore[assignment]
        return x

    same(train_step(model, tokens(), run, inside=True), train_step(Model(), tokens()))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_capacity_compiles_to_the_same_result(fullgraph: bool) -> None:
    torch._dynamo.reset()
    capacity = zoo.moe.Capacity(0.6, renormalize=True)
    model = Model(capacity=capacity)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    with torch._dynamo.config.patch(capture_scalar_outputs=fullgraph):
        found = train_step(model, tokens(), compiled)
    same(found, train_step(Model(capacity=capacity), tokens()))


@pytest.mark.parametrize("checkpointing", [None, False])
def test_accumulated_micro_batches_give_the_mean_of_their_losses(checkpointing: bool | None) -> None:
    x = tokens(6)
    model, expected = Model(checkpointing=checkpointing), Model()
    for part in x.split(2):
        with record(model) as step:
            out = model(part).square().mean()
        ((out + sum(step.losses().values())) / 3).backward()
    total = torch.tensor(0.0)
    for part in x.split(2):
        with record(expected) as step:
            out = expected(part).square().mean()
        total = total + out + sum(step.losses().values())
    (total / 3).backward()
    for ours, theirs in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(model.blocks, expected.blocks):
        assert ours.moe.router.load_since_update.sum() == 6 * 9 * 2
        assert torch.equal(ours.moe.router.load_since_update, theirs.moe.router.load_since_update)


def test_several_micro_batches_in_one_block_are_all_kept_in_order() -> None:
    model, parts = Model(), tokens(6).split(2)
    with record(model) as step:
        outs = [model(part) for part in parts]
    assert [len(calls) for calls in step.routings.values()] == [3, 3]
    first = [routing.dense() for routing in step.routings["blocks.0.moe"]]
    for part, dense in zip(parts, first):
        block = model.blocks[0]
        torch.testing.assert_close(block.moe.router(block.norm(part)).dense(), dense)
    assert len(outs) == 3


@pytest.mark.parametrize("checkpointing", [None, False])
def test_a_layer_that_is_called_twice_counts_twice(checkpointing: bool | None) -> None:
    made = train_step(Model((0, 0), checkpointing), tokens())
    assert made["calls"] == {"blocks.0.moe": 2, "blocks.1.moe": 0}
    assert [sum(load) for load in made["loads"]] == [2 * 72, 0]
    x, expected = tokens(), dict.fromkeys(LOSSES, 0.0)
    block = Model().blocks[0]
    for _ in range(2):
        for name, loss in block.moe.router(block.norm(x)).losses.items():
            expected[name] += loss.item()
        x = block(x).detach()
    assert made["losses"] == pytest.approx(expected, rel=1e-5)


def test_nested_blocks_each_see_what_happens_inside_them() -> None:
    model = Model()
    with record(model) as outer:
        model(tokens())
        with record(model.blocks[0]) as inner:
            model(tokens())
        model(tokens())
    assert [len(calls) for calls in outer.routings.values()] == [3, 3]
    assert {name: len(calls) for name, calls in inner.routings.items()} == {"moe": 1}
    alone = inner.routings["moe"][0]
    assert alone is outer.routings["blocks.0.moe"][1]
    assert inner.losses()["z"] is alone.losses["z"]


def test_nothing_is_kept_after_the_block_even_when_it_failed() -> None:
    model = Model()
    with pytest.raises(RuntimeError), record(model):
        model(tokens()[..., :5])
    assert all(block.moe._recording == () for block in model.blocks)


def test_evaluation_records_decisions_without_losses() -> None:
    model = Model().eval()
    with torch.no_grad(), record(model) as step:
        model(tokens())
    assert step.losses() == {}
    assert all(routing.num_tokens == 36 for calls in step.routings.values() for routing in calls)
    assert all(block.moe.router.load_since_update is None for block in model.blocks)


def test_recording_does_not_change_the_result() -> None:
    model, x = Model(), tokens()
    plain = model(x)
    with record(model):
        assert torch.equal(model(x), plain)


def test_a_copy_made_meanwhile_is_not_recorded() -> None:
    model, x = Model(), torch.randn(2, 3, 12)
    with record(model) as step:
        y = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), y)
    assert [len(calls) for calls in step.routings.values()] == [1, 1]


class Counting(Router):
    """A gate of one's own that counts its passes in training."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__(dim, num_experts)
        self.weight = nn.Parameter(torch.randn(num_experts, dim))
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor, **context: Any) -> Routing:
        probs = (x.flatten(0, -2) @ self.weight.T).softmax(-1)
        if self.training and not zoo.moe.is_recomputation():
            self.passes += 1
        weight, expert = probs.topk(2, -1)
        return Routing.from_choices(expert, weight, self.num_experts)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_gate_of_ones_own_can_tell_a_recomputation(use_reentrant: bool) -> None:
    layer = MoE(Counting(12, 6), zoo.moe.Experts(6, 12, 8))
    for _ in range(3):
        x = torch.randn(5, 12, requires_grad=True)
        y: Any = checkpoint(layer, x, use_reentrant=use_reentrant)
        y.sum().backward()
    assert int(layer.router.passes) == 3  # type: ignore[arg-type]
