"""Shortcut-connected experts: what the block equations say, in one process and in two, tokens travelling meanwhile."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F

import zoo
from zoo.moe import ExpertParallel, Experts, HierarchicalExpertParallel, Shortcut, ShortcutMoE, StaticExpertParallel
from zoo.moe.dispatch import _Flight
from zoo.moe.routers import TopKRouter
from zoo.parallel import Mesh, Sizes, parallelize
from zoo.parallel.parts import whole_state
from zoo.pretrained.sparse_relatives import published_config

SIZES = {"num_hidden_layers": 4, "hidden_size": 32, "vocab_size": 64, "initializer_range": 0.2}
FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v3")


def small(family: str = "mixtral", shortcut: Any = True, **options: Any) -> Any:
    torch.manual_seed(0)
    return zoo.create_model(f"language/{family}_tiny", shortcut=shortcut, **{**SIZES, **options})


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-9, what: str = "") -> None:
    scale = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale, msg=lambda m: f"{what}: {m}")


def gated(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    gate, up = (x @ w_in.T).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up) @ w_out.T


def dense(x: Tensor, mlp: Any) -> Tensor:
    return gated(x, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]), mlp.down_proj.weight)


def routed(x: Tensor, moe: Any) -> Tensor:
    """Mixtral's gate and experts, one token at a time."""
    rows = []
    for token in x.flatten(0, 1):
        best = (moe.router.weight @ token).softmax(0).topk(2)
        shares = (best.values / best.values.sum()).tolist()
        each = [gated(token, moe.experts.gate_up_proj[e], moe.experts.down_proj[e]) for e in best.indices.tolist()]
        rows.append(shares[0] * each[0] + shares[1] * each[1])
    return torch.stack(rows).view_as(x)


@torch.no_grad()
def test_a_pair_of_layers_is_what_the_equations_say() -> None:
    model = small(attn_implementation="eager").double().eval()
    pair, seen = model.model.layers[1], {}
    hook = pair.register_forward_hook(
        lambda _, args, keys, out: seen.update(x=args[0], y=out, **keys), with_kwargs=True
    )
    model(torch.randint(0, 64, (2, 5)), use_cache=False)
    hook.remove()
    keys = {name: seen[name] for name in ("position_embeddings", "attention_mask", "position_ids")}
    first, second, x = pair.first, pair.second, seen["x"]
    # Norms and attention are transformers' own.
    h = x + first.self_attn(first.input_layernorm(x), **keys)[0]
    n = first.post_attention_layernorm(h)
    x = h + dense(n, first.mlp.shared)
    h = x + second.self_attn(second.input_layernorm(x), **keys)[0]
    expected = h + dense(second.post_attention_layernorm(h), second.mlp.dense) + routed(n, first.mlp)
    close(seen["y"], expected)
    assert float(routed(n, first.mlp).abs().max()) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_all_of_it(family: str) -> None:
    model = small(family, shortcut={"hidden_dim": 24}, losses={"switch": 0.01})
    assert [type(layer).__name__ for layer in model.model.layers] == ["DecoderPair"] * 2
    assert {m.dense.up_proj.out_features for m in model.modules() if isinstance(m, Shortcut)} == {24}
    ids = torch.randint(0, 64, (4, 9))
    optimizer, seen = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for _ in range(8):
        with zoo.moe.record(model) as step:
            loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        (loss + step.losses()["switch"]).backward()
        optimizer.step()
        seen.append(float(loss.detach()))
    assert len(step.routings) == 2
    assert seen[-1] < seen[0] - 0.1
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "experts" not in n)


