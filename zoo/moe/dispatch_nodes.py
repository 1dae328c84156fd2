"""Tokens to experts of other nodes: once a node, and from there to the processes in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .dispatch import ExpertParallel, Traffic
from .routing import Routing


class HierarchicalExpertParallel:
    """Expert parallelism over nodes of several processes each, for gates whose tokens meet experts of few nodes.

    `between` has the processes at this one's place in every node, `within` those of its node; nodes hold neighbouring
    experts, and so do the processes in one. A token crosses once to each node that has any of its experts, to the
    process at the same place there, which takes it to the processes that have them; sums come back the same way. All
    hold the experts that they would hold in one flat group, nodes one after the other. Bytes
    between nodes, `traffic_between`, are those of the closed form of `ExpertParallel` with nodes for processes; those
    inside nodes, `traffic_within`, are more by what is passed on.

    As `ExpertParallel` otherwise. Raises ValueError where a node is left without an expert.
    """

    def __init__(
        self, num_experts: int, between: dist.ProcessGroup, within: dist.ProcessGroup, chunks: int = 1
    ) -> None:
        self.num_experts = num_experts
        inside = dist.get_world_size(within)
        part = -(-num_experts // (dist.get_world_size(between) * inside))
        self.between = ExpertParallel(num_experts, between, chunks, part=part * inside)
        mine = self.between.own
        if mine.stop == mine.start:
            raise ValueError(f"{num_experts} experts over {self.between.size} nodes leave some without any")
        self.within = ExpertParallel(mine.stop - mine.start, within, part=part)

    @property
    def own(self) -> slice:
        """The experts that this process holds."""
        first, inside = self.between.own.start, self.within.own
        return slice(first + inside.start, first + inside.stop)

    def links(self, within: int = 1) -> list[int]:
        """How far away each of the E experts is, as `zoo.moe.topology.LINKS`; nodes are those of `within` here."""
        node, own = self.between.own, self.own
        levels = [2] * self.num_experts
        levels[node] = [1] * (node.stop - node.start)
        levels[own] = [0] * (own.stop - own.start)
        return levels

    @property
    def traffic_between(self) -> Traffic:
        """Bytes that this process has sent to other nodes."""
        return self.between.traffic

    @property
    def traffic_within(self) -> Traffic:
        """Bytes that this process has sent to others of its node."""
        return self.within.traffic

    @property
    def meanwhile(self) -> Callable[[], None] | None:
        """What runs while tokens travel to other nodes."""
        return self.between.meanwhile

    @meanwhile.setter
    def meanwhile(self, work: Callable[[], None] | None) -> None:
        self.between.meanwhile = work

    @property
    def later(self) -> list[Callable[[], Tensor]] | None:
        """Where the function is put that waits for what other nodes send back."""
        return self.between.later

    @later.setter
    def later(self, found: list[Callable[[], Tensor]] | None) -> None:
        self.between.later = found

    def __call__(self, x: Tensor, routing: Routing, experts: Callable[[Tensor, Routing], Tensor]) -> Any:
        """Weighted sum [T, D] of what each token's experts make of tokens x [T, D]; all processes call it together."""

        def inside(rows: Tensor, arrived: Routing) -> Tensor:
            return self.within(rows, arrived, experts)

        return self.between(x, routing, inside)
