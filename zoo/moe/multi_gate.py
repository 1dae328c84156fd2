"""Many gates over one set of experts, which are computed once: the multi-gate mixture of experts.

T tokens, D width, E experts, O width of what an expert gives, G gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .expert_stack import ExpertStack
from .layer import Recorded
from .routers.base import Router
from .routing import Routing

# Below this share of the pairs of a token and an expert, computing those that some gate asks for beats computing all.
SPARSE = 0.5


class Gate(Recorded):
    """A router by itself, so that `zoo.moe.record` keeps what it decides."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router

    def forward(self, x: Tensor, **context: Any) -> Routing:
        """Route tokens x [T, D]. Raises TypeError where the router does not send tokens to experts."""
        decision = self.router(x, **context)
        if not isinstance(decision, Routing):
            raise TypeError(
                f"expected a router that sends tokens to experts, got {type(self.router).__name__}, which makes "
                f"a {type(decision).__name__}"
            )
        self._keep(decision)
        return decision


class MultiGateMoE(nn.Module):
    """y_g = sum_e gate_g(x)_e f_e(x) for every gate g (Ma et al., KDD 2018, eq. 6), with each f_e(x) computed once.

    One gate gives OMoE, one a task MMoE. The gates are any routers that send tokens to experts; where together they
    ask for few of the experts, only what they ask for is computed, unless batch norms learn.

    Raises ValueError when a gate and the experts disagree on their number, or there is no gate.
    """

    def __init__(self, routers: Sequence[Router], experts: ExpertStack) -> None:
        super().__init__()
        if not routers:
            raise ValueError("MultiGateMoE: expected at least one router")
        for router in routers:
            if router.num_experts != experts.num_experts:
                raise ValueError(
                    f"MultiGateMoE: a router routes {router.num_experts} experts, but there are {experts.num_experts}"
                )
        self.gates = nn.ModuleList(Gate(router) for router in routers)
        self.experts = experts

    def forward(self, x: Tensor, gate_inputs: Sequence[Tensor] | None = None, **context: Any) -> Tensor:
        """y [G, T, O] of tokens x [T, D]; gates see x, or inputs [T, D'] of their own; keywords go to the routers."""
        seen = [x] * len(self.gates) if gate_inputs is None else gate_inputs
        routings = [gate(tokens, **context) for gate, tokens in zip(self.gates, seen, strict=True)]
        asked, pairs = sum(routing.token_index.shape[0] for routing in routings), x.shape[0] * self.experts.num_experts
        # A graph for serving computes all: how many tokens an expert gets is not known to one. So do batch norms, which
        # learn from every token.
        whole = torch.compiler.is_exporting() or (self.training and self.experts.norm == "batch")
        if not whole and asked < SPARSE * pairs:
            return self._sparse(x, routings)
        return mix(torch.stack([combine_matrix(routing) for routing in routings]), self.experts(x))

    def _sparse(self, x: Tensor, routings: list[Routing]) -> Tensor:
        """Compute the pairs that some gate asks for."""
        tokens, experts = x.shape[0], self.experts.num_experts
        wanted = [routing.expert_index * tokens + routing.token_index for routing in routings]
        pairs = torch.cat(wanted).unique()  # sorted by expert, then token
        bounds = torch.arange(experts + 1, device=x.device) * tokens
        offsets = torch.searchsorted(pairs, bounds, out_int32=True)
        outputs = self.experts(x, Routing(pairs % tokens, offsets, x.new_ones(pairs.shape), tokens))
        ys = []
        for routing, own in zip(routings, wanted):
            rows = outputs.index_select(0, torch.searchsorted(pairs, own))
            weighted = rows * routing.weight.to(rows.dtype).unsqueeze(-1)
            ys.append(rows.new_zeros(tokens, rows.shape[1]).index_add(0, routing.token_index, weighted))
        return torch.stack(ys)


def mix(weights: Tensor, outputs: Tensor) -> Tensor:
    """y_g = sum_e weights[g, t, e] outputs[t, e] of weights [G, T, E] and outputs [T, E, O]: [G, T, O]."""
    return torch.bmm(weights.transpose(0, 1).to(outputs.dtype), outputs).transpose(0, 1)


def combine_matrix(routing: Routing) -> Tensor:
    """`routing.dense()`, [T, E], without a scatter where every token meets every expert."""
    tokens, experts = routing.num_tokens, routing.num_experts
    if _same(routing.weight.shape[0], tokens * experts):
        return routing.weight.view(experts, tokens).T
    return routing.dense()


def _same(size: int, other: int) -> bool:
    """Whether two sizes are equal; in a graph for serving, whether they always are."""
    if not torch.compiler.is_exporting():
        return size == other
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(size == other)


def everywhere(weight: Tensor, **extra: Any) -> Routing:
    """The decision that every token meets every expert with the weights [T, E]."""
    tokens, experts = weight.shape
    index = torch.arange(tokens, device=weight.device).repeat(experts)
    offsets = torch.arange(experts + 1, dtype=torch.int32, device=weight.device) * tokens
    return Routing(index, offsets, weight.T.reshape(-1), tokens, asked=experts, **extra)
