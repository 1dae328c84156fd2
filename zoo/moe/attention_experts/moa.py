"""MoA and JetMoE: attention heads as experts that share their keys and values."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import grouped_linear
from ..layer import Recorded
from ..routers.base import Router
from ..routing import Routing
from .attend import Cache, attend, busiest, checked
from .positions import Rotary, rotate


class MoA(Recorded):
    """Mixture of attention heads (2210.05144): y_t = sum_e g_e(x_t) Att(x_t W_q,e, X W_k, X W_v) W_o,e.

    An expert is its W_q,e and W_o,e; all share W_k and W_v. The router chooses experts for each token, and its weights
    count their outputs: any router that gives a `Routing`, with its losses. Nothing is computed for experts that a
    token did not choose, and nothing dropped but by the router's capacity. Published settings of
    (router, num_heads, bias):
        MoA      TopKRouter(k=8, losses={"switch": 0.01, "z": 0.001}), 1, False: softmax, not divided by the sum of the
                 chosen, as in the authors' code; the paper divides by it, without gradient. There 8 to 32 experts
        JetMoE   TopKRouter(k=2, score="softmax_topk", losses={"switch": 0.01}), 16, True (2404.07413)
        ModuleFormer  ModuleFormerRouter(...), 1, False, but without that model's stick-breaking attention
    num_heads is how many heads an expert has, each with its own keys and values. `bias` is added to the sum. `dropout`
    acts on attention in training. causal=True lets a token see itself and earlier ones, and tells the router so.

    Parameters, laid out as in `transformers`' JetMoE: q_proj [E, H*d, D], o_proj [E, D, H*d], kv_proj.weight [2*H*d, D]
    as [k; v], bias [D]. Raises ValueError on a size below one, and when the router's decision is no `Routing`.
    """

    def __init__(
        self,
        router: Router,
        head_dim: int,
        num_heads: int = 1,
        *,
        causal: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if min(head_dim, num_heads) < 1:
            raise ValueError(f"MoA: head_dim and num_heads must be at least 1, got {head_dim} and {num_heads}")
        self.router, self.dim = router, router.dim
        self.head_dim, self.num_heads, self.causal, self.dropout = head_dim, num_heads, causal, dropout
        width = num_heads * head_dim
        self.q_proj = nn.Parameter(torch.empty(router.num_experts, width, router.dim))
        self.o_proj = nn.Parameter(torch.empty(router.num_experts, router.dim, width))
        self.kv_proj = nn.Linear(router.dim, 2 * width, bias=False)
        self.bias = nn.Parameter(torch.zeros(router.dim)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the experts' weights uniformly within 1/sqrt(fan in), and zero the bias."""
        for weight in (self.q_proj, self.o_proj):
            bound = 1 / math.sqrt(weight.shape[-1])
            weight.uniform_(-bound, bound)
        if self.bias is not None:
            self.bias.zero_()

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
        """Attend from tokens x [B, S, D]; other keywords go to the router.

        mask [B, S], False for padding, which is no key and has no expert; with a cache [B, K], of the tokens in it too.
        attention_mask [B or 1, 1, S, K], True where a query sees a key, decides that alone where it is given: `causal`
        and mask have no say in it then.
        rotary: cosines and sines [B or 1, S, R] of the positions of x (`zoo.moe.rotary`).
        """
        x, context = checked("MoA", x, self.dim, mask, context)
        routing = self.router(x, causal=self.causal, **context)
        if not isinstance(routing, Routing):
            raise ValueError(f"MoA: expected a router that gives a Routing, got {type(routing).__name__}")
        self._keep(routing)
        tokens = x.flatten(0, 1)
        place, most = _places(routing)
        query = grouped_linear(tokens.index_select(0, routing.token_index), self.q_proj, routing.offsets)
        # Zeros where a token has fewer experts than another: what comes of them is not read.
        query = query.new_zeros(tokens.shape[0] * most, query.shape[1]).index_copy(0, place, query)
        query = query.view(*x.shape[:2], most, self.num_heads, self.head_dim)
        key, value = self.kv_proj(x).unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(2)
        if rotary is not None:
            cos, sin = (t.unsqueeze(2) for t in rotary)
            query, key = rotate(query, cos.unsqueeze(2), sin.unsqueeze(2)), rotate(key, cos, sin)
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value)
        query = query.permute(0, 3, 2, 1, 4).flatten(1, 2)
        dropout = self.dropout if self.training else 0.0
        heads = attend(query, key, value, causal=self.causal, mask=mask, attention_mask=attention_mask, dropout=dropout)
        heads = heads.unflatten(1, (self.num_heads, most)).permute(0, 3, 2, 1, 4).flatten(3).flatten(0, 2)
        out = grouped_linear(heads.index_select(0, place), self.o_proj, routing.offsets)
        out = out * routing.weight.unsqueeze(-1).to(out.dtype)
        y = out.new_zeros(tokens.shape).index_add(0, routing.token_index, out)
        return (y if self.bias is None else y + self.bias.to(y.dtype)).view(x.shape)

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{self.dim}, head_dim={self.head_dim}, num_heads={self.num_heads}, causal={self.causal}"


def _places(routing: Routing) -> tuple[Tensor, int]:
    """Where each assignment stands, [A], when every token has as many places in a row as the busiest one; how many."""
    count, tokens = routing.token_index.numel(), routing.num_tokens
    order = routing.token_index.argsort(stable=True)
    place = torch.arange(count, device=order.device)
    most = routing.asked
    if not isinstance(most, int) or count != tokens * most:
        met = torch.bincount(routing.token_index, minlength=tokens)
        most = busiest(met) if tokens else 1
        first = most * torch.arange(tokens, device=order.device) - (met.cumsum(0) - met)
        place = place + first.index_select(0, routing.token_index.index_select(0, order))
    return torch.empty_like(place).index_copy(0, order, place), most
