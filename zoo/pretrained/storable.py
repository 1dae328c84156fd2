"""Arguments of a model as JSON holds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from ..moe import Capacity, Router, routers


def storable(value: Any, name: str) -> Any:
    """An argument of a model as JSON holds it: a gate's class by its name, a capacity as its arguments."""
    if isinstance(value, Capacity):
        arguments, made = dataclasses.asdict(value), type(value)
        if made is Capacity:
            return arguments
        return {"class_path": f"{made.__module__}.{made.__qualname__}", "init_args": arguments}
    if isinstance(value, Mapping):
        return {key: storable(inner, f"{name}.{key}") for key, inner in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [storable(inner, name) for inner in value]
    if isinstance(value, type) and issubclass(value, Router):
        ours = vars(routers).get(value.__name__) is value
        return value.__name__ if ours else f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise ValueError(
        f"save_pretrained: the argument {name}={value!r} cannot be stored; give it by name or as a mapping"
    )
