"""The layers that the tests of attention experts go through, and attention one query at a time."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from zoo.moe import MoA, MoH, SwitchHead
from zoo.moe.routers import ExpertChoiceRouter, TopKRouter

DIM = 8
LOSSES = {"switch": 0.3, "z": 0.1}

LAYERS: dict[str, Callable[..., nn.Module]] = {
    "MoA": lambda **options: MoA(TopKRouter(DIM, 5, 2, losses=LOSSES), 4, **options),
    "JetMoE": lambda **options: MoA(
        TopKRouter(DIM, 5, 2, score="softmax_topk", losses=LOSSES), 4, num_heads=3, bias=True, **options
    ),
    "SwitchHead": lambda **options: SwitchHead(DIM, 2, 4, 3, losses=LOSSES, **options),
    "MoH": lambda **options: MoH(DIM, 6, 2, 2, head_dim=4, **options),
    "MoH, none shared": lambda **options: MoH(DIM, 4, 0, 2, head_dim=4, scaled=False, **options),
}
# Its choice depends on other tokens.
CHOOSING_EXPERTS = {"MoA, expert choice": lambda **options: MoA(ExpertChoiceRouter(DIM, 5), 4, **options)}


def made(
    make: Callable[..., nn.Module], dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any
) -> nn.Module:
    """A layer whose weights are drawn anew, so that none is zero."""
    torch.manual_seed(seed)
    layer = make(**options).to(dtype)
    for parameter in layer.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return layer


def attend_by_loop(query: Tensor, keys: Tensor, values: Tensor, seen: Sequence[int]) -> Tensor:
    """softmax(q k / sqrt(d)) v of one query [d] over the keys [K, d] that it sees."""
    odds = torch.stack([(query @ keys[j] / math.sqrt(len(query))).exp() for j in seen])
    return torch.stack([o * values[j] for o, j in zip(odds, seen)]).sum(0) / odds.sum()


def turned(x: Tensor, position: int, width: int) -> Tensor:
    """The first `width` dimensions of x [d] turned as complex numbers, pairs being i and i + width / 2."""
    half = width // 2
    parts = list(x)
    for i in range(half):
        turn = cmath.exp(1j * position * 10000 ** (-2 * i / width))
        parts[i], parts[i + half] = (
            x[i] * turn.real - x[i + half] * turn.imag,
            x[i] * turn.imag + x[i + half] * turn.real,
        )
    return torch.stack(parts)


def seen_by(length: int, causal: bool, mask: Tensor | None = None) -> list[list[int]]:
    """Which keys each query of a sequence sees; mask [S]."""
    real = [j for j in range(length) if mask is None or mask[j]]
    return [[j for j in real if not causal or j <= t] for t in range(length)]


def same_with_gradients(layer: nn.Module, x: Tensor, found: Tensor, expected: Tensor) -> None:
    """Both outputs agree, and so do the gradients of a random direction through them."""
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(expected)
    names = ["x", *(name for name, _ in layer.named_parameters())]
    variables = (x, *layer.parameters())
    grads = [torch.autograd.grad(out, variables, direction, allow_unused=True) for out in (found, expected)]
    for name, a, b, v in zip(names, *grads, variables):
        a, b = (torch.zeros_like(v) if g is None else g for g in (a, b))
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")


def without_attention(counter: FlopCounterMode) -> int:
    """Counted operations but for those of attention itself, which torch counts on a CPU from 2.15 on."""
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
