"""MoLE: trained LoRAs are weighed by what they make of the tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import autocast
from ..routing import Routing
from .base import Router
from .dense import to_all


class MoLERouter(Router):
    """MoLE (2404.13628, equations 9 to 11): softmax(Flatten(Normalise(x)) e / tau) over all experts.

    x are what the experts make of a token, side by side, so that dim is E O: see `zoo.moe.ComposedLinear`. The paper
    flattens whole sequences of `tokens` L tokens: e is [E, L, dim], and all tokens of a sequence have the same weights;
    shorter ones leave the rest of e out. That is not for causal models, and grows with L. By default every token is a
    sequence by itself: e is [E, dim]. Normalise, which the paper leaves open, is a layer norm without scale or shift
    over all that is flattened, masked tokens left out. tau = exp(`log_temperature`) is learnt, one at first; e starts
    uniformly within 1/sqrt(dim L).

    balance weighs the paper's loss (equations 14 and 15, alpha = 0.5 there) in training: -sum_e log q_e, q_e the mean
    of expert e's weight over the tokens, and over all such gates that `zoo.moe.record` sees. It is E log E at least.

    Context: mask. Raises ValueError for tokens below one, and with `tokens` for one list of tokens or longer sequences.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        tokens: int | None = None,
        balance: float = 0.5,
        dtype: torch.dtype | None = torch.float32,
    ) -> None:
        super().__init__(dim, num_experts)
        if tokens is not None and tokens < 1:
            raise ValueError(f"MoLERouter: tokens must be at least 1, got {tokens}")
        self.tokens, self.balance, self.dtype = tokens, balance, dtype
        self.weight = nn.Parameter(torch.empty(num_experts, *(() if tokens is None else (tokens,)), dim))
        self.log_temperature = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    @property
    def k(self) -> int:
        """How many experts a token meets: all."""
        return self.num_experts

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw e uniformly within 1/sqrt(dim L), and set the temperature to one."""
        bound = 1 / math.sqrt(self.dim * (self.tokens or 1))
        self.weight.uniform_(-bound, bound)
        self.log_temperature.zero_()

    def forward(self, x: Tensor, **context: Any) -> Routing:
        """Route tokens x [T, D] or [B, S, D]; with `tokens` the second alone."""
        with autocast.off(x):  # it would round the logits
            if x.dtype != torch.float64:
                x = x.to(self.dtype or x.dtype)
            mask = context.get("mask")
            if mask is not None:
                mask = mask.reshape(x.shape[:-1]).bool()
                x = x.where(mask.unsqueeze(-1), 0)  # nan there would reach e's gradient
            logits = self._of_tokens(x) if self.tokens is None else self._of_sequences(x, mask)
            probs = (logits / self.log_temperature.to(x.dtype).exp()).softmax(-1)
            return to_all(probs, None if mask is None else mask.flatten(), probs=probs)

    def _of_tokens(self, x: Tensor) -> Tensor:
        rows = F.layer_norm(x.reshape(-1, self.dim), (self.dim,))
        return F.linear(rows, self.weight.to(x.dtype))

    def _of_sequences(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if x.dim() != 3:
            raise ValueError(f"MoLERouter with tokens={self.tokens}: expected [B, S, D], got {list(x.shape)}")
        sequences, length = x.shape[:2]
        if length > (self.tokens or 0):
            raise ValueError(f"MoLERouter: sequences of {length} tokens, but e is made for tokens={self.tokens}")
        if mask is None:
            mask = x.new_ones(sequences, length, dtype=torch.bool)
        here = mask.unsqueeze(-1)
        size = mask.sum(1).clamp(min=1).view(-1, 1, 1) * self.dim
        apart = (x - x.sum((1, 2), keepdim=True) / size).where(here, 0)
        rows = apart * torch.rsqrt(apart.square().sum((1, 2), keepdim=True) / size + 1e-5)
        logits = F.linear(rows.flatten(1), self.weight[:, :length].to(x.dtype).flatten(1))
        return logits[:, None].expand(-1, length, -1).reshape(-1, self.num_experts)

    def together(self, decisions: list[Routing]) -> dict[str, Tensor]:
        """The paper's loss of what all such gates decided in a step."""
        if not self.balance or not decisions:
            return {}
        shares, some = [], []
        for routing in decisions:
            weight = routing.dense()
            count = (weight.detach().sum(-1) > 0).sum()  # masked tokens have no weight
            shares.append(weight.sum(0) / count.clamp(min=1))
            some.append(count > 0)
        device = shares[0].device
        gates = torch.stack([one.to(device) for one in some]).sum()
        mean = torch.stack([share.to(device) for share in shares]).sum(0) / gates.clamp(min=1)
        log = mean.clamp(min=torch.finfo(mean.dtype).tiny).log()
        return {"gating_balance": -self.balance * (gates > 0) * log.sum()}

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{self.dim}, num_experts={self.num_experts}, tokens={self.tokens}, balance={self.balance}"
