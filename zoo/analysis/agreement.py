"""How much of the routing stays as training goes on: OpenMoE's early routing learning (2402.01739, section 4.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..moe import Decision, Routing
from .walk import decisions, is_soft


def overlap(first: Decision, second: Decision) -> float:
    """Share of the assignments that two decisions on the same tokens have in common, 1 when they are the same.

    |A and B| / max(|A|, |B|), summed over tokens: with one expert a token, how many tokens go to the same one. Experts
    are compared by number, so both must be of one model. Raises ValueError for other tokens or experts, and where a
    gate sends nothing anywhere.
    """
    a, b = _sent(first), _sent(second)
    if a.shape != b.shape:
        raise ValueError(f"overlap: decisions on {list(a.shape)} and {list(b.shape)} tokens and experts")
    most = torch.maximum(a.sum(1), b.sum(1)).sum()
    return float((a & b).sum() / most) if most else 1.0


def share_agreement(first: Tensor, second: Tensor, minimum: float = 20) -> float:
    """How alike two tables of counts [V, E] treat their keys: 1 minus the total variation distance of a key's shares.

    Averaged over keys with at least `minimum` assignments in both, weighted by these. 1: the shares are the same.
    OpenMoE shows curves and no index; this is one.
    """
    rows = min(len(first), len(second))
    first, second = first[:rows], second[:rows]
    seen = (first.sum(1) >= minimum) & (second.sum(1) >= minimum)
    a, b = first[seen], second[seen]
    weight = a.sum(1) + b.sum(1)
    distance = (a / a.sum(1, keepdim=True) - b / b.sum(1, keepdim=True)).abs().sum(1) / 2
    return float(1 - (weight * distance).sum() / weight.sum()) if len(weight) else 1.0


def routing_over_training(
    model: nn.Module,
    states: Mapping[str, Mapping[str, Any]] | Iterable[tuple[str, Mapping[str, Any]]],
    batches: Iterable[Any],
    run: Callable[[Any], object] | None = None,
) -> dict[str, dict[str, float]]:
    """Overlap of the routing at each checkpoint with that at the last: {layer: {checkpoint: overlap}}.

    states are state dicts by name, in the order of training, or pairs of these, of which one at a time is then in
    memory; `model.state_dict()` may be one of them, and the model gets its own weights back. Batches are kept, as all
    checkpoints see the same. A layer whose gate sends every token to all experts is left out. Raises RuntimeError for a
    state dict of another model.
    """
    batches = list(batches)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    # What state_dict gives are views of the weights, which the other checkpoints overwrite.
    live = {name: value.data_ptr() for name, value in model.state_dict().items()}
    seen: dict[str, dict[str, list[Decision]]] = {}
    last: dict[str, list[Decision]] = {}
    try:
        for checkpoint, state in states.items() if isinstance(states, Mapping) else states:
            model.load_state_dict(
                {name: own[name] if live.get(name) == value.data_ptr() else value for name, value in state.items()}
            )
            last = seen[checkpoint] = {}
            for _, layers in decisions(model, batches, run):
                for layer, calls in layers.items():
                    last.setdefault(layer, []).extend(call for call in calls if isinstance(call, Routing))
    finally:
        model.load_state_dict(own)
    return {
        layer: {
            checkpoint: sum(overlap(a, b) for a, b in zip(found[layer], calls)) / len(calls)
            for checkpoint, found in seen.items()
        }
        for layer, calls in last.items()
        if not all(is_soft(call) for found in seen.values() for call in found[layer])
    }


def _sent(decision: Decision) -> Tensor:
    """Where each token goes, [T, E] bool."""
    if not isinstance(decision, Routing):
        raise ValueError(f"{type(decision).__name__} sends every token to all experts: there is nothing to compare")
    sent = torch.zeros(decision.num_tokens, decision.num_experts, dtype=torch.bool)
    sent[decision.token_index.cpu(), decision.expert_index.cpu()] = True
    return sent
