"""Running a model over batches and reading what its layers decided."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..moe import Decision, Routing, record


def decisions(
    model: nn.Module, batches: Iterable[Any], run: Callable[[Any], object] | None = None
) -> Iterator[tuple[Any, dict[str, list[Decision]]]]:
    """Every batch with the decisions that each layer of `model` took on it, by layer name and in call order.

    run(batch) computes the model; model(**batch) by default. The model is in evaluation mode meanwhile.
    """
    for batch in batches:
        training = {module: module.training for module in model.modules()}
        model.eval()
        try:
            with torch.no_grad(), record(model) as step:
                _ = model(**batch) if run is None else run(batch)
        finally:
            for module, mode in training.items():
                module.training = mode
        yield batch, step.routings


def is_soft(decision: Decision) -> bool:
    """Whether every token goes to all of several experts, so that weights alone tell them apart.

    So do blends and slots, and the dense gates of MMoE, which are a `Routing`. A token that goes nowhere, as padding
    does, does not count.
    """
    if not isinstance(decision, Routing):
        return True
    met = decision.token_index.bincount(minlength=1)
    return decision.num_experts > 1 and bool(met.any()) and bool((met[met > 0] == decision.num_experts).all())
