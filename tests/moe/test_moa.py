"""MoA and JetMoE: which experts a token's queries and outputs go through, and the original's numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import DIM, attend_by_loop, made, same_with_gradients, seen_by, turned, without_attention
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from zoo.moe import Capacity, Experts, MoA, MoE, record, rotary
from zoo.moe.routers import (
    DenseRouter,
    ExpertChoiceRouter,
    HashRouter,
    ModuleFormerRouter,
    NullExpertRouter,
    ReMoERouter,
    SoftRouter,
    TopKRouter,
)

ROUTERS: dict[str, Any] = {
    "top-2": lambda: TopKRouter(DIM, 5, 2),
    "top-1": lambda: TopKRouter(DIM, 5, 1, normalize=True),
    "top-2 with drops": lambda: TopKRouter(DIM, 5, 2, capacity=Capacity(0.5)),
    "expert choice": lambda: ExpertChoiceRouter(DIM, 5),
    "ReLU": lambda: ReMoERouter(DIM, 5),
    "null experts": lambda: NullExpertRouter(DIM, 5, 2, num_null=2),
    "all": lambda: DenseRouter(DIM, 5),
    "ModuleFormer": lambda: ModuleFormerRouter(DIM, 5, hidden_dim=6, dropout=0.0),
}


def by_loop(layer: Any, x: Tensor, causal: bool, mask: Tensor | None = None, width: int = 0) -> Tensor:
    """Each token and expert apart, by the router's matrix of weights; width: how much of a head rotary turns."""
    batch, length, _ = x.shape
    heads, d = layer.num_heads, layer.head_dim
    context = {} if mask is None else {"mask": mask}
    weights = layer.router(x, **context).dense().view(batch, length, -1)
    out = []
    for b in range(batch):
        projected = (x[b] @ layer.kv_proj.weight.T).view(length, 2, heads, d)
        rows = []
        for t, seen in enumerate(seen_by(length, causal, None if mask is None else mask[b])):
            y = torch.zeros(DIM, dtype=x.dtype) if layer.bias is None else layer.bias
            for e in range(weights.shape[-1]):
                if weights[b, t, e] == 0:
                    continue
                query, parts = (layer.q_proj[e] @ x[b, t]).view(heads, d), []
                for h in range(heads):
                    keys = torch.stack([turned(k, j, width) for j, k in enumerate(projected[:, 0, h])])
                    parts.append(attend_by_loop(turned(query[h], t, width), keys, projected[:, 1, h], seen))
                y = y + weights[b, t, e] * (layer.o_proj[e] @ torch.cat(parts))
            rows.append(y)
        out.append(torch.stack(rows))
    return torch.stack(out)


@pytest.mark.filterwarnings("ignore:ExpertChoiceRouter in a causal model")
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS.keys())
@pytest.mark.parametrize("causal", [False, True])
def test_experts_attend_to_shared_keys_and_values(router: Any, causal: bool) -> None:
    layer: Any = made(lambda: MoA(router(), 4, num_heads=2, causal=causal))
    x = torch.randn(2, 6, DIM, dtype=torch.float64, requires_grad=True)
    same_with_gradients(layer, x, layer(x), by_loop(layer, x, causal))


@pytest.mark.parametrize("width", [0, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_positions_turn_queries_and_keys_and_padding_is_no_key(width: int, masked: bool) -> None:
    layer: Any = made(lambda: MoA(TopKRouter(DIM, 5, 2), 4, num_heads=2, causal=True, bias=True))
    x = torch.randn(2, 6, DIM, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 6, [True, True, False, True, False, False]]) if masked else None
    positions = rotary(torch.arange(6)[None], width) if width else None
    found = layer(x, mask=mask, rotary=positions)
    expected = by_loop(layer, x, True, mask, width)
    keep = torch.ones(2, 6, dtype=torch.bool) if mask is None else mask
    torch.testing.assert_close(found[~keep], layer.bias.expand_as(found[~keep]))
    # Cosines are of single precision.
    torch.testing.assert_close(found[keep], expected[keep], rtol=1e-5, atol=1e-6)


def test_as_many_numbers_as_jetmoe_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.jetmoe.modeling_jetmoe import JetMoeAttention, JetMoeRotaryEmbedding

    config = transformers.JetMoeConfig(
        hidden_size=12,
        num_key_value_heads=3,
        kv_channels=4,
        num_local_experts=5,
        num_experts_per_tok=2,
        vocab_size=10,
        num_hidden_layers=1,
        intermediate_size=8,
        attn_implementation="eager",
    )
    theirs = JetMoeAttention(config, layer_idx=0)
    for parameter in theirs.parameters():
        parameter.data.normal_(std=0.4)
    ours = MoA(TopKRouter(12, 5, 2, score="softmax_topk"), 4, num_heads=3, causal=True, bias=True)
    state = theirs.state_dict()
    ours.load_state_dict(
        {
            "router.weight": state["experts.router.layer.weight"],
            "q_proj": state["experts.input_linear.weight"],
            "o_proj": state["experts.output_linear.weight"],
            "bias": state["experts.bias"],
            "kv_proj.weight": state["kv_proj.weight"],
        }
    )
    x, ids = torch.randn(2, 7, 12), torch.arange(7)[None].expand(2, -1)
    positions = JetMoeRotaryEmbedding(config)(x, ids)
    for a, b in zip(rotary(ids, 4), positions):
        torch.testing.assert_close(a, b)
    mask = torch.full((7, 7), float("-inf")).triu(1)[None, None]
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    expected = theirs(inputs[0], attention_mask=mask, position_embeddings=positions)[0]
    found = ours(inputs[1], rotary=positions)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    direction = torch.randn_like(found)
    for y in (expected, found):
        y.backward(direction)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.q_proj.grad, theirs.experts.input_linear.weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.router.weight.grad, theirs.experts.router.layer.weight.grad, rtol=1e-4, atol=1e-5)
    # A layer of its cache holds our keys: the prompt first, then a token at a time.
    layer, cos, sin = transformers.cache_utils.DynamicLayer(), *positions
    with torch.no_grad():
        parts = [
            ours(x[:, i:j], cache=layer, rotary=(cos[:, i:j], sin[:, i:j])) for i, j in ((0, 4), (4, 5), (5, 6), (6, 7))
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-5)
    assert layer.keys.shape == (2, 3, 7, 4)


