"""The gates of vision models: V-MoE's settings where a user does not say otherwise."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ..gates import gate_factory, parse_gate
from ..moe import Capacity, Router
from ..moe.capacity import as_capacity
from ..moe.routers import ExpertChoiceRouter, SoftRouter, TopKRouter

GROUP_IMAGES = 8
CHOICES = 2
# Training and evaluation of the released models; places in multiples of four, as in all of them.
CAPACITY = Capacity(1.05, eval_factor=4.0, multiple_of=4)
# Half of lambda = 0.01 each, a group of images at a time.
LOSSES = {name: {"weight": 0.005, "scope": "group"} for name in ("importance_vmoe", "load_vmoe")}
# Expert choice as the authors of Soft MoE run it, with the factor of sparse upcycling (2212.05055).
EXPERT_CHOICE_CAPACITY = Capacity(2.0, rounding="round")


def vision_spec(
    spec: Any,
    num_experts: int,
    *,
    tokens: int,
    k: int | None = None,
    capacity: Any = None,
    losses: Mapping[str, Any] | None = None,
    group_images: int | None = None,
    **given: Any,
) -> Any:
    """The description of a gate with all that its user left out; `tokens` is how many an image has.

    spec: any gate as `gate_factory` reads it. What the user leaves out is V-MoE's for token choice (noise 1/E, its two
    losses, capacity 1.05, or 4 in evaluation, in multiples of four, eight images a group), and near it for expert
    choice; Soft MoE has one slot an expert, and groups of one image. capacity is one, its arguments, or a factor, which
    then holds for evaluation too; it gives Soft MoE its slots. k, capacity, losses and group_images go before what spec
    says, `given` after it and only to gates that have such arguments; k is for gates that have one.
    Raises ValueError for no expert, and as `parse_gate`.
    """
    if not isinstance(num_experts, int):
        raise ValueError(f"num_experts: expected one number, got {num_experts!r}")
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    make, chosen = parse_gate(spec)
    kind = make
    if isinstance(make, functools.partial):
        kind, chosen = make.func, {**make.keywords, **chosen}
    capacity = None if capacity is None else as_capacity(capacity, multiple_of=CAPACITY.multiple_of)
    asked = {"k": k, "losses": losses, "capacity": capacity, **_groups(group_images)}
    asked = {name: value for name, value in asked.items() if value is not None}
    accepted = inspect.signature(kind).parameters
    defaults = {name: value for name, value in given.items() if name in accepted}
    if "group_sequences" in accepted and "group_size" not in chosen:
        defaults.update(_groups(1 if kind is SoftRouter else GROUP_IMAGES))
    if kind is TopKRouter:
        defaults.update(noise="fixed", noise_std=1 / num_experts, k=min(CHOICES, num_experts))
        defaults.update(losses=LOSSES, eval_losses=True, capacity=CAPACITY)
    elif kind is ExpertChoiceRouter:
        defaults.update(noise_std=1 / num_experts, capacity=EXPERT_CHOICE_CAPACITY)
    elif kind is SoftRouter and capacity is not None:
        del asked["capacity"]
        asked.update(slots=None, tokens=tokens * (group_images or 1), capacity_factor=capacity.factor)
    elif kind is SoftRouter and "tokens" not in chosen:
        defaults["slots"] = 1
    if "k" not in accepted and "k" not in chosen:
        asked.pop("k", None)  # `gate_factory` finds out whether the gate has one
    return merged(defaults, spec, asked)


def vision_gate(
    spec: Any, dim: int, num_experts: int, *, tokens: int, k: int | None = None, **options: Any
) -> Callable[[], Router]:
    """A function that makes the gate of one layer; arguments as in `vision_spec`, raises as `gate_factory`."""
    return gate_factory(vision_spec(spec, num_experts, tokens=tokens, k=k, **options), dim, num_experts, k=k)


def _groups(images: int | None) -> dict[str, Any]:
    """Arguments of a gate that make `images` images a group."""
    return {} if images is None else {"group_size": "sequence", "group_sequences": images}


def merged(defaults: dict[str, Any], spec: Any, asked: dict[str, Any]) -> Any:
    """The same description of a gate, with arguments that it leaves out, and with others for those asked for."""
    if isinstance(spec, str):
        return {"name": spec, **defaults, **asked}
    if not isinstance(spec, Mapping):
        given = spec.keywords if isinstance(spec, functools.partial) else {}
        return functools.partial(spec, **{**defaults, **given, **asked})
    if "class_path" in spec:
        return {**spec, "init_args": {**defaults, **(spec.get("init_args") or {}), **asked}}
    return {**defaults, **spec, **asked}
