"""What holds for every attention whose heads or projections are experts; the layers are in `attention_cases.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_cases import CHOOSING_EXPERTS, DIM, LAYERS, made
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.moe import KeyValues, MoA, MoH, SwitchHead, record, rotary
from zoo.moe.routers import TopKRouter

EVERY = {**LAYERS, **CHOOSING_EXPERTS}
every_layer = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY.keys())
choosing_by_itself = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
LEFT = torch.tensor([[True] * 6, [False, False, True, True, True, True], [False] * 6])
RIGHT = torch.tensor([[True] * 6, [True, True, True, True, False, False], [False] * 6])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small take longer on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tokens(batch: int = 3, length: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, length, DIM, dtype=dtype)


def gradients(layer: nn.Module) -> dict[str, Tensor]:
    named = layer.named_parameters()
    return {name.removeprefix("_orig_mod."): p.grad.clone() for name, p in named if p.grad is not None}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{n}: {m}")


@every_layer
@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.filterwarnings("ignore:ExpertChoiceRouter in a causal model")
def test_padding_is_nowhere(make: Any, mask: Tensor, causal: bool) -> None:
    layer, base, seen = made(make, causal=causal), tokens(), []
    for filler in (float("nan"), 7.0):
        x = base.where(mask[..., None], filler).requires_grad_()
        layer.zero_grad()
        with record(layer) as step:
            y = layer(x, mask=mask)
        loss = y[mask].square().sum() + sum(step.losses().values())
        loss.backward()
        assert not x.grad[~mask].any()  # type: ignore[index]
        for calls in step.routings.values():
            assert not calls[0].dense()[~mask.flatten()].any()
        seen.append({"y": y.detach(), "loss": loss.detach(), "x": x.grad, **gradients(layer)})  # type: ignore[dict-item]
    same(*seen)
    assert all(value.isfinite().all() for value in seen[0].values())


@choosing_by_itself
@pytest.mark.parametrize("causal", [False, True])
def test_a_padded_sequence_is_the_sequence_alone(make: Any, causal: bool) -> None:
    layer, x = made(make, causal=causal).eval(), tokens()
    for mask in (LEFT, RIGHT):
        torch.testing.assert_close(layer(x, mask=mask)[1][mask[1]], layer(x[1:2, mask[1]])[0])


@choosing_by_itself
@pytest.mark.parametrize("mask", [None, LEFT], ids=["whole", "padded"])
def test_an_attention_mask_says_what_a_query_sees(make: Any, mask: Tensor | None) -> None:
    layer, x, length = made(make, causal=True).eval(), tokens(), 6
    causal = torch.ones(length, length, dtype=torch.bool).tril().expand(3, 1, length, length)
    seen = causal if mask is None else causal & mask[:, None, None]
    real = slice(None) if mask is None else mask
    torch.testing.assert_close(layer(x, mask=mask, attention_mask=seen)[real], layer(x, mask=mask)[real])
    # Two documents in a row, which do not see each other, are each as it is alone.
    document = torch.tensor([0, 0, 1, 1, 1, 1])
    apart = layer(x, attention_mask=causal[:1] & (document[:, None] == document))
    torch.testing.assert_close(apart, torch.cat([layer(x[:, :2]), layer(x[:, 2:])], dim=1))


def test_an_attention_mask_of_another_length_is_an_error() -> None:
    layer = made(LAYERS["MoA"])
    with pytest.raises(ValueError, match=r"attention_mask \[B or 1, 1, S, 6\], got \[1, 1, 6, 5\]"):
        layer(tokens(), attention_mask=torch.ones(1, 1, 6, 5, dtype=torch.bool))


@choosing_by_itself
def test_a_causal_layer_does_not_see_later_tokens(make: Any) -> None:
    layer, x = made(make, causal=True), tokens()
    changed = torch.cat([x[:, :4], tokens(length=2)], dim=1)
    torch.testing.assert_close(layer(changed)[:, :4], layer(x)[:, :4])
    both = made(make)
    assert not torch.allclose(both(changed)[:, :4], both(x)[:, :4])


@choosing_by_itself
@pytest.mark.parametrize("padded", [False, True])
def test_with_a_cache_a_token_at_a_time_gives_the_whole(make: Any, padded: bool) -> None:
    layer, x, cache = made(make, causal=True).eval(), tokens(), KeyValues()
    mask = LEFT if padded else None
    cos, sin = rotary(torch.arange(6).expand(3, -1), 4)
    whole, parts = layer(x, mask=mask, rotary=(cos, sin)), []
    for start, end in ((0, 3), (3, 5), (5, 6)):
        here = None if mask is None else mask[:, :end]
        now = cos[:, start:end], sin[:, start:end]
        parts.append(layer(x[:, start:end], mask=here, cache=cache, rotary=now))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    assert cache.keys is not None
    assert cache.keys.shape[2] == 6


@every_layer
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1)])
@pytest.mark.parametrize("training", [True, False])
def test_no_token_and_one_token(make: Any, shape: tuple[int, int], training: bool) -> None:
    layer, x = made(make).train(training), tokens(*shape).requires_grad_()
    with record(layer) as step:
        y = layer(x)
    loss = y.square().sum() + sum(step.losses().values())
    loss.backward()
    assert y.shape == x.shape
    assert y.isfinite().all()
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients(layer).values())


@choosing_by_itself
def test_an_expert_without_tokens_has_no_gradient(make: Any) -> None:
    layer = made(make)
    x = tokens().abs()
    routers = [m for m in layer.modules() if isinstance(m, TopKRouter)]
    for router in routers:
        router.weight.data[0] = -50.0
    with record(layer) as step:
        layer(x).square().sum().backward()
    assert [calls[0].counts[0].item() for calls in step.routings.values()] == [0] * len(routers)
    shared = getattr(layer, "num_shared_heads", 0)
    stacks = [p for name, p in layer.named_parameters() if p.dim() == 3]
    assert len(stacks) == 2
    for stack in stacks:
        assert not stack.grad[shared].any()
        assert stack.grad[shared + 1 :].any()


@every_layer
@pytest.mark.parametrize("training", [True, False])
def test_the_seed_decides_and_a_saved_state_gives_the_same(make: Any, training: bool) -> None:
    layer, other, x = made(make).train(training), made(make, seed=9).train(training), tokens()
    expected = layer(x)
    assert torch.equal(layer(x), expected)
    assert not torch.equal(other(x), expected)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), expected)


def test_the_seed_decides_what_is_dropped() -> None:
    """Dropout of attention, and of experts from the choice."""
    router = TopKRouter(DIM, 5, 2)
    layers = [MoA(router, 4, dropout=0.5), MoH(DIM, 4, 2, 1, dropout=0.5), SwitchHead(DIM, 2, 4, 4, expert_dropout=0.4)]
    for layer in layers:
        layer.double()
        x, outs = tokens(), []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outs.append(layer(x))
        assert torch.equal(outs[0], outs[1])
        assert not torch.equal(outs[0], outs[2])
        layer.eval()
        assert torch.equal(layer(x), layer(x))


def train_step(layer: nn.Module, call: Any, x: Tensor) -> dict[str, Tensor]:
    layer.zero_grad()
    with record(layer) as step:
        y = call(x)
        losses = step.losses()
        (y.square().sum() + sum(losses.values())).backward()
    assert {len(calls) for calls in step.routings.values()} == {1}
    return {"y": y.detach(), **{name: value.detach() for name, value in losses.items()}, **gradients(layer)}


@every_layer
def test_compiled_and_checkpointed_it_does_the_same(make: Any) -> None:
    torch._dynamo.reset()
    layer, x = made(make), tokens()
    expected = train_step(layer, layer, x)
    same(train_step(layer, torch.compile(layer, backend="aot_eager"), x), expected)
    same(train_step(layer, lambda x: checkpoint(layer, x, use_reentrant=False), x), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_without_capacity_it_compiles_in_one_graph(name: str) -> None:
    torch._dynamo.reset()
    layer, x = made(LAYERS[name], causal=True), tokens()
    expected = train_step(layer, layer, x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    same(train_step(layer, compiled, x), expected)
    one = x[:1, :1].contiguous()  # one token, one query a head
    same(train_step(layer, compiled, one), train_step(layer, layer, one))
    mask = torch.tensor([[True] * 4 + [False] * 2] * len(x))
    masked = train_step(layer, lambda x: layer(x, mask=mask), x)
    same(train_step(layer, lambda x: compiled(x, mask=mask), x), masked)


@every_layer
def test_under_autocast_it_computes_in_low_precision(make: Any) -> None:
    layer, x = made(make, dtype=torch.float32), tokens(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, rotary=rotary(torch.arange(6)[None], 4))
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    torch.testing.assert_close(y.float(), layer(x, rotary=rotary(torch.arange(6)[None], 4)), rtol=0.1, atol=0.1)
    assert all(g.dtype == torch.float32 for g in gradients(layer).values())


def clusters() -> tuple[Tensor, Tensor]:
    """Tokens [16, 16, 16] of eight clusters, and targets [16, 16, 8]: a linear map a cluster of the sequence's mean."""
    maps, noise = torch.randn(8, 8, 8) / 8**0.5, torch.randn(16, 16, 8)
    cluster = torch.randint(8, (16, 16))
    mean = 4 * noise.mean(1, keepdim=True).expand_as(noise)
    target = torch.einsum("bsd,bsde->bse", mean, maps[cluster])
    return torch.cat([noise, 4 * torch.eye(8)[cluster]], dim=-1), target


