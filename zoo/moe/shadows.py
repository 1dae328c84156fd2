"""Hot experts lent to all processes for a step, so that the tokens that want them stay at home (FasterMoE, PPoPP'22).

A row between processes takes D elements, and goes there and back, as does its gradient. An expert's weights take W
elements; they go out once to each of the other R - 1 processes, and their gradients come back once. Lending an expert
sends fewer bytes where
    4 * (rows that only this expert sends) * D > 2 * (R - 1) * W,
a row that another expert of the same process takes the token there for anyway not being counted. In evaluation both
sides are half of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import autocast
from .routing import Routing

if TYPE_CHECKING:
    from .dispatch import ExpertParallel
    from .experts import Experts


def alone(chosen: Tensor, bounds: Sequence[int], rank: int) -> Tensor:
    """How many tokens of a process go to another for one expert alone, by that expert, [E] int64.

    chosen [T, E] says which experts tokens have, bounds which experts each process holds: bounds[r]:bounds[r + 1].
    """
    found = torch.zeros(chosen.shape[1], dtype=torch.long, device=chosen.device)
    for r in range(len(bounds) - 1):
        own = chosen[:, bounds[r] : bounds[r + 1]]
        if r != rank:
            found[bounds[r] : bounds[r + 1]] = (own & (own.sum(1, keepdim=True) == 1)).sum(0)
    return found


def worth_lending(rows: Tensor, limit: int, row: int, expert: int, processes: int) -> list[int]:
    """At most `limit` experts, in order, whose lending saves most bytes by the module's rule; those that save some.

    rows [E] are those that only the expert sends, over all processes; row and expert are bytes of one, forward.
    """
    gain = 4 * row * rows - 2 * (processes - 1) * expert
    best = gain.argsort(descending=True, stable=True)[:limit]
    return sorted(int(e) for e in best if gain[e] > 0)


def run(parallel: ExpertParallel, experts: Experts, x: Tensor, routing: Routing) -> Any:
    """What `parallel` gives, with up to `parallel.shadows` experts lent; all processes call it together."""
    lent = _chosen(parallel, experts, x, routing)
    if not lent:
        return parallel(x, routing, experts.compute)

    def lend(value: Tensor | None) -> Any:
        return None if value is None else _Lend.apply(value, parallel, tuple(lent))

    held = experts.held
    weights = type(held)(lend(held.w_in), lend(held.w_out), lend(held.b_in), lend(held.b_out))
    own, others = _split(routing, lent)
    made: list[Tensor] = []
    meanwhile, later = parallel.meanwhile, parallel.later

    def at_home() -> None:
        if meanwhile is not None:
            meanwhile()
        made.append(experts.compute_with(weights, x, own))

    # The tokens of lent experts are worked on while the others travel.
    parallel.meanwhile = at_home
    y = parallel(x, others, experts.compute)
    if later is None:
        return y + made[0].to(y.dtype)
    summed = later.pop()
    later.append(lambda: summed() + made[0])
    return y


@torch.no_grad()
def _chosen(parallel: ExpertParallel, experts: Experts, x: Tensor, routing: Routing) -> list[int]:
    chosen = torch.zeros(routing.num_tokens, routing.num_experts, dtype=torch.bool, device=x.device)
    chosen[routing.token_index, routing.expert_index] = True
    rows = alone(chosen, parallel.bounds, parallel.rank)
    dist.all_reduce(rows, group=parallel.group)
    expert = sum(held.shape[1:].numel() * held.element_size() for held in experts.held if held is not None)
    return worth_lending(
        rows.cpu(), parallel.shadows, x.shape[1] * autocast.computed(x).itemsize, expert, parallel.size
    )


def _split(routing: Routing, lent: Sequence[int]) -> tuple[Routing, Routing]:
    """The routing to lent experts, by their place in `lent`, and that to all experts without them."""
    counts, mine = routing.counts, torch.zeros(routing.num_experts, dtype=torch.bool, device=routing.offsets.device)
    mine[list(lent)] = True
    stays = mine[routing.expert_index]
    parts = []
    for chosen, kept in ((stays, counts[mine]), (~stays, counts.masked_fill(mine, 0))):
        offsets = torch.cat([kept.new_zeros(1), kept.cumsum(0)]).int()
        index = chosen.nonzero().flatten()
        token, weight = routing.token_index.index_select(0, index), routing.weight.index_select(0, index)
        parts.append(Routing(token, offsets, weight, routing.num_tokens))
    return parts[0], parts[1]


class _Lend(torch.autograd.Function):
    """Tensors of lent experts, [S, ...], on every process, out of those that each holds; their gradients go home."""

    @staticmethod
    def forward(ctx: Any, held: Tensor, parallel: ExpertParallel, lent: tuple[int, ...]) -> Tensor:
        ctx.parallel, ctx.lent, ctx.shape = parallel, lent, held.shape
        whole = held.new_empty(len(lent), *held.shape[1:])
        works = []
        for place, expert in enumerate(lent):
            holder, number = _holder(parallel, expert)
            if holder == parallel.rank:
                whole[place] = held[number]
                parallel.traffic.weights += (parallel.size - 1) * whole[place].nbytes
            works.append(dist.broadcast(whole[place], group=parallel.group, group_src=holder, async_op=True))
        for work in works:
            work.wait()
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        parallel, gradient = ctx.parallel, gradient.contiguous().clone()
        home = gradient.new_zeros(ctx.shape)
        works = []
        for place, expert in enumerate(ctx.lent):
            holder, _ = _holder(parallel, expert)
            parallel.traffic.weights += (holder != parallel.rank) * gradient[place].nbytes
            works.append(dist.reduce(gradient[place], group=parallel.group, group_dst=holder, async_op=True))
        for place, (expert, work) in enumerate(zip(ctx.lent, works)):
            work.wait()
            holder, number = _holder(parallel, expert)
            if holder == parallel.rank:
                home[number] = gradient[place]
        return home, None, None


def _holder(parallel: ExpertParallel, expert: int) -> tuple[int, int]:
    """The process that holds an expert, and the expert's number there."""
    rank = next(r for r in range(parallel.size) if parallel.bounds[r] <= expert < parallel.bounds[r + 1])
    return rank, expert - parallel.bounds[rank]
