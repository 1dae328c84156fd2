"""From what a user or a YAML file says about experts, attention or depth to something that makes the layer.

As `zoo.gates` for gates: a name with arguments, a class path, a class or a function. What a model knows of its own
sizes is filled in where the layer has such an argument and nothing is said.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .gates import gate_factory, parse_spec
from .moe import (
    DepthRouter,
    Experts,
    HyperExperts,
    LatentExperts,
    MoA,
    MoH,
    NeuronExperts,
    ResidualExperts,
    SwitchHead,
    ZeroComputationExperts,
)
from .nearest import unknown
from .pretrained.placement import moe_layers

EXPERTS: dict[str, type[nn.Module]] = {
    c.__name__: c
    for c in (Experts, HyperExperts, LatentExperts, NeuronExperts, ResidualExperts, ZeroComputationExperts)
}
ATTENTION: dict[str, type[nn.Module]] = {c.__name__: c for c in (MoA, MoH, SwitchHead)}
LAYERS = "layers"


def experts_factory(
    spec: Any, num_experts: int, dim: int, hidden_dim: int, activation: str, **given: Any
) -> Callable[[], Any]:
    """A function that makes the experts of a layer: those of `EXPERTS`, or of one's own with num_experts and dim.

    given, such as bias, backend and dropout, goes to experts that have such an argument. `NeuronExperts`, one hidden
    unit each, keep their own activation; `HyperExperts` share their hypernetwork.
    Raises ValueError for an unknown name or argument, TypeError for what is no description.
    """
    make, arguments = parse_spec(spec, "experts", EXPERTS, "zoo.moe")
    sizes = {"num_experts": num_experts, "dim": dim, "hidden_dim": hidden_dim, "activation": activation, **given}
    if make is NeuronExperts:
        del sizes["activation"]
    factory = _factory(make, arguments, sizes)
    return _sharing(factory) if make is HyperExperts and "hypernetwork" not in arguments else factory


def _sharing(factory: Callable[[], Any]) -> Callable[[], Any]:
    """One hypernetwork for all layers, the first one's."""
    first: list[Any] = []

    def make() -> Any:
        made = factory()
        if first:
            made.hypernetwork = first[0]
        first[:] = [made.hypernetwork]
        return made

    return make


def attention_factory(
    spec: Any, depth: int, dim: int, num_heads: int, head_dim: int, **given: Any
) -> tuple[tuple[int, ...], Callable[[], Any]]:
    """Which of `depth` blocks have attention of another kind, and a function that makes it: one of `ATTENTION`.

    `layers` in spec are those of `zoo.pretrained.placement.moe_layers`, "all" if not said. `MoA` takes its gate as
    `router`, any as `zoo.gates.gate_factory` reads it, over num_experts experts of num_heads heads, one if not said.
    Raises as `experts_factory`.
    """
    layers, spec = _placed(spec, depth)
    make, arguments = parse_spec(spec, "attention", ATTENTION, "zoo.moe")
    sizes = {"dim": dim, "num_heads": num_heads, "head_dim": head_dim, **given}
    if make is MoA:
        experts = arguments.pop("num_experts", None)
        if experts is None or "router" not in arguments:
            raise ValueError(f"attention: MoA needs num_experts and router, got {sorted(arguments)}")
        gate = gate_factory(arguments.pop("router"), dim, experts)
        inner = _factory(lambda **options: MoA(gate(), **options), arguments, {**sizes, "num_heads": 1}, like=MoA)
        return layers, inner
    return layers, _factory(make, arguments, sizes)


def depth_factory(spec: Any, depth: int, dim: int) -> tuple[tuple[int, ...], Callable[[], DepthRouter]]:
    """Which of `depth` blocks only some tokens go through, and a function that makes the router that chooses them.

    spec: the arguments of `DepthRouter`, and `layers` as in `attention_factory`, the paper's "every-2" if not said.
    Raises ValueError for an unknown argument, TypeError for what is no mapping.
    """
    if not isinstance(spec, Mapping):
        raise TypeError(
            f'mixture_of_depths: expected the arguments of DepthRouter, such as {{"capacity": 0.125}}, got {spec!r}'
        )
    layers, arguments = _placed(spec, depth, "every-2")
    return layers, _factory(DepthRouter, arguments, {"dim": dim})


def shortcut_layers(spec: Any, depth: int) -> tuple[tuple[int, ...], int | None]:
    """Which of `depth` blocks add over a shortcut what experts make of the block before (`ShortcutMoE`), and the width.

    spec: True, or {"layers": as in `attention_factory`, "every-2" if not said, "hidden_dim": of the dense MLPs of both
    blocks, None for what the model has}. Raises ValueError for an unknown argument and where a block would have both
    ends of a shortcut or the first none, TypeError for what is no mapping.
    """
    if not isinstance(spec, Mapping) and spec is not True:
        raise TypeError(f'shortcut: expected True or a mapping such as {{"layers": "every-2"}}, got {spec!r}')
    layers, arguments = _placed({} if spec is True else spec, depth, "every-2")
    for name in arguments:
        if name != "hidden_dim":
            raise unknown("argument of shortcut", name, {"layers", "hidden_dim"})
    if wrong := [i for i in layers if i == 0 or i - 1 in layers]:
        raise ValueError(
            f"shortcut: layers {wrong} of {list(layers)} need a layer before them that is not at the end of a shortcut"
        )
    hidden = arguments.get("hidden_dim")
    if hidden is not None and (not isinstance(hidden, int) or hidden < 1):
        raise ValueError(f"shortcut: hidden_dim must be a width of at least 1, got {hidden!r}")
    return layers, hidden


def _placed(spec: Any, depth: int, default: str = "all") -> tuple[tuple[int, ...], Any]:
    if not isinstance(spec, Mapping):
        return moe_layers(default, depth), spec
    rest = dict(spec)
    return moe_layers(rest.pop(LAYERS, default), depth), rest


def _handed_on(make: type, filled: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a class with **options, and what else is known and taken by the class that it hands them on to."""

    def fits(more: dict[str, Any]) -> bool:
        try:
            with torch.random.fork_rng([]), torch.device("meta"):
                make(**filled, **more)
        except Exception:  # a class of a user's own that fixes some of them
            return False
        return True

    makers = (vars(kind)["__init__"] for kind in make.__mro__[1:-1] if "__init__" in vars(kind))
    above = {name for maker in makers for name in inspect.signature(maker).parameters}
    more = {name: value for name, value in given.items() if name in above and name not in filled}
    if more and not fits(more):
        more = {name: value for name, value in more.items() if fits({name: value})}
    return {**more, **filled}


def _factory(
    make: Callable[..., Any], arguments: dict[str, Any], given: dict[str, Any], like: Callable[..., Any] | None = None
) -> Callable[[], Any]:
    """A function that calls `make` with what is said, and what else is known where it has such an argument."""
    signature = inspect.signature(like or make).parameters
    accepted = {name for name, p in signature.items() if p.kind is not p.VAR_KEYWORD}
    label = getattr(like or make, "__name__", type(make).__name__)
    if len(accepted) == len(signature):
        for name in arguments:
            if name not in accepted:
                raise unknown(f"argument of {label}", name, accepted - {"dim"})
    filled = {**{name: value for name, value in given.items() if name in accepted}, **arguments}
    if inspect.isclass(make) and len(accepted) < len(signature):
        filled = _handed_on(make, filled, given)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [n for n, p in signature.items() if p.kind in named and p.default is p.empty and n not in filled]
    if needed and like is None:
        raise ValueError(f"{label} needs {' and '.join(needed)}")
    return lambda: make(**filled)