def fitted(layer: nn.Module) -> float:
    """Share of the targets' variance that is left after training."""
    torch.manual_seed(3)
    x, target = clusters()
    optimizer = torch.optim.Adam(layer.parameters(), lr=2e-2)
    for _ in range(150):
        with record(layer) as step:
            error = (layer(x)[..., :8] - target).square().mean()
        optimizer.zero_grad()
        (error + sum(step.losses().values())).backward()
        optimizer.step()
    return float(error.detach() / target.var())


BALANCE = {"switch": 0.01}
TRAINED: dict[str, tuple[Any, int]] = {
    # With how many heads of width 8 a token is served.
    "MoA": (lambda: MoA(TopKRouter(16, 8, 1, losses=BALANCE), 8), 1),
    "MoA, top-2": (lambda: MoA(TopKRouter(16, 8, 2, losses=BALANCE), 8), 2),
    "SwitchHead": (lambda: SwitchHead(16, 1, 8, 8, 1, losses=BALANCE), 1),
    "MoH": (lambda: MoH(16, 9, 1, 1, head_dim=8), 2),
}


@pytest.fixture(scope="module")
def dense() -> dict[int, float]:
    """What is left by attention of as many heads, none of them an expert: MoA with its experts all the same one."""
    torch.manual_seed(2)
    return {heads: fitted(MoA(TopKRouter(16, 1, 1), 8, num_heads=heads)) for heads in (1, 2)}


