"""What more copies of hot experts save, counted on a trace of a gate: lent for a step, or kept by all for good.

Experts lie in equal parts of neighbours, and so do the tokens of a step. A row between processes is sent four times a
step (there, back, and both gradients); a copied expert costs its weights out and its gradients back once a process, or,
where all keep it, as many bytes to sum its gradients. Lending is FasterMoE's (PPoPP'22), by the rule of
`zoo.moe.shadows`; copies for good, chosen from an earlier trace, are in the manner of FlexMoE (2304.03946), which also
moves them while it trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..moe.shadows import alone, worth_lending
from ..moe.topology import expert_bounds


@dataclass(frozen=True)
class Sent:
    """Bytes of a step over all processes, of rows and of experts, and assignments that the busiest one computes."""

    rows: int
    weights: int
    busiest: int


def step(chosen: Tensor, processes: int, row: int, expert: int, copied: Sequence[int] = ()) -> Sent:
    """What a step sends in which all processes have the experts `copied`.

    chosen [T, E] says which experts tokens have; row and expert are the bytes of one of each.
    """
    bounds, homes = _layout(chosen, processes)
    crossing, load = 0, torch.zeros(processes, dtype=torch.long)
    at_home = torch.zeros(chosen.shape[1], dtype=torch.bool)
    at_home[list(copied)] = True
    for home in range(processes):
        mine = chosen[homes[home] : homes[home + 1]]
        load[home] += mine[:, at_home].sum()
        travels = mine & ~at_home
        for r in range(processes):
            own = travels[:, bounds[r] : bounds[r + 1]]
            load[r] += own.sum()
            crossing += int(own.any(1).sum()) if r != home else 0
    return Sent(4 * crossing * row, 2 * (processes - 1) * expert * len(copied), int(load.max()))


def lent(chosen: Tensor, processes: int, row: int, expert: int, limit: int) -> list[int]:
    """Which experts are worth copying in a step like this, at most `limit` of them."""
    return worth_lending(_sent_alone(chosen, processes), limit, row, expert, processes)


def kept(trace: Sequence[Tensor], processes: int, row: int, expert: int, limit: int) -> list[int]:
    """Which experts all should keep for good by an earlier trace: those worth copying in the mean of its steps."""
    mean = torch.stack([_sent_alone(chosen, processes) for chosen in trace]).double().mean(0)
    return worth_lending(mean, limit, row, expert, processes)


def _sent_alone(chosen: Tensor, processes: int) -> Tensor:
    """How many tokens cross for one expert alone, by that expert, over all processes, [E]."""
    bounds, homes = _layout(chosen, processes)
    parts = [chosen[homes[r] : homes[r + 1]] for r in range(processes)]
    return torch.stack([alone(part, bounds, r) for r, part in enumerate(parts)]).sum(0)


def _layout(chosen: Tensor, processes: int) -> tuple[list[int], list[int]]:
    tokens, experts = chosen.shape
    return expert_bounds(experts, processes), expert_bounds(tokens, processes)
