"""PEER: a layer of up to a million experts of one neuron each, found by product keys."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import autocast
from .experts import Experts, Weights
from .kernels import get_activation
from .layer import MoE
from .routers.product_key import ProductKeyRouter
from .routing import Routing


class NeuronExperts(Experts):
    """Experts of one hidden neuron: f_e(x) = act(u_e . x) v_e (2407.04153), with u, v [E, D] rows.

    Same parameters as `Experts(E, dim, 1)`. Each assignment gathers its own rows instead of running a matrix product an
    expert, which is what pays where experts are many and meet few tokens each. Memory is that of A rows of D.
    """

    def __init__(self, num_experts: int, dim: int, activation: str = "gelu", bias: bool = False) -> None:
        super().__init__(num_experts, dim, 1, activation, bias)

    def compute_with(self, weights: Weights, x: Tensor, routing: Routing) -> Tensor:
        """Weighted sum [T, D] of what each token's neurons, of those with these weights, make of tokens x [T, D]."""
        x = x.to(autocast.computed(x))
        expert, token = routing.expert_index, routing.token_index
        w_in, w_out = weights.w_in.to(x.dtype), weights.w_out.squeeze(-1).to(x.dtype)
        inputs = x.index_select(0, token)
        hidden = (w_in.index_select(0, expert) * inputs.unsqueeze(1)).sum(-1)
        if (b_in := weights.b_in) is not None:
            hidden = hidden + b_in.to(x.dtype).index_select(0, expert)
        out = get_activation(self.activation).forward(hidden) * w_out.index_select(0, expert)
        if (b_out := weights.b_out) is not None:
            out = out + b_out.to(x.dtype).index_select(0, expert)
        return x.new_zeros(x.shape).index_add(0, token, out * routing.weight.unsqueeze(-1).to(out.dtype))


class PEER(MoE):
    """Parameter-efficient expert retrieval (2407.04153): y = sum over heads and their k best experts of g act(u . x) v.

    A `MoE` of a `ProductKeyRouter`, which takes the options, and `NeuronExperts`. The paper: E = 1024^2, GELU, in place
    of an MLP in the middle of a model. The paper's experts may also be gated; here activation="geglu" does that.
    """

    def __init__(
        self, dim: int, num_experts: int, k: int = 16, *, heads: int = 8, activation: str = "gelu", **options: Any
    ) -> None:
        router = ProductKeyRouter(dim, num_experts, k, heads=heads, **options)
        super().__init__(router, NeuronExperts(num_experts, dim, activation))
