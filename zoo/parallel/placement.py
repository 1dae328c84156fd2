"""Which experts should be neighbours, from what a gate has chosen: tokens then cross to fewer processes.

A token crosses once to each process that has any of its experts. Where the experts that tokens choose together are on
one process, fewer rows travel, and nothing else changes: the model is the same with its experts in another order. (The
idea of placing experts by a trace of the routing is ExFlow's, 2401.08383; there it is tokens that stay where their next
layer's expert is, here they go home after each layer, so that it is the experts of one layer that count.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..moe import Experts, MoE, Routing
from ..moe.routers import TopKRouter


def choices(routing: Routing) -> Tensor:
    """Which experts each token was sent to, a matrix [T, E] of bools, from a decision that `record` kept."""
    return routing.dense().detach() != 0


def crossings(chosen: Tensor, order: Tensor, processes: int) -> int:
    """Pairs of a token and a process with any of its experts, when experts lie in `order` [E] in equal parts.

    chosen [T, E]. Of tokens that are spread evenly, a share of 1 - 1 / processes of these pairs cross: rows that are
    sent each way, D * itemsize bytes each. Raises ValueError for experts that the processes do not divide.
    """
    return int(_by_process(chosen, order, processes).any(-1).sum())


def _by_process(chosen: Tensor, order: Tensor, processes: int) -> Tensor:
    experts = chosen.shape[1]
    if experts % processes:
        raise ValueError(f"placement: {experts} experts do not divide over {processes} processes")
    return chosen.index_select(1, order).view(len(chosen), processes, experts // processes)


def place(chosen: Tensor, processes: int, sweeps: int = 20) -> Tensor:
    """An order of the experts, [E], in which those that tokens choose together are mostly on one process.

    chosen [T, E] is a trace of the gate, from training or evaluation. Starting from the order as it is, two experts on
    different processes change places while more pairs of choices come together by it, the best two first. For tokens of
    two experts that is the number of crossings itself, for more it stands for it; the order is kept only if it has
    fewer crossings. Load does not count: hot experts that tokens choose together come to one process, which may then
    compute far more than the others. On a skewed trace (`scripts/bench_shadows.py`) the busiest process goes from 2.34
    to 4.47 times the mean load, for 0.88 of the rows sent. Raises as `crossings`.
    """
    experts = chosen.shape[1]
    order = torch.arange(experts)
    before = crossings(chosen, order, processes)
    values = chosen.double()
    together = (values.T @ values).fill_diagonal_(0)
    part = experts // processes
    holder = torch.arange(experts) // part
    for _ in range(sweeps * experts):
        belongs = nn.functional.one_hot(holder, processes).double()
        drawn = together @ belongs  # [E, R]: how much an expert has in common with each process
        own = drawn.gather(1, holder[:, None])
        there = drawn.index_select(1, holder)  # [e, f]: with the process of f
        gain = there - own + (there - own).T - 2 * together
        gain = gain.masked_fill(holder[:, None] == holder, -1)
        best = int(gain.argmax())
        first, second = divmod(best, experts)
        if gain[first, second] <= 1e-9:
            break
        holder[first], holder[second] = holder[second].clone(), holder[first].clone()
    found = holder.argsort(stable=True)
    return found if crossings(chosen, found, processes) < before else order


@torch.no_grad()
def reorder(layer: MoE, order: Tensor) -> None:
    """Give a layer's experts, and what its gate knows of each, another order; the layer's outputs stay.

    Before the layer is spread over processes. Raises ValueError for gates and experts that have no order to change:
    others than top-k over stacked MLPs, groups of experts, noise that is learnt, or experts that are spread already.
    """
    router, experts = layer.router, layer.experts
    if type(router) is not TopKRouter or router.num_groups > 1 or router.noise == "learned":
        raise ValueError(f"reorder: {type(router).__name__} with these options gives its experts' numbers a meaning")
    if not isinstance(experts, Experts) or experts.parallel is not None:
        raise ValueError(f"reorder: expected whole stacked experts, got {type(experts).__name__}")
    if sorted(order.tolist()) != list(range(experts.num_experts)):
        raise ValueError(f"reorder: expected each of {experts.num_experts} experts once, got {order.tolist()}")
    every = [*experts.parameters(), router.weight, router.bias, router.selection_bias]
    for tensor in (t for t in every if t is not None):
        tensor.copy_(tensor.index_select(0, order.to(tensor.device)))
