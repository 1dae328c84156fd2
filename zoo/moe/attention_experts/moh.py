"""MoH: multi-head attention of which each token uses only some heads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import grouped_linear
from ..layer import Recorded
from ..routers.topk import TopKRouter
from ..routing import Routing
from .attend import Cache, attend, busiest, checked
from .positions import Rotary, rotate

LOSSES = {"transformers": 0.01}


class MoH(Recorded):
    """Mixture-of-head attention (2410.11842): y_t = sum_i g_i(x_t) H_i(x_t) W_o,i.

    H_i are the heads of ordinary attention. The first num_shared_heads, h_s, serve every token, of the others k:
        g_i = a_1 softmax(W_s x)_i for shared heads, a_2 softmax(W_r x)_i for the k largest routed ones, else 0
        [a_1, a_2] = softmax(W_h x)
    With scaled=True, the default, as in the authors' code: a is multiplied by 2, shared gates by h_s, and routed ones
    divided by the sum of the k chosen and multiplied by k, so that gates are 1 in the mean. scaled=False is the paper's
    equation as it stands. Without shared heads there is no a. The paper uses 50 % to 90 % of the heads, a half of these
    shared.

    The loss is E sum_i P_i f_i over the E routed heads ("transformers" in `zoo.moe.balance`), weight 0.01; the
    code averages it over layers, where `record` sums. `options` go to the `TopKRouter`, whose decisions, on the routed
    heads alone, `record` sees. Queries, attention and outputs of heads that a token does not use are not computed; keys
    and values are, of all heads. Not here: the gate by norms of queries, with which the authors tune LLaMA3-8B on.

    Parameters: q_proj [H, d, D], o_proj [H, D, d], kv_proj.weight [2*H*d, D] as [k; v], shared_gate (W_s), mix (W_h).
    Raises ValueError when heads do not add up.
    """

    router: TopKRouter

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_shared_heads: int,
        k: int,
        *,
        head_dim: int | None = None,
        scaled: bool = True,
        causal: bool = False,
        dropout: float = 0.0,
        losses: Mapping[str, float | Mapping[str, Any]] | None = LOSSES,
        **options: Any,
    ) -> None:
        super().__init__()
        routed = num_heads - num_shared_heads
        if num_shared_heads < 0 or not 1 <= k <= routed:
            raise ValueError(
                f"MoH: of {num_heads} heads, {num_shared_heads} of them shared, a token cannot have k={k} more; "
                f"expected num_shared_heads >= 0 and 1 <= k <= num_heads - num_shared_heads"
            )
        if head_dim is None and dim % num_heads:
            raise ValueError(f"MoH: {num_heads} heads do not divide dim={dim}; give head_dim")
        self.dim, self.num_heads, self.num_shared_heads = dim, num_heads, num_shared_heads
        self.head_dim = head_dim or dim // num_heads
        self.scaled, self.causal, self.dropout = scaled, causal, dropout
        given = {"normalize": scaled, "scale": float(k) if scaled else 1.0, "losses": losses, **options}
        self.router = TopKRouter(dim, routed, k, **given)
        self.q_proj = nn.Parameter(torch.empty(num_heads, self.head_dim, dim))
        self.o_proj = nn.Parameter(torch.empty(num_heads, dim, self.head_dim))
        self.kv_proj = nn.Linear(dim, 2 * num_heads * self.head_dim, bias=False)
        self.shared_gate = nn.Linear(dim, num_shared_heads, bias=False) if num_shared_heads > 1 else None
        self.mix = nn.Linear(dim, 2, bias=False) if num_shared_heads else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the heads' weights uniformly within 1/sqrt(fan in), the output's that of all heads."""
        for weight, fan_in in ((self.q_proj, self.dim), (self.o_proj, self.num_heads * self.head_dim)):
            weight.uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        rotary: Rotary | None = None,
        **context: Any,
    ) -> Tensor:
        """Attend from tokens x [B, S, D]; keywords as in `MoA`."""
        x, context = checked("MoH", x, self.dim, mask, context)
        routing = self.router(x, causal=self.causal, **context)
        self._keep(routing)
        key, value = self.kv_proj(x).unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(2)
        if rotary is not None:
            key = rotate(key, *(t.unsqueeze(2) for t in rotary))
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value)
        parts = [self.num_shared_heads, self.num_heads - self.num_shared_heads]
        (k_shared, k_routed), (v_shared, v_routed) = (t.split(parts, dim=1) for t in (key, value))
        (q_shared, q_routed), (o_shared, o_routed) = (p.split(parts) for p in (self.q_proj, self.o_proj))
        weight = routing.weight
        mix = None if self.mix is None else _softmax(self.mix(x)) * (2 if self.scaled else 1)
        if mix is not None:
            weight = weight * mix[..., 1].flatten().index_select(0, routing.token_index)
        y = self._routed(x, routing, weight, q_routed, k_routed, v_routed, o_routed, mask, attention_mask, rotary)
        if mix is None:
            return y
        query = F.linear(x, q_shared.flatten(0, 1).to(x.dtype)).unflatten(-1, (-1, self.head_dim))
        if rotary is not None:
            query = rotate(query, *(t.unsqueeze(2) for t in rotary))
        heads = attend(
            query.transpose(1, 2),
            k_shared,
            v_shared,
            causal=self.causal,
            mask=mask,
            attention_mask=attention_mask,
            dropout=self._dropout,
        )
        gates = mix[..., :1]
        if self.shared_gate is not None:
            gates = gates * _softmax(self.shared_gate(x)) * (self.num_shared_heads if self.scaled else 1)
        heads = heads.transpose(1, 2) * gates.unsqueeze(-1).to(heads.dtype)
        out = F.linear(heads.flatten(2), o_shared.permute(1, 0, 2).flatten(1).to(heads.dtype))
        here = context.get("mask")
        return y + (out if here is None else out.where(here.unsqueeze(-1), 0))

    @property
    def _dropout(self) -> float:
        return self.dropout if self.training else 0.0

    def _routed(
        self,
        x: Tensor,
        routing: Routing,
        weight: Tensor,
        q_proj: Tensor,
        key: Tensor,
        value: Tensor,
        o_proj: Tensor,
        mask: Tensor | None,
        attention_mask: Tensor | None,
        rotary: Rotary | None,
    ) -> Tensor:
        """Sum [B, S, D] of what the routed heads make of the tokens that chose them."""
        batch, length = x.shape[:2]
        token, tokens = routing.token_index, x.flatten(0, 1)
        query = grouped_linear(tokens.index_select(0, token), q_proj, routing.offsets)
        if rotary is not None:
            cos, sin = (t.expand(batch, -1, -1).flatten(0, 1).index_select(0, token) for t in rotary)
            query = rotate(query, cos, sin)
        # Each head's queries of a sequence side by side, filled up to as many as the busiest head has of one.
        segment = routing.expert_index * batch + token // max(length, 1)
        counts = torch.bincount(segment, minlength=routing.num_experts * batch)
        most = busiest(counts) if batch else 1
        nth = torch.arange(token.numel(), device=token.device) - (counts.cumsum(0) - counts).index_select(0, segment)
        place = (token // max(length, 1) * routing.num_experts + routing.expert_index) * most + nth
        shape = (batch, routing.num_experts, most)
        query = query.new_zeros(math.prod(shape), self.head_dim).index_copy(0, place, query)
        position = token.new_full((math.prod(shape),), key.shape[2] - 1)
        position = position.index_copy(0, place, token % max(length, 1) + key.shape[2] - length).view(shape)
        heads = attend(
            query.view(*shape, self.head_dim),
            key,
            value,
            causal=self.causal,
            mask=mask,
            position=position,
            attention_mask=attention_mask,
            dropout=self._dropout,
        )
        out = grouped_linear(heads.flatten(0, 2).index_select(0, place), o_proj, routing.offsets)
        out = out * weight.unsqueeze(-1).to(out.dtype)
        return out.new_zeros(tokens.shape).index_add(0, token, out).view(x.shape)

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return (
            f"{self.dim}, num_heads={self.num_heads}, num_shared_heads={self.num_shared_heads}, k={self.router.k}, "
            f"head_dim={self.head_dim}, causal={self.causal}"
        )


def _softmax(logits: Tensor) -> Tensor:
    """In float32 at least, as routers do."""
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