def test_checkpointing_cache_copies_and_state_change_nothing(tmp_path: Path) -> None:
    model = small(shortcut={"layers": [2]}).double().train()
    assert [type(layer).__name__ for layer in model.model.layers] == [
        "MixtralDecoderLayer",
        "DecoderPair",
        "MixtralDecoderLayer",
    ]
    other = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(0, 64, (2, 7))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    for one in (model, other):
        with zoo.moe.record(one) as step:
            one(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        assert [len(calls) for calls in step.routings.values()] == [1, 1, 1]
        copy.deepcopy(one)  # nothing of the step is left in it
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        assert p.grad is not None
        close(q.grad, p.grad, what=name)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    again = small(shortcut={"layers": [2]}).double().eval()
    nn.init.zeros_(again.model.layers[1].first.mlp.experts.down_proj)
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    whole = again(ids, attention_mask=mask, use_cache=False).logits
    close(whole, model.eval()(ids, attention_mask=mask, use_cache=False).logits)
    start = again(ids[:, :5], attention_mask=mask[:, :5], use_cache=True)
    step = again(ids[:, 5:], attention_mask=mask, past_key_values=start.past_key_values, use_cache=True)
    close(torch.cat([start.logits, step.logits], 1)[mask.bool()], whole[mask.bool()])


def test_it_is_not_published_and_says_so_before_training() -> None:
    with pytest.raises(TypeError, match=r"no published layout has a place for model.layers.0.first.mlp, ShortcutMoE"):
        published_config(small())


@pytest.mark.parametrize(
    ("family", "options", "told"),
    [
        ("mixtral", {"shortcut": {"layers": [0, 2]}}, r"layers \[0\] of \[0, 2\] need a layer before them"),
        ("mixtral", {"shortcut": {"layers": [1, 2]}}, r"layers \[2\] of \[1, 2\] need a layer before them"),
        ("mixtral", {"shortcut": {"layer": [1]}}, "unknown argument of shortcut 'layer'; did you mean layers"),
        ("mixtral", {"shortcut": {"hidden_dim": 0}}, "hidden_dim must be a width of at least 1, got 0"),
        ("mixtral", {"shortcut": 3}, "expected True or a mapping"),
        ("mixtral", {"mixture_of_depths": {"capacity": 0.5}}, "cannot be added in a layer that skips some"),
        ("deepseek_v3", {"first_k_dense_replace": 2}, "layer 1 of deepseek_v3 has no experts that it could add"),
    ],
)
def test_a_mistake_is_named(family: str, options: dict[str, Any], told: str) -> None:
    with torch.device("meta"), pytest.raises((ValueError, TypeError), match=told):
        small(family, **options)


def test_an_end_without_a_beginning_is_named() -> None:
    moe = ShortcutMoE(TopKRouter(4, 3, 1), Experts(3, 4, 2), nn.Linear(4, 4))
    end = Shortcut(nn.Linear(4, 4), moe)
    assert end(moe(torch.randn(0, 4))).shape == (0, 4)
    with pytest.raises(RuntimeError, match="its ShortcutMoE has not run since"):
        end(torch.randn(2, 4))


class Noted(nn.Module):
    """A layer that notes when it runs, forward and backward."""

    def __init__(self, name: str, notes: list[str]) -> None:
        super().__init__()
        self.inner, self.name, self.notes = nn.Linear(6, 6), name, notes

    def forward(self, x: Tensor) -> Tensor:
        self.notes.append(self.name)
        y = self.inner(x)
        y.register_hook(lambda _: self.notes.append(f"{self.name} back"))
        return y


class Block(nn.Module):
    """Two blocks' worth of layers around a shortcut."""

    def __init__(self, notes: list[str]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = ShortcutMoE(TopKRouter(6, 4, 2), Experts(4, 6, 5), Noted("dense", notes))
        self.attention = Noted("attention", notes)
        self.second = Shortcut(Noted("next dense", notes), self.first)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + self.second(x + self.attention(x))


def learned(block: Block, tokens: int, rank: int) -> dict[str, Tensor]:
    torch.manual_seed(20 + rank)
    x = torch.randn(tokens, 6, dtype=torch.float64, requires_grad=True)
    y = block(x)
    (y * torch.linspace(-1, 1, 6, dtype=y.dtype)).sum().backward()
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in block.named_parameters() if p.grad is not None}}


