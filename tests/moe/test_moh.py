"""MoH: the gates of shared and routed heads, and that heads not chosen are not computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import DIM, attend_by_loop, made, same_with_gradients, seen_by, turned, without_attention
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from zoo.moe import MoH, record, rotary

WIDTH = 4


def softmax(values: Tensor) -> Tensor:
    return values.exp() / values.exp().sum()


def gates_by_loop(layer: Any, x: Tensor, k: int, scaled: bool) -> Tensor:
    """g of all heads for one token x [D]: the paper's equations, or with the authors' factors."""
    shared, heads = layer.num_shared_heads, layer.num_heads
    routed = softmax(layer.router.weight @ x)
    best = sorted(range(heads - shared), key=lambda i: -float(routed[i].detach()))[:k]
    total = sum(routed[i] for i in best)
    gates = [torch.zeros((), dtype=x.dtype)] * heads
    for i in best:
        gates[shared + i] = k * routed[i] / total if scaled else routed[i]
    if shared:
        first, second = softmax(layer.mix.weight @ x) * (2 if scaled else 1)
        common = softmax(layer.shared_gate.weight @ x) if shared > 1 else torch.ones(1, dtype=x.dtype)
        for i in range(shared):
            gates[i] = first * common[i] * (shared if scaled else 1)
        for i in best:
            gates[shared + i] = second * gates[shared + i]
    return torch.stack(gates)


def by_loop(layer: Any, x: Tensor, k: int, scaled: bool, causal: bool, mask: Tensor | None, width: int = 0) -> Tensor:
    """All heads of all tokens, each times its gate."""
    out = []
    for b in range(x.shape[0]):
        length, rows = x.shape[1], []
        keys, values = layer.kv_proj(x[b]).view(length, 2, layer.num_heads, WIDTH).unbind(1)
        for t, seen in enumerate(seen_by(length, causal, None if mask is None else mask[b])):
            y = torch.zeros(DIM, dtype=x.dtype)
            if mask is None or mask[b, t]:
                for h, gate in enumerate(gates_by_loop(layer, x[b, t], k, scaled)):
                    turned_keys = torch.stack([turned(keys[j, h], j, width) for j in range(length)])
                    query = turned(layer.q_proj[h] @ x[b, t], t, width)
                    y = y + gate * (layer.o_proj[h] @ attend_by_loop(query, turned_keys, values[:, h], seen))
            rows.append(y)
        out.append(torch.stack(rows))
    return torch.stack(out)


@pytest.mark.parametrize(("shared", "k"), [(2, 2), (1, 1), (0, 3), (3, 1)])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_heads_count_by_their_gates(shared: int, k: int, scaled: bool, causal: bool, padded: bool) -> None:
    layer = made(lambda: MoH(DIM, 5, shared, k, head_dim=WIDTH, scaled=scaled, causal=causal))
    x = torch.randn(2, 6, DIM, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 6, [False, True, True, False, True, False]]) if padded else None
    same_with_gradients(layer, x, layer(x, mask=mask), by_loop(layer, x, k, scaled, causal, mask))


def test_positions_turn_queries_and_keys() -> None:
    layer = made(lambda: MoH(DIM, 5, 2, 1, head_dim=WIDTH, causal=True))
    x = torch.randn(2, 6, DIM, dtype=torch.float64)
    found = layer(x, rotary=rotary(torch.arange(6)[None], 4))
    # Cosines are of single precision.
    torch.testing.assert_close(found, by_loop(layer, x, 1, True, True, None, 4), rtol=1e-5, atol=1e-6)


def test_equal_gates_are_ordinary_attention() -> None:
    """With gates that tell no head from another, all heads used and the code's factors: multi-head attention."""
    layer = made(lambda: MoH(DIM, 4, 2, 2, causal=True))
    for gate in (layer.router, layer.shared_gate, layer.mix):
        gate.weight.data.zero_()
    ordinary = nn.MultiheadAttention(DIM, 4, bias=False, batch_first=True).double()
    ordinary.in_proj_weight.data = torch.cat([layer.q_proj.flatten(0, 1), layer.kv_proj.weight]).detach()
    ordinary.out_proj.weight.data = layer.o_proj.permute(1, 0, 2).flatten(1).detach()
    x = torch.randn(2, 6, DIM, dtype=torch.float64)
    later = torch.ones(6, 6, dtype=torch.bool).triu(1)
    torch.testing.assert_close(layer(x), ordinary(x, x, x, attn_mask=later, need_weights=False)[0])


def test_the_loss_is_on_routed_heads() -> None:
    layer = made(lambda: MoH(DIM, 6, 2, 2, head_dim=WIDTH))
    x = torch.randn(2, 6, DIM, dtype=torch.float64)
    with record(layer) as step:
        layer(x)
    (routing,) = step.routings[""]
    assert routing.num_experts == 4
    probs = (x.view(12, DIM) @ layer.router.weight.T).softmax(-1)
    chosen = torch.zeros_like(probs).scatter(1, probs.topk(2).indices, 1.0)
    expected = 0.01 * (probs.mean(0) * chosen.mean(0)).mean() * 4 * 4
    torch.testing.assert_close(step.losses()["transformers"], expected)


def test_heads_that_were_not_chosen_are_not_projected() -> None:
    flops = []
    for k in (1, 3):
        layer, x = MoH(DIM, 8, 2, k, head_dim=WIDTH), torch.randn(2, 16, DIM)
        with FlopCounterMode(display=False) as counter:
            layer(x)
        flops.append(without_attention(counter))
    assert flops[1] - flops[0] == 2 * (2 * 32 * 2 * DIM * WIDTH)  # two heads more a token: their queries and outputs


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MoH(DIM, 4, 3, 2), r"of 4 heads, 3 of them shared, a token cannot have k=2 more"),
        (lambda: MoH(DIM, 4, -1, 2), "expected num_shared_heads >= 0"),
        (lambda: MoH(DIM, 3, 1, 1), "3 heads do not divide dim=8; give head_dim"),
    ],
)
def test_what_does_not_fit_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
