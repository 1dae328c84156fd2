"""SwitchHead: few heads, each with experts for its value and output projections."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import grouped_linear
from ..layer import Recorded
from ..routers.base import Router
from ..routers.switch_head import SwitchHeadRouter
from ..routing import Routing
from .attend import Cache, attend, checked
from .positions import Rotary, rotate


class HeadExperts(Recorded):
    """Linear maps of H heads, each head with its own experts: z_h = sum_e g_he(x) u_h W_he.

    The router has the experts of all heads, those of a head together. weight [H*E, O, I], drawn uniformly within
    1/sqrt(fan_in).
    """

    def __init__(self, router: Router, num_heads: int, in_dim: int, out_dim: int, fan_in: int) -> None:
        super().__init__()
        self.router, self.num_heads, self.fan_in = router, num_heads, fan_in
        self.weight = nn.Parameter(torch.empty(router.num_experts, out_dim, in_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights."""
        self.weight.uniform_(-1 / math.sqrt(self.fan_in), 1 / math.sqrt(self.fan_in))

    def forward(self, x: Tensor, heads: Tensor | None = None, **context: Any) -> Tensor:
        """Tokens x [B, S, D] to heads [B, S, H, O], u being x; or heads [B, S, H, I], gated by x, to their sum."""
        routing = self.router(x, **context)
        if not isinstance(routing, Routing):
            raise ValueError(f"HeadExperts: expected a router that gives a Routing, got {type(routing).__name__}")
        self._keep(routing)
        token, tokens = routing.token_index, routing.num_tokens
        of_head = token * self.num_heads + routing.expert_index // (self.weight.shape[0] // self.num_heads)
        if heads is None:
            rows, place, shape = x.flatten(0, 1).index_select(0, token), of_head, (*x.shape[:2], self.num_heads, -1)
            tokens *= self.num_heads
        else:
            rows, place, shape = heads.flatten(0, 2).index_select(0, of_head), token, (*x.shape[:2], -1)
        out = grouped_linear(rows, self.weight, routing.offsets)
        out = out * routing.weight.unsqueeze(-1).to(out.dtype)
        z = out.new_zeros(tokens, out.shape[1]).index_add(0, place, out)
        return z.view(*shape[:-1], out.shape[1])

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        experts, out_dim, in_dim = self.weight.shape
        return f"num_heads={self.num_heads}, {experts // self.num_heads} experts each, {in_dim} -> {out_dim}"


class SwitchHead(nn.Module):
    """SwitchHead attention (2312.07987): y = sum_h sum_e s_O,he(x) Att(x W_q,h, X W_k,h, V_h) W_o,he.

    V_h = sum_e s_V,he(x) x W_v,he. Each head has num_experts value and as many output experts, of which sigmoid gates
    choose k, without competing: the source gate s_V by the token attended to, the destination gate s_O by the one that
    attends. Queries and keys have none, as in the paper; nothing is computed for experts not chosen.
    The paper's models: 2 or 4 heads, 4 or 5 experts, k 2 or 3, rotary on half of head_dim or Transformer XL's
    positions, which are not here. No loss by default; `losses` and expert_dropout go to both `SwitchHeadRouter`s.

    `record` sees both gates, as "value" and "output". Parameters: q_proj and k_proj [H*d, D]; value.weight [H*E, d, D]
    and output.weight [H*E, D, d], those of a head together.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        num_experts: int,
        k: int = 2,
        *,
        causal: bool = False,
        expert_dropout: float = 0.0,
        losses: Mapping[str, float | Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        if min(num_heads, head_dim) < 1:
            raise ValueError(f"SwitchHead: num_heads and head_dim must be at least 1, got {num_heads} and {head_dim}")
        self.dim, self.num_heads, self.head_dim, self.causal = dim, num_heads, head_dim, causal

        def gate() -> SwitchHeadRouter:
            options: dict[str, Any] = {"expert_dropout": expert_dropout, "losses": losses}
            return SwitchHeadRouter(dim, num_heads * num_experts, k, num_heads=num_heads, **options)

        width = num_heads * head_dim
        self.q_proj = nn.Linear(dim, width, bias=False)
        self.k_proj = nn.Linear(dim, width, bias=False)
        self.value = HeadExperts(gate(), num_heads, dim, head_dim, fan_in=dim)
        self.output = HeadExperts(gate(), num_heads, head_dim, dim, fan_in=width)

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
        x, context = checked("SwitchHead", x, self.dim, mask, context)
        context["causal"] = self.causal
        query, key = (p(x).unflatten(-1, (self.num_heads, -1)) for p in (self.q_proj, self.k_proj))
        if rotary is not None:
            cos, sin = (t.unsqueeze(2) for t in rotary)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        key, value = key.transpose(1, 2), self.value(x, **context).transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value)
        heads = attend(query.transpose(1, 2), key, value, causal=self.causal, mask=mask, attention_mask=attention_mask)
        return self.output(x, heads.transpose(1, 2), **context)

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, causal={self.causal}"