def watched(notes: list[str], run: Any) -> None:
    """Note when rows set out and are waited for."""
    start, land = _Flight.start, _Flight.land

    def starts(flight: Any, values: Tensor, splits: Any) -> Tensor:
        notes.extend(["start"] * (values.dim() > 1))
        return start(flight, values, splits)

    def lands(flight: Any) -> None:
        notes.extend(["land"] * (flight._pending[1].dim() > 1))
        land(flight)

    _Flight.start, _Flight.land = starts, lands  # type: ignore[method-assign]
    run()
    _Flight.start, _Flight.land = start, land  # type: ignore[method-assign]


TOKENS = [7, 0]  # of either process
WAYS = ("plain", "two chunks", "by nodes", "fixed messages")


def train(model: Any, ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Loss of the second step, and gradients or parameters after it by name."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        loss = F.cross_entropy(model(ids, use_cache=False).logits.flatten(0, 1), ids.roll(-1, 1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.detach(), model.state_dict()


def batch() -> Tensor:
    torch.manual_seed(5)
    return torch.randint(0, 64, (4, 6))


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    alone = [dist.new_group([r]) for r in range(2)][rank]
    saved: dict[str, Any] = {}
    ways: dict[str, Any] = {
        "plain": ExpertParallel(4),
        "two chunks": ExpertParallel(4, chunks=2),
        "by nodes": HierarchicalExpertParallel(4, dist.group.WORLD, alone),  # type: ignore[arg-type]
        "fixed messages": StaticExpertParallel(4, 14),
    }
    for way, parallel in ways.items():
        notes: list[str] = []
        block = Block(notes).double()
        block.first.experts.keep_own(parallel)
        watched(notes, lambda b=block, w=way: saved.update({w: learned(b, TOKENS[rank], rank)}))
        saved[f"{way}, events"] = notes
    for name, sizes in (("expert", Sizes(expert=2)), ("tensor", Sizes(tensor=2))):
        mesh = Mesh(sizes)
        model = parallelize(small().train(), mesh)
        if name == "expert":
            warnings.simplefilter("ignore")
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        ids = batch()
        loss, _ = train(model, ids if name == "tensor" else ids[2 * rank : 2 * rank + 2])
        dist.all_reduce(loss)
        saved[name] = loss / 2, whole_state(model)
    torch.save(saved, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone() -> Any:
    return train(small().train(), batch())


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory, alone: Any) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    mp.start_processes(worker, args=(str(folder),), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_give_what_one_gives(processes: Any, way: str) -> None:
    whole = [learned(Block([]).double(), TOKENS[rank], rank) for rank in range(2)]
    for rank, (found, expected) in enumerate(zip(processes, whole)):
        for name, value in expected.items():
            if "experts" in name:
                value = (value + whole[1 - rank][name])[2 * rank : 2 * rank + 2]
            if name in found[way] or value.any():
                close(found[way][name], value, what=f"{name} of process {rank}")


def test_tokens_set_out_before_dense_work_and_are_waited_for_after_it(processes: Any) -> None:
    forward = ["start", "dense", "land", "start", "attention", "next dense", "land"]
    backward = ["start", "next dense back", "attention back", "land", "start", "dense back", "land"]
    for rank in processes:
        assert rank["plain, events"] == forward + backward
        assert rank["by nodes, events"][:2] == forward[:2]
        assert rank["by nodes, events"][-2:] == backward[-2:]
        for way in WAYS:
            events = rank[f"{way}, events"]
            # Results are not waited for before the next block's work, nor their gradients in backward.
            work, end = events.index("attention"), events.index("next dense")
            assert events[work + 1 : end] == []
            assert events[end + 1] == "land"
            assert events[events.index("next dense back") : events.index("attention back") + 1] == backward[1:3]


@pytest.mark.parametrize("mesh", ["expert", "tensor"])
def test_a_spread_model_learns_what_one_process_learns(processes: Any, alone: Any, mesh: str) -> None:
    loss, state = alone
    for rank in processes:
        close(rank[mesh][0], loss, 1e-5, "loss")
    found = processes[0][mesh][1]
    assert found.keys() == state.keys()
    for name, value in state.items():
        close(found[name], value, 1e-4, name)
