"""From what a user or a YAML file says about a gate to something that makes one for each layer."""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .moe import Router, routers
from .moe.capacity import as_capacity
from .nearest import unknown


def gate_factory(
    spec: Any,
    dim: int,
    num_experts: int,
    k: int | None = None,
    defaults: Mapping[str, Any] | None = None,
    **given: Any,
) -> Callable[[], Router]:
    """A function that makes a new gate each time; `k` and `defaults` are for gates that have such arguments.

    A gate of one's own has those too that its class, by **options, hands to the class it derives from. What spec says
    goes first, then what is given, then the defaults.

    Raises ValueError naming the nearest classes for an unknown one and the nearest arguments for an unknown argument,
    and TypeError for a spec that is no description of a gate.
    """
    make, arguments = parse_gate(spec)
    label = getattr(make, "__name__", type(make).__name__)
    signature = inspect.signature(make)
    if isinstance(make, functools.partial):
        arguments = {**make.keywords, **arguments}
    if isinstance(arguments.get("capacity", given.get("capacity")), Mapping):
        arguments["capacity"] = as_capacity(arguments.get("capacity", given.get("capacity")))
    accepted = {name for name, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD}
    anything = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    optional = {**(defaults or {}), **({} if k is None else {"k": k})}
    if anything and getattr(make, "func", make) not in vars(routers).values():
        said = {"dim": dim, "num_experts": num_experts, **given, **arguments}
        unsaid = optional.keys() - said.keys() - accepted
        accepted |= {name for name in unsaid if _hands_on(make, said, name, optional[name])}
    arguments = {**{name: v for name, v in optional.items() if name in accepted}, **given, **arguments}
    for name in arguments:
        if name not in accepted and not anything:
            raise unknown(f"argument of {label}", name, accepted - {"dim", "num_experts"})

    def gate() -> Router:
        made = make(**{"dim": dim, "num_experts": num_experts, **arguments})
        if not isinstance(made, Router):
            raise TypeError(f"router: {label} made a {type(made).__name__}, expected a zoo.moe.Router")
        return made

    return gate


def _hands_on(make: Callable[..., Any], arguments: Mapping[str, Any], name: str, value: Any) -> bool:
    """Whether a class with **options hands one to the class it derives from; a gate made without memory shows it."""
    try:
        with torch.random.fork_rng([]), torch.device("meta"):
            return getattr(make(**{name: value}, **arguments), name, None) == value
    except Exception:  # a class of a user's own that fixes it, or cannot be made so
        return False


def layer_gates(specs: Sequence[Any], dim: int, num_experts: int, **given: Any) -> Callable[[], Router]:
    """A function that makes the gates of a model's MoE layers in order; the last of specs goes on for all the rest.

    Other arguments are those of `gate_factory`; what is given goes to the gates that have such an argument, and raises
    ValueError where none has.
    """
    makers, used = [], set()
    for spec in specs:
        parameters = inspect.signature(parse_gate(spec)[0]).parameters
        anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        takes = {n: v for n, v in given.items() if anything or n in ("k", "defaults") or n in parameters}
        used |= set(takes)
        makers.append(gate_factory(spec, dim, num_experts, **takes))
    if not makers:
        raise ValueError("router: expected at least one gate, got an empty list")
    for name in given:
        if name not in used:
            raise ValueError(f"{name}: none of the gates in router has such an argument")
    order = itertools.chain(makers, itertools.repeat(makers[-1]))
    return lambda: next(order)()


def parse_gate(spec: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What makes the gate that `spec` describes, and the arguments it names; raises as `gate_factory`."""
    if isinstance(spec, Router):
        raise TypeError(
            "router: got one gate, but every layer needs its own; give its class, or a function that makes one"
        )
    known = {n: c for n, c in vars(routers).items() if inspect.isclass(c) and issubclass(c, Router) and c is not Router}
    return parse_spec(spec, "router", known, "zoo.moe.routers")


def parse_spec(spec: Any, what: str, known: Mapping[str, Any], home: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What makes the thing that `spec` describes, and the arguments it names.

    spec: a name among `known`, which live in the module `home`; the full path of a class of one's own; either as
    {"name": ..., arguments} or {"class_path": ..., "init_args": {...}}; a class or function itself. `what` it is goes
    into messages. Raises ValueError naming the nearest for an unknown name, and TypeError for what is no description.
    """
    if isinstance(spec, str):
        return _named(spec, what, known, home), {}
    if isinstance(spec, Mapping):
        rest = dict(spec)
        if "class_path" in rest:
            path, arguments = rest.pop("class_path"), dict(rest.pop("init_args", None) or {})
            if rest:
                raise unknown("key beside class_path", next(iter(rest)), ("class_path", "init_args"))
            return _named(path, what, known, home), arguments
        if "name" in rest:
            return _named(rest.pop("name"), what, known, home), rest
    if callable(spec):
        return spec, {}
    raise TypeError(
        f'{what}: expected a class, a function, a name, {{"name": ..., arguments}} or '
        f'{{"class_path": ..., "init_args": ...}}; got {spec!r}'
    )


def _named(name: str, what: str, known: Mapping[str, Any], home: str) -> Callable[..., Any]:
    module, _, short = name.rpartition(".")
    if module in ("", home):
        if short not in known:
            raise unknown(what, short, known)
        return known[short]
    try:
        return getattr(importlib.import_module(module), short)
    except (ImportError, AttributeError) as error:
        # A name of one's own is near to none of ours; what is wrong with its module says only its import.
        message, _, near = str(unknown(what, name, [*known, *(f"{home}.{n}" for n in known)])).partition("; ")
        hint = f"; {near}" if near.startswith("did you mean") else ""
        raise ValueError(f"{message}: {error}{hint}") from error
