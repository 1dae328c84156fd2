"""All that this package says of a model, as plain numbers for a report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..moe import Decision, Routing
from .agreement import routing_over_training
from .conditional import Key, add_counts, asked_and_dropped, chance_std, decision_std, explained
from .experts import expert_similarity, met_together, shared
from .walk import decisions, is_soft

COMPARED = 4  # batches on which earlier checkpoints are compared
SQUARE = 1024  # experts of which every pair is told; PEER has a million


def analyse(
    model: nn.Module,
    batches: Iterable[Any],
    keys: Mapping[str, Key],
    sequence_length: int,
    run: Callable[[Any], object] | None = None,
    minimum: float = 20,
    earlier: Iterable[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """What the experts of every layer do on batches of sequences of one length, to be written as JSON.

    {"layers": {layer: figures}}: `keys` {name: {"explained", "std", "chance", "values"}}, how far a token's key decides
    its experts (see `explained`, `decision_std` and `chance_std`, their means over the keys with `minimum`
    assignments); `drops` [S], the dropped share at each position, where something was; `co_activation` [E, E] of gates
    that choose, where a token meets several; `similarity` [E, E] of experts with stacked weights; of more than 1024
    experts neither. With the state
    dicts of earlier checkpoints, in the order of training, "agreement" {layer: [[number, overlap], ...]} as of
    `routing_over_training`, on the first batches; the last is the model itself. The batches are gone over once, and
    may be a stream. Raises ValueError for a model without MoE layers, and what the functions named raise.
    """
    kept: list[Any] = []
    known: dict[str, dict[int, int]] = {name: {} for name in keys}
    tallies: dict[str, _Tally] = {}
    for batch, layers in decisions(model, batches, run):
        if len(kept) < COMPARED:
            kept.append(batch)
        values = {name: _renumbered(key(batch).reshape(-1).cpu(), known[name]) for name, key in keys.items()}
        for layer, calls in layers.items():
            for decision in calls:
                tallies.setdefault(layer, _Tally(layer)).add(decision, values, sequence_length)
    if not tallies:
        raise ValueError("the model has no layer with experts, or there is no batch")
    document: dict[str, Any] = {
        "layers": {
            layer: {**tally.figures(minimum), **_similarity(model.get_submodule(layer))}
            for layer, tally in tallies.items()
        }
    }
    if earlier is not None:
        document["agreement"] = _agreement(model, earlier, kept, run)
        document["agreement_over"] = "checkpoint"
    return document


class _Tally:
    """What a layer decided so far."""

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self.counts: dict[str, Tensor] = {}
        self.places: Tensor | float = 0.0  # [2, S]
        self.together: Tensor | float = 0.0  # [E, E]

    def add(self, decision: Decision, values: Mapping[str, Tensor], sequence_length: int) -> None:
        """Add a decision on tokens with these keys."""
        add_counts(self.counts, decision, values, self.layer)
        self.places = self.places + asked_and_dropped(decision, sequence_length)
        if isinstance(decision, Routing) and decision.num_experts <= SQUARE and not is_soft(decision):
            self.together = self.together + met_together(decision)

    def figures(self, minimum: float) -> dict[str, Any]:
        """The layer's part of the document, but for its weights."""
        found: dict[str, Any] = {"keys": {name: _decided(table, minimum) for name, table in self.counts.items()}}
        asked, dropped = torch.as_tensor(self.places)
        if float(dropped.max()) > 0:
            found["drops"] = _rounded(dropped / asked.clamp(min=1))
        together = torch.as_tensor(self.together)
        if together.dim() and float((together - together.diag().diag()).max()) > 0:
            found["co_activation"] = _rounded(shared(together))
        return found


def _decided(counts: Tensor, minimum: float) -> dict[str, float]:
    std = decision_std(counts, minimum)
    seen = {"std": float(std.mean()), "chance": float(chance_std(counts, minimum).mean())} if len(std) else {}
    return {"explained": explained(counts, minimum), **seen, "values": int((counts.sum(1) >= minimum).sum())}


def _renumbered(values: Tensor, known: dict[int, int]) -> Tensor:
    """Values by the order in which they were first seen, negative ones -1: of a large vocabulary a text uses little."""
    unique, where = values.unique(return_inverse=True)
    numbers = [known.setdefault(value, len(known)) if value >= 0 else -1 for value in unique.tolist()]
    return torch.tensor(numbers, dtype=torch.long)[where]


def _similarity(layer: nn.Module) -> dict[str, Any]:
    """Cosines of a layer's experts; nothing where their weights are not stacked."""
    try:
        experts: Any = layer.experts
        few = all(len(parameter) <= SQUARE for parameter in experts.parameters() if parameter.dim())
        return {"similarity": _rounded(expert_similarity(experts))} if few else {}
    except (AttributeError, ValueError):
        return {}


def _agreement(model: nn.Module, earlier: Iterable[Mapping[str, Any]], batches: list[Any], run: Any) -> dict[str, Any]:
    """Overlap of every checkpoint with the model as it is, which comes last, numbered from 1."""
    states = ((str(number), state) for number, state in enumerate(chain(earlier, [model.state_dict()]), 1))
    found = routing_over_training(model, states, batches, run)
    return {
        layer: [[int(number), round(each, 5)] for number, each in overlaps.items()] for layer, overlaps in found.items()
    }


def _rounded(values: Tensor) -> Any:
    return torch.round(values.double(), decimals=5).tolist()
