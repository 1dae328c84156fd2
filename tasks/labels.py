"""Gates that go by a label, a domain, a task or a cluster: what they are told of a batch's sources."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from zoo.moe import Router
from zoo.pretrained.generating import KEY, hears

TASK = "task"  # what losses may ask for, whatever the gate


def by_label(model: nn.Module) -> Iterator[Router]:
    """The gates of a model that are told where tokens go."""
    for module in model.modules():
        if isinstance(module, Router) and module.label:
            yield module


def told(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The argument that tells a model's gates the sources [B] of a batch, under each name that one of them asks for."""
    if "source" not in batch or not hears(model):
        return {}
    return {KEY: dict.fromkeys({TASK, *(router.label for router in by_label(model))}, batch["source"])}


def check(model: nn.Module, data: Any) -> None:
    """Raise ValueError where a model's gates go by a label and the data have none, or more than a gate knows."""
    for router in by_label(model):
        what = f"{type(router).__name__} goes by a label, {router.label!r}"
        names = getattr(data, "names", None)
        if names is None:
            raise ValueError(
                f"{what}, and {type(data).__name__} has none; train in Python, calling the model with moe_context"
            )
        if not names:
            raise ValueError(f"{what}: give data.source by name, {{NAME: ..., ...}}, each name a label")
        if len(names) > router.num_labels:
            raise ValueError(f"{what}, of which it knows {router.num_labels}; data.source has {len(names)}")


def check_sources(names: Sequence[str], state: Mapping[str, Any]) -> None:
    """Raise ValueError where the sources of a checkpoint's data had other numbers than these."""
    if names and state.get("sources", names) not in (list(names), []):
        raise ValueError(
            f"the checkpoint was trained on the sources {state['sources']}, in this order, got {list(names)}"
        )
