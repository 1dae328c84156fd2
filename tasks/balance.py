"""How evenly each MoE layer of a model uses its experts, over one step or a whole evaluation."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from zoo.moe import Routing, Step, telemetry


class LayerBalance:
    """Sums over steps and processes, a layer apart: a pooled figure would hide one collapsed layer.

    For every layer `compute` gives load_max, the busiest expert's load over the mean (1 is even, E is collapsed);
    drop_rate, the share of wanted assignments that capacity dropped; and, where the router has a distribution, entropy,
    that of one token's choice in nats.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, step: Step, real: Tensor | None = None) -> None:
        """Add what the layers decided in `step`; gates that are not sparse have no load and are left out.

        Rows of the batch that are not `real` [B], as those that fill it up, do not count, nor do their tokens.
        """
        for name, calls in step.routings.items():
            for routing in calls:
                if isinstance(routing, Routing):
                    sums = _sums(routing if real is None else _of_rows(routing, real))
                    self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def compute(self) -> dict[str, dict[str, float]]:
        """Figures of every layer so far, over all processes. All processes must call it together."""
        if not self._sums:
            return {}
        flat = torch.cat(list(self._sums.values()))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(flat)
        parts = flat.cpu().split([len(s) for s in self._sums.values()])
        return {name.removeprefix("model."): _figures(part) for name, part in zip(self._sums, parts)}


def _of_rows(routing: Routing, real: Tensor) -> Routing:
    """What was decided of the tokens of real rows; all of it where a layer saw other tokens than the rows' own."""
    rows, tokens = len(real), routing.num_tokens
    if not rows or tokens % rows or bool(real.all()):
        return routing
    here = real.repeat_interleave(tokens // rows)
    kept = here[routing.token_index]
    before = torch.cat([kept.new_zeros(1, dtype=torch.int32), kept.cumsum(0, dtype=torch.int32)])
    asked, probs = routing.asked, routing.probs
    return replace(
        routing,
        token_index=(here.cumsum(0) - 1)[routing.token_index[kept]],
        offsets=before[routing.offsets.long()],
        weight=routing.weight[kept],
        num_tokens=int(here.sum()),
        probs=None if probs is None else probs[here],
        asked=asked[here] if isinstance(asked, Tensor) else asked,
        place=None,
    )


def _sums(routing: Routing) -> Tensor:
    """Kept assignments by expert, then assignments asked for, tokens, and their summed entropy, [E + 3] float64."""
    asked = telemetry.asked_per_token(routing).sum()
    entropies = asked.new_zeros(0) if routing.probs is None else telemetry.entropies(routing)
    rest = torch.stack([asked.double(), asked.new_tensor(len(entropies)).double(), entropies.double().sum()])
    return torch.cat([routing.counts.double(), rest])


def _figures(sums: Tensor) -> dict[str, float]:
    counts, (asked, tokens, entropy) = sums[:-3], sums[-3:].tolist()
    kept = float(counts.sum())
    figures = {
        "load_max": float(counts.max()) * len(counts) / max(kept, 1.0),
        "drop_rate": 1 - kept / asked if asked else 0.0,
    }
    if tokens:
        figures["entropy"] = entropy / tokens
    return figures
