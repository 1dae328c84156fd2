"""Tokens to experts of other processes in messages of a size known before: nothing is read back by the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import autocast
from .dispatch import ExpertParallel, _Arrive, _Splits
from .routing import Routing


class StaticExpertParallel(ExpertParallel):
    """Expert parallelism with `places` rows from every process to every expert, filled up with zeros (GShard's form).

    Sizes do not depend on what the gate decides, so that the host waits for no device, and a graph of the step can be
    captured; the gate must give the same number of assignments every time, as top-k without capacity does. Of an
    expert's assignments on a process those beyond the first `places`, in token order, are dropped: `dropped` counts
    them, on the device. A token crosses once for each of its experts:
        2 * (E - E / R) * places * D * itemsize
    bytes a process in forward and the same in backward. Other things are as in `ExpertParallel`, but there are no
    chunks.

    Raises ValueError for experts that the processes do not divide, and for less than one place.
    """

    def __init__(self, num_experts: int, places: int, group: dist.ProcessGroup | None = None) -> None:
        super().__init__(num_experts, group)
        if num_experts % self.size:
            raise ValueError(f"StaticExpertParallel: {num_experts} experts do not divide over {self.size} processes")
        if places < 1:
            raise ValueError(f"StaticExpertParallel: places must be at least 1, got {places}")
        self.places = places
        self.dropped: Tensor | None = None

    def __call__(self, x: Tensor, routing: Routing, experts: Callable[[Tensor, Routing], Tensor]) -> Any:
        """Weighted sum [T, D] of what each token's experts make of tokens x [T, D]; all processes call it together."""
        if routing.num_experts != self.num_experts:
            raise ValueError(
                f"ExpertParallel: {self.num_experts} experts are spread, but the router routes {routing.num_experts}"
            )
        meanwhile, self.meanwhile = self.meanwhile, None
        token, places, device = routing.token_index, self.places, x.device
        expert = routing.expert_index
        nth = torch.arange(token.numel(), device=device) - routing.offsets.long().index_select(0, expert)
        fits = nth < places
        missed = (~fits).sum()
        self.dropped = missed if self.dropped is None else self.dropped + missed
        end = self.num_experts * places  # where what does not fit is put, and not sent
        place = (expert * places + nth).where(fits, end)
        own = x.index_select(0, token).to(autocast.computed(x))
        rows = own.new_zeros(end + 1, x.shape[1]).index_add(0, place, own)[:end]
        each = end // self.size
        splits = _Splits([each] * self.size, [each] * self.size)
        flight = self._depart(rows, splits)
        weight = routing.weight.new_zeros(end + 1).index_add(0, place, routing.weight)[:end]
        weights = self._depart(weight, splits)
        if meanwhile is not None:
            meanwhile()
        mine = self.num_experts // self.size
        arrived = _Arrive.apply(*flight).view(self.size, mine, places, -1).transpose(0, 1).reshape(end, -1)
        offsets = torch.arange(mine + 1, dtype=torch.int32, device=device) * (self.size * places)
        weight = _Arrive.apply(*weights).view(self.size, mine, places).transpose(0, 1).reshape(end)
        out = experts(arrived, Routing(torch.arange(end, device=device), offsets, weight, end))
        out = out.view(mine, self.size, places, -1).transpose(0, 1).reshape(end, -1)
        returning = self._depart(out, splits)

        def summed() -> Tensor:
            back = _Arrive.apply(*returning)
            found = back.index_select(0, place.clamp(max=end - 1)).where(fits.unsqueeze(-1), 0)
            return back.new_zeros(x.shape).index_add(0, token, found)

        return self._now_or_later(summed, [returning[0]])