def test_experts_that_were_not_chosen_cost_nothing() -> None:
    flops = []
    for experts in (4, 64):
        layer = MoA(TopKRouter(DIM, experts, 2), 4, num_heads=2)
        x = torch.randn(2, 16, DIM)
        with FlopCounterMode(display=False) as counter:
            layer(x)
        flops.append(without_attention(counter) - 2 * 32 * DIM * experts)  # but for the router's logits
    assert flops[0] == flops[1]
    chosen = 2 * 64 * DIM * 8  # either projection of 32 tokens by two experts, to and from two heads of 4
    assert flops[0] == 2 * chosen + 2 * 32 * DIM * 16


def test_a_router_without_a_routing_is_named() -> None:
    with pytest.raises(ValueError, match="expected a router that gives a Routing, got Slots"):
        MoA(SoftRouter(DIM, 5, slots=2), 4)(torch.randn(2, 3, DIM))
    with pytest.raises(ValueError, match="head_dim and num_heads must be at least 1"):
        MoA(TopKRouter(DIM, 5, 2), 0)


def test_a_router_gets_its_context() -> None:
    layer = made(lambda: MoA(HashRouter(DIM, 5, vocab_size=20), 4))
    ids = torch.tensor([[3, 3, 7, 3]])
    with record(layer) as step:
        layer(torch.randn(1, 4, DIM, dtype=torch.float64), token_ids=ids)
    (routing,) = step.routings[""]
    first, third = routing.dense()[0], routing.dense()[2]  # type: ignore[union-attr]
    assert all(torch.equal(routing.dense()[i], first) for i in (1, 3))  # type: ignore[union-attr]
    assert (first > 0).sum() == (third > 0).sum() == 1


class Block(nn.Module):
    """A layer of a transformer in which both halves are mixtures of experts."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        losses = {"switch": 0.01, "z": 0.001}
        self.attention = MoA(TopKRouter(dim, 4, 2, losses=losses), 8, causal=True)
        self.moe = MoE(TopKRouter(dim, 4, 2, losses=losses), Experts(4, dim, dim))

    def forward(self, x: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.norms[0](x), rotary=positions)
        return x + self.moe(self.norms[1](x))


class Language(nn.Module):
    """A transformer of two such layers over a vocabulary."""

    def __init__(self, vocabulary: int, dim: int = 24) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(2))
        self.head = nn.Linear(dim, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x, positions = self.embedding(ids), rotary(torch.arange(ids.shape[1])[None], 8)
        for block in self.blocks:
            x = block(x, positions)
        return self.head(x)


def test_a_transformer_of_attention_and_mlp_experts_learns_to_repeat() -> None:
    """The second half of each sequence repeats the first, so that only attention can tell what comes."""
    torch.manual_seed(0)
    model = Language(12)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        half = torch.randint(12, (32, 8))
        ids = torch.cat([half, half], dim=1)
        with record(model) as step:
            logits = model(ids[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()) + sum(step.losses().values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert set(step.routings) == {f"blocks.{i}.{part}" for i in range(2) for part in ("attention", "moe")}
    repeated = logits[:, 7:].argmax(-1) == ids[:, 8:]
    assert repeated.float().mean() > 0.9
