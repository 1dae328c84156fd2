"""How tokens travel to experts that other processes hold, and back.

R processes of a group hold the E experts of a layer, neighbours together: ceil(E / R) each, the last ones what is left,
which may be none. D is the width of a token, A how many assignments a process has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import autocast
from .routing import Routing
from .topology import expert_bounds, expert_links


@dataclass
class Traffic:
    """Bytes that a process has sent to others: tokens and results, what says where they belong, and lent experts."""

    rows: int = 0
    routing: int = 0
    weights: int = 0


class ExpertParallel:
    """Expert parallelism by all-to-all: every process brings its own tokens, and has its own part of the experts.

    A token crosses once to each process that holds any of its experts, with the combine weights of those, and one row
    comes back: the weighted sum of what they made of it. Forward and backward send the same number of rows,
        2 * sum over tokens of (processes with experts of the token, but for one's own) * D * itemsize
    bytes in each of the two, over all processes; `traffic` counts what this one sends. The host waits for the device
    once a call, to learn how many rows come. Results are those of one process with all experts, up to the order of
    additions; gradients of experts are sums over all processes' tokens. Gates that merge experts (`Blend`) need whole
    ones.

    Rows travel while other work is done, forward and backward. What is in `meanwhile` runs between the moment rows set
    out and that they are waited for: `MoE` puts its shared expert there. With chunks=n tokens go in n parts, and the
    experts take one while the next is on its way. Where `later` is a list, results are not waited for: a call returns
    rows on their way, which are nothing to look at, and puts into the list the function that waits and gives the sum.

    With shadows=n up to n experts a call are lent to all processes where that sends fewer bytes (`zoo.moe.shadows`).
    part=n gives n experts to each process, for as long as there are any, instead of ceil(E / R).

    Raises ValueError for fewer than one expert or chunk, fewer than no shadows, and parts that do not hold all experts.
    """

    def __init__(
        self,
        num_experts: int,
        group: dist.ProcessGroup | None = None,
        chunks: int = 1,
        shadows: int = 0,
        part: int | None = None,
    ) -> None:
        given = (("num_experts", num_experts, 1), ("chunks", chunks, 1), ("shadows", shadows, 0), ("part", part, 1))
        for name, value, least in given:
            if value is not None and value < least:
                raise ValueError(f"ExpertParallel: {name} must be at least {least}, got {value}")
        self.num_experts, self.group, self.chunks, self.shadows = num_experts, group, chunks, shadows
        self.meanwhile: Callable[[], None] | None = None
        self.later: list[Callable[[], Tensor]] | None = None
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.bounds = expert_bounds(num_experts, self.size, part)
        if self.bounds[-1] < num_experts:
            raise ValueError(f"ExpertParallel: {self.size} parts of {part} do not hold {num_experts} experts")
        self.traffic = Traffic()

    @property
    def own(self) -> slice:
        """The experts that this process holds."""
        return slice(self.bounds[self.rank], self.bounds[self.rank + 1])

    def links(self, within: int = 1) -> list[int]:
        """How far away each of the E experts is, as `zoo.moe.topology.LINKS`, with `within` processes in a node."""
        return expert_links(self.bounds, self.rank, within)

    def __call__(self, x: Tensor, routing: Routing, experts: Callable[[Tensor, Routing], Tensor]) -> Any:
        """Weighted sum [T, D] of what each token's experts make of tokens x [T, D]; all processes call it together.

        `experts` runs the tokens that arrive, with their routing over this process's own experts.
        """
        if routing.num_experts != self.num_experts:
            raise ValueError(
                f"ExpertParallel: {self.num_experts} experts are spread, but the router routes {routing.num_experts}"
            )
        meanwhile, self.meanwhile = self.meanwhile, None
        trips, by_chunk = self._trips(routing)
        weights = _ordered(routing.weight, by_chunk).split([sum(trip.assignments.sent) for trip in trips])
        journey = self._set_out(x, weights[0], trips[0])
        if meanwhile is not None:
            meanwhile()
        backs: list[tuple[Tensor, tuple[Tensor, _Flight]]] = []
        for i, trip in enumerate(trips):
            rows, weight = journey
            if i + 1 < len(trips):
                journey = self._set_out(x, weights[i + 1], trips[i + 1])
            arrived = _Arrive.apply(*rows)
            weight_arrived = _Arrive.apply(*weight).index_select(0, trip.order)
            out = experts(arrived, Routing(trip.token_index, trip.offsets, weight_arrived, arrived.shape[0]))
            backs.append((trip.sent, self._depart(out, trip.rows.reversed())))

        def summed() -> Tensor:
            y = x.new_zeros(x.shape)
            for sent, back in backs:
                rows = _Arrive.apply(*back)
                y = y.to(rows.dtype).index_add(0, sent, rows)
            return y

        return self._now_or_later(summed, [back[0] for _, back in backs])

    def _now_or_later(self, summed: Callable[[], Tensor], rows: list[Tensor]) -> Any:
        later, self.later = self.later, None
        if later is None:
            return summed()
        later.append(summed)
        # FSDP gathers a module's parameters for backward when the gradient of what it returned comes.
        return rows

    def _set_out(self, x: Tensor, weight: Tensor, trip: _Trip) -> tuple[tuple[Tensor, _Flight], tuple[Tensor, _Flight]]:
        """Send a chunk's tokens and combine weights."""
        # Rounded here, as the experts would, it is half as many bytes; its gradient is added up in its own type.
        rows = x.index_select(0, trip.sent).to(autocast.computed(x))
        return self._depart(rows, trip.rows), self._depart(weight, trip.assignments)

    def _depart(self, values: Tensor, splits: _Splits) -> tuple[Tensor, _Flight]:
        flight = _Flight(self, splits)
        return _Depart.apply(values, flight), flight

    @torch.no_grad()
    def _trips(self, routing: Routing) -> tuple[list[_Trip], Tensor | None]:
        """Work out who sends which rows to whom, and tell the others which of them their experts are to take.

        Returns the exchange of every chunk, and the assignments in their order, [A], None for that of the routing.
        """
        device, chunks, token = routing.token_index.device, self.chunks, routing.token_index
        chunk_size = max(-(-routing.num_tokens // chunks), 1)
        sizes = [end - start for start, end in pairwise(self.bounds)]
        holder = torch.arange(self.size, device=device).repeat_interleave(torch.tensor(sizes, device=device))
        expert, chunk = routing.expert_index, token // chunk_size
        # A place for every pair of process and token, true where the token goes there.
        place = holder.index_select(0, expert) * (chunks * chunk_size) + token
        goes = torch.zeros(self.size * chunks * chunk_size, dtype=torch.bool, device=device)
        goes[place] = True
        goes = goes.view(self.size, chunks, chunk_size)
        sent_rows = goes.sum(2)
        position = (goes.cumsum(2) - 1).flatten().index_select(0, place)
        counts = torch.zeros(self.num_experts * chunks, dtype=torch.long, device=device)
        counts = counts.index_add(0, expert * chunks + chunk, torch.ones_like(expert)).view(-1, chunks)
        # Each process learns how many rows come from where, and how many of them each of its experts takes, by chunk.
        told = torch.cat([torch.cat([n[None], c]).T.flatten() for n, c in zip(sent_rows, counts.split(sizes))])
        mine = sizes[self.rank]
        heard = told.new_empty(self.size * chunks * (mine + 1))
        lengths = [chunks * (mine + 1)] * self.size
        self._send(heard, told, _Splits(lengths, [chunks * (size + 1) for size in sizes]))
        heard = heard.view(self.size, chunks, mine + 1)
        sent_assignments = torch.zeros_like(sent_rows).index_add(0, holder, counts)
        numbers = torch.stack([sent_rows, sent_assignments, heard[..., 0], heard[..., 1:].sum(2)])
        chunk_of, _, within = goes.transpose(0, 1).nonzero().unbind(1)
        by_chunk = chunk.sort(stable=True).indices if chunks > 1 else None
        splits = [(_Splits(n[2], n[0]), _Splits(n[3], n[1])) for n in numbers.permute(2, 0, 1).tolist()]
        sent = (chunk_of * chunk_size + within).split([sum(rows.sent) for rows, _ in splits])
        told_positions = _ordered(position.int(), by_chunk).split([sum(a.sent) for _, a in splits])
        trips = []
        for i, (rows, assignments) in enumerate(splits):
            positions = told_positions[i].new_empty(sum(assignments.received))
            self._send(positions, told_positions[i], assignments)
            # They come by process, and by expert within one; experts want them by expert.
            taken = heard[:, i, 1:]
            expert = torch.arange(mine, device=device).repeat(self.size)
            expert = expert.repeat_interleave(taken.reshape(-1), output_size=positions.numel())
            order = expert.sort(stable=True).indices
            come = heard[:, i, 0]
            base = (come.cumsum(0) - come).repeat_interleave(taken.sum(1), output_size=positions.numel())
            offsets = torch.zeros(mine + 1, dtype=torch.int32, device=device)
            offsets[1:] = taken.sum(0).cumsum(0)
            trips.append(_Trip(sent[i], rows, assignments, order, (positions + base).index_select(0, order), offsets))
        return trips, by_chunk

    def _send(self, received: Tensor, sent: Tensor, splits: _Splits, wait: bool = True) -> Any:
        """Entries to the processes they are for; without waiting, what is to be waited for."""
        sent = sent.contiguous()
        work = dist.all_to_all_single(received, sent, splits.received, splits.sent, group=self.group, async_op=not wait)
        size = sum(n for r, n in enumerate(splits.sent) if r != self.rank) * sent[:1].numel() * sent.element_size()
        if sent.dim() > 1:
            self.traffic.rows += size
        else:
            self.traffic.routing += size
        return work, sent


def _ordered(values: Tensor, order: Tensor | None) -> Tensor:
    return values if order is None else values.index_select(0, order)


@dataclass
class _Splits:
    """How many entries come from every process, and how many go to it."""

    received: list[int]
    sent: list[int]

    def reversed(self) -> _Splits:
        """The way back."""
        return _Splits(self.sent, self.received)


@dataclass
class _Trip:
    """One call's exchange: token of every row sent, splits, and the routing of what arrives but for its weights."""

    sent: Tensor
    rows: _Splits
    assignments: _Splits
    order: Tensor
    token_index: Tensor
    offsets: Tensor


class _Flight:
    """Entries on their way, forward and later their gradients backward; what is sent is kept until they have come."""

    def __init__(self, parallel: ExpertParallel, splits: _Splits) -> None:
        self.parallel, self.splits = parallel, splits
        self.gradient: Tensor | None = None
        self._pending: Any = None

    def start(self, values: Tensor, splits: _Splits) -> Tensor:
        """Send values; what they become is there after `land`."""
        received = values.new_empty(sum(splits.received), *values.shape[1:])
        self._pending = self.parallel._send(received, values, splits, wait=False)
        return received

    def land(self) -> None:
        """Wait until all have come."""
        (work, _), self._pending = self._pending, None
        work.wait()


class _Depart(torch.autograd.Function):
    """Entries set out to the processes they are for; `_Arrive` has them."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        return flight.start(values, flight.splits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, None]:
        ctx.flight.land()
        gradient, ctx.flight.gradient = ctx.flight.gradient, None
        return gradient, None


class _Arrive(torch.autograd.Function):
    """Entries that had set out; backward, their gradients set out the other way.

    What autograd hands on to `_Depart` is of another shape than these: they meet in the flight.
    """

    @staticmethod
    def forward(ctx: Any, received: Tensor, flight: _Flight) -> Tensor:
        flight.land()
        ctx.flight = flight
        ctx.mark_dirty(received)
        return received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.flight.gradient = ctx.flight.start(gradient, ctx.flight.splits.reversed())
        return gradient, None
