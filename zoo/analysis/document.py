"""All that this package says of a model, as plain numbers for a report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .conditional import Key, chance_std, decision_std, drop_by_position, expert_counts, explained
from .experts import co_activation, expert_similarity


def analyse(
    model: nn.Module,
    batches: Iterable[Any],
    keys: Mapping[str, Key],
    sequence_length: int,
    run: Callable[[Any], object] | None = None,
    minimum: float = 20,
) -> dict[str, Any]:
    """What the experts of every layer do on batches of sequences of one length, to be written as JSON.

    {"layers": {layer: figures}}: `keys` {name: {"explained", "std", "chance", "values"}}, how far a token's key decides
    its experts (see `explained`, `decision_std` and `chance_std`, their means over the keys with `minimum`
    assignments); `drops` [S], the dropped share at each position, where something was; `co_activation` [E, E] of gates
    that choose, where a token meets several; `similarity` [E, E] of experts with stacked weights. The batches are kept.
    Raises ValueError for a model without MoE layers.
    """
    batches = list(batches)
    counts = expert_counts(model, batches, keys, run)
    if not counts:
        raise ValueError("the model has no layer with experts, or the batches hold no token")
    drops = drop_by_position(model, batches, sequence_length, run)
    found = {}
    for layer, tables in counts.items():
        figures: dict[str, Any] = {"keys": {name: _figures(table, minimum) for name, table in tables.items()}}
        if float(drops[layer].max()) > 0:
            figures["drops"] = _rounded(drops[layer])
        if (alike := _similarity(model.get_submodule(layer))) is not None:
            figures["similarity"] = _rounded(alike)
        found[layer] = figures
    for layer, together in _co_activation(model, batches, run).items():
        if float((together - together.diag().diag()).max()) > 0:
            found[layer]["co_activation"] = _rounded(together)
    return {"layers": found}


def _figures(counts: Tensor, minimum: float) -> dict[str, float]:
    std = decision_std(counts, minimum)
    seen = {"std": float(std.mean()), "chance": float(chance_std(counts, minimum).mean())} if len(std) else {}
    return {"explained": explained(counts, minimum), **seen, "values": int((counts.sum(1) >= minimum).sum())}


def _similarity(layer: nn.Module) -> Tensor | None:
    """Cosines of a layer's experts, or None where their weights are not stacked."""
    try:
        return expert_similarity(layer.experts)  # type: ignore[arg-type]
    except (AttributeError, ValueError):
        return None


def _co_activation(model: nn.Module, batches: list[Any], run: Any) -> dict[str, Tensor]:
    """Of the layers whose gates choose; none where one of them is soft."""
    try:
        return co_activation(model, batches, run)
    except ValueError:
        return {}


def _rounded(values: Tensor) -> Any:
    return torch.round(values.double(), decimals=5).tolist()