@pytest.mark.parametrize("name", TRAINED)
def test_it_trains(name: str, dense: dict[int, float]) -> None:
    """At equal active parameters its error is below half of dense attention's."""
    torch.manual_seed(2)
    make, heads = TRAINED[name]
    found = fitted(make())
    assert found < dense[heads] / 2, f"{found:.3f} against {dense[heads]:.3f} dense"


def test_what_does_not_fit_is_named() -> None:
    for make in LAYERS.values():
        with pytest.raises(ValueError, match=rf"expected tokens \[B, S, {DIM}\], got \[2, 4, 7\]"):
            make()(torch.randn(2, 4, 7))
    layer = LAYERS["MoA"]()
    with pytest.raises(ValueError, match=r"MoA attends within sequences: expected tokens as \[B, S, D\], got \[4, 8\]"):
        layer(torch.randn(4, DIM))
    with pytest.raises(ValueError, match=r"expected a mask \[B, K\] of the tokens and those in the cache"):
        layer(torch.randn(2, 4, DIM), mask=torch.ones(2, 3))
    cache = KeyValues()
    layer(torch.randn(2, 4, DIM), cache=cache)
    with pytest.raises(ValueError, match="the mask is of 4 tokens, but there are 8 keys"):
        layer(torch.randn(2, 4, DIM), mask=torch.ones(2, 4), cache=cache)
