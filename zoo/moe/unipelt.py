"""What UniPELT gates besides LoRA: an adapter behind a layer, and keys and values before those of the tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import autocast
from .adapted import _Beside, _check_gate, features
from .experts import check_sizes
from .layer import Recorded
from .routers.base import Router


class FollowedLinear(Recorded, _Beside):
    """y = h + g(h) (U relu(D h + d) + u), h = W x: an adapter behind a linear layer (UniPELT 2110.07577, section 3).

    g is the first weight that the gate gives a token; the paper's is `UniPELTRouter`. D starts as `nn.Linear` does and
    U with zeros, so that nothing changes at first. Parameters: down [r, O], down_bias [r], up [O, r], up_bias [O].
    Raises ValueError for a rank below one and a gate of another width.
    """

    def __init__(self, base: nn.Module, router: Router, rank: int) -> None:
        super().__init__()
        check_sizes("FollowedLinear", rank=rank)
        self.base, self.router, self.rank = base, router, rank
        width = features(base)[1]
        _check_gate("FollowedLinear", router, width, 1)
        self.down, self.down_bias = nn.Parameter(torch.empty(rank, width)), nn.Parameter(torch.empty(rank))
        self.up, self.up_bias = nn.Parameter(torch.empty(width, rank)), nn.Parameter(torch.empty(width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw D uniformly within 1/sqrt(O), and zero U."""
        for parameter in (self.down, self.down_bias):
            parameter.uniform_(-1 / math.sqrt(self.up.shape[0]), 1 / math.sqrt(self.up.shape[0]))
        self.up.zero_()
        self.up_bias.zero_()

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply to x [B, S, D]; keywords go to the gate (see `Router`)."""
        h = self.base(x)
        gate = self._decide(h, context).dense().view(*h.shape[:-1], 1)
        inner = h if autocast.is_on(h) else h.to(self.down.dtype)
        if (mask := context.get("mask")) is not None:
            inner = inner.where(mask.reshape(h.shape[:-1]).bool().unsqueeze(-1), 0)  # a gate of zero hides no nan
        more = F.linear(F.linear(inner, self.down, self.down_bias).relu(), self.up, self.up_bias)
        return h + (gate.to(more.dtype) * more).to(h.dtype)

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"rank={self.rank}"


class GatedPrefix(Recorded):
    """[g K_P; K] and [g V_P; V]: keys and values before those of a sequence's tokens (UniPELT 2110.07577, section 3).

    g is one number a sequence, of what attention reads; the paper's gate is `UniPELTRouter`. The authors make prefixes
    of all layers by one MLP while they train, which then can go; here they are parameters themselves, from N(0, 0.02^2)
    at first. Parameters: keys [H, P, K], values [H, P, V], for H heads of keys. Raises ValueError for a size below one.
    """

    def __init__(self, router: Router, heads: int, length: int, key_dim: int, value_dim: int | None = None) -> None:
        super().__init__()
        value_dim = key_dim if value_dim is None else value_dim
        check_sizes("GatedPrefix", heads=heads, length=length, key_dim=key_dim, value_dim=value_dim)
        _check_gate("GatedPrefix", router, router.dim, 1)
        self.router, self.length = router, length
        self.keys = nn.Parameter(torch.empty(heads, length, key_dim))
        self.values = nn.Parameter(torch.empty(heads, length, value_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw from N(0, 0.02^2)."""
        self.keys.normal_(0.0, 0.02)
        self.values.normal_(0.0, 0.02)

    def forward(self, x: Tensor, **context: Any) -> tuple[Tensor, Tensor]:
        """Keys [B, H, P, K] and values [B, H, P, V] for sequences x [B, S, D]; keywords go to the gate."""
        weight = self._decide(x, context).dense().view(*x.shape[:2])
        # The same for all tokens, and zero where they are masked.
        gate = (weight.amax(1) if x.shape[1] else weight.sum(1)).view(-1, 1, 1, 1)
        return gate.to(self.keys.dtype) * self.keys, gate.to(self.values.dtype) * self.values

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"heads={self.keys.shape[0]}, length={self.length}, dim={self.keys.shape[2]}"
