"""How experts relate: how alike their weights are, and which of them work together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..moe import Routing
from .walk import decisions, is_soft

PART = 1 << 18  # columns of an expert's weights that are multiplied at once


@torch.no_grad()
def expert_similarity(experts: nn.Module) -> Tensor:
    """Cosine between the experts' weights, all parameters of each as one vector, [E, E] float64.

    1 right after upcycling, near 0 for experts drawn apart (Skywork-MoE 2406.06563 watches it). Two experts that
    compute the same with their neurons in another order do not look alike here. Raises ValueError for parameters that
    are not stacked, [E, ...].
    """
    parameters = list(experts.named_parameters())
    if not parameters:
        raise ValueError(f"expert_similarity: {type(experts).__name__} has no parameters")
    size = parameters[0][1].shape[:1]
    for name, value in parameters:
        if not value.dim() or value.shape[:1] != size:
            raise ValueError(f"expert_similarity: {name} has shape {list(value.shape)}, expected [{size[0]}, ...]")
    products = torch.zeros(*size, *size, dtype=torch.float64)
    for _, value in parameters:
        for part in value.flatten(1).split(PART, dim=1):  # in float64 a large layer at once would not fit
            wide = part.double().cpu()
            products += wide @ wide.T
    length = products.diag().clamp(min=1e-300).sqrt()
    return products / length / length[:, None]


def co_activation(
    model: nn.Module, batches: Iterable[Any], run: Callable[[Any], object] | None = None
) -> dict[str, Tensor]:
    """Of the tokens that met expert i the share that met expert j too, {layer: [E, E]}; 1 on the diagonal.

    Rows of experts that met no token are zero. Raises ValueError for gates that send every token to all experts.
    """
    together: dict[str, Tensor] = {}
    for _, layers in decisions(model, batches, run):
        for layer, calls in layers.items():
            for decision in calls:
                if not isinstance(decision, Routing) or is_soft(decision):
                    raise ValueError(
                        f"co_activation: {type(decision).__name__} of layer {layer!r} sends every token to all experts"
                    )
                together[layer] = together.get(layer, 0) + met_together(decision)
    return {layer: shared(counts) for layer, counts in together.items()}


def met_together(decision: Routing) -> Tensor:
    """How many tokens met both of two experts, [E, E] float64; on the diagonal those that met one."""
    met = torch.zeros(decision.num_tokens, decision.num_experts, dtype=torch.float64)
    met[decision.token_index.cpu(), decision.expert_index.cpu()] = 1
    return met.T @ met


def shared(counts: Tensor) -> Tensor:
    """Each row of `met_together` as shares of its expert's tokens, [E, E]; zero for one that met none."""
    return counts / counts.diag().clamp(min=1)[:, None]
