"""Experts and gates that were grown: old rows frozen for good, new ones trained (Lifelong-MoE, 2305.12281).

A stacked parameter is one tensor, of which no optimizer leaves a part alone: weight decay and momentum move rows whose
gradient is zero. So old and new rows are two parameters, of which the old one asks for no gradient, and has no state.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from .experts import Experts
from .routing import Routing

FROZEN, NEW = "frozen_", "new_"


class GrownExperts(nn.Module):
    """E experts of which some are frozen: `old`, without gradients or optimizer state, beside the trained `new`.

    is_new says which are which, in order. Each stack is computed by its own kernels on its part of a routing. A state
    dict has both; one with whole stacks under the names of `Experts`, as `joined_state` gives it, is loaded too. Raises
    ValueError where the parts do not belong together.
    """

    def __init__(self, old: Experts, new: Experts, is_new: Sequence[bool]) -> None:
        super().__init__()
        if (old.dim, old.hidden_dim, old.activation) != (new.dim, new.hidden_dim, new.activation):
            raise ValueError(f"GrownExperts: old and new experts differ: {old} and {new}")
        if (len(is_new) - sum(is_new), sum(is_new)) != (old.num_experts, new.num_experts):
            raise ValueError(
                f"GrownExperts: {sum(is_new)} of {len(is_new)} experts are new, expected {new.num_experts} "
                f"of {old.num_experts + new.num_experts}"
            )
        self.num_experts, self.dim, self.hidden_dim = len(is_new), old.dim, old.hidden_dim
        self.activation, self.is_new = old.activation, tuple(is_new)
        self.old, self.new = old.requires_grad_(False), new
        self.register_load_state_dict_pre_hook(_split_experts)

    def __getattr__(self, name: str) -> Any:
        # A copy of all experts under the names of `Experts`: transformers asks for their shapes when it saves.
        parts = self.__dict__.get("_modules", {})
        if "new" in parts and parts["old"]._parameters.get(name) is not None:
            whole = woven(getattr(self.old, name), getattr(self.new, name), self.is_new)
            return nn.Parameter(whole.detach(), requires_grad=False)
        return super().__getattr__(name)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Weighted sum [T, D] of what each token's experts make of tokens x [T, D]."""
        bounds = routing.offsets.tolist()
        return self.old(x, self._part(routing, bounds, False)) + self.new(x, self._part(routing, bounds, True))

    def _part(self, routing: Routing, bounds: list[int], new: bool) -> Routing:
        """The assignments to the old experts, or to the new ones."""
        mine = [(start, end) for start, end, kind in runs(self.is_new) if kind == new]
        counts = torch.cat([routing.counts[start:end] for start, end in mine])
        ends = counts.cumsum(0, dtype=routing.offsets.dtype)
        spans = [slice(bounds[start], bounds[end]) for start, end in mine]
        token, weight = (torch.cat([t[span] for span in spans]) for t in (routing.token_index, routing.weight))
        return Routing(token, torch.cat([ends.new_zeros(1), ends]), weight, routing.num_tokens)

    @torch.no_grad()
    def whole(self) -> Experts:
        """All experts in one stack, trained if the new ones are."""
        experts = empty_like(self.old, self.num_experts)
        for name, parameter in experts.named_parameters():
            parameter.copy_(woven(getattr(self.old, name), getattr(self.new, name), self.is_new))
        return experts.requires_grad_(self.new.down_proj.requires_grad).train(self.training)

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{self.num_experts}, of which {self.new.num_experts} are new"


def no_stack(name: str, experts: nn.Module) -> str:
    """What to say of a layer whose experts are no stack of MLPs."""
    told = f"{name} has {type(experts).__name__}; expected Experts, stacked MLPs"
    if isinstance(experts, GrownExperts):
        told += "; zoo.save_pretrained writes a grown model whole, and zoo.from_pretrained reads it as one stack"
    return told


def freeze_rows(router: nn.Module, name: str, is_new: Sequence[bool]) -> None:
    """Train only those rows of a gate's parameter [E, ...] that are new; the others are a parameter without gradients.

    The gate is of a class of its own then, where the parameter is made of both whenever it is read. A state dict has
    both, and one with the whole parameter is loaded too.
    """
    value: Tensor = getattr(router, name)
    names = getattr(router, "frozen_names", ())
    delattr(router, name)
    kind = type(router) if not names else type(router).__bases__[0]
    router.__class__ = _with_frozen(kind, (*names, name))
    router._is_new = tuple(is_new)  # type: ignore[assignment]
    frozen, new = (rows(value.detach(), is_new, kind).clone() for kind in (False, True))
    router.register_parameter(FROZEN + name, nn.Parameter(frozen, requires_grad=False))
    router.register_parameter(NEW + name, nn.Parameter(new, value.requires_grad))
    if not names:
        router.register_load_state_dict_pre_hook(_split_gate)


def thaw_rows(router: nn.Module) -> None:
    """Undo `freeze_rows`: each parameter is one tensor again, trained if its new rows were."""
    names = getattr(router, "frozen_names", ())
    values = {name: (getattr(router, name).detach(), getattr(router, NEW + name).requires_grad) for name in names}
    if names:
        router.__class__ = type(router).__bases__[0]
    for name, (value, asks) in values.items():
        delattr(router, FROZEN + name)
        delattr(router, NEW + name)
        router.register_parameter(name, nn.Parameter(value, asks))


@functools.cache
def _with_frozen(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A class of gates whose parameters of these names are made of frozen and new rows."""

    def made(name: str) -> property:
        return property(lambda self: woven(getattr(self, FROZEN + name), getattr(self, NEW + name), self._is_new))

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _blank, (kind, names), self.__dict__.copy()  # by name pickle would not find the class

    body = {"frozen_names": names, "__reduce_ex__": reduce, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {**body, **{name: made(name) for name in names}})


def _blank(kind: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    found = _with_frozen(kind, names)  # type: ignore[arg-type]
    return found.__new__(found)


def runs(is_new: Sequence[bool]) -> Iterator[tuple[int, int, bool]]:
    """Start, end and kind of each run of rows that are all new or all old."""
    start = 0
    for kind, group in groupby(is_new):
        end = start + len(list(group))
        yield start, end, kind
        start = end


def rows(value: Tensor, is_new: Sequence[bool], new: bool) -> Tensor:
    """The new rows of all, or the old ones, as a tensor of their own."""
    return torch.cat([value[start:end] for start, end, kind in runs(is_new) if kind == new])


def woven(old: Tensor, new: Tensor, is_new: Sequence[bool]) -> Tensor:
    """All rows in order, from the old and the new ones."""
    sources, pieces = [old, new], []
    for start, end, kind in runs(is_new):
        pieces.append(sources[kind][: end - start])
        sources[kind] = sources[kind][end - start :]
    return torch.cat(pieces)


def empty_like(experts: Experts, num_experts: int) -> Experts:
    """So many experts of the same kind, dtype and device, their weights unset."""
    with torch.device("meta"):
        sizes = (num_experts, experts.dim, experts.hidden_dim)
        options: dict[str, Any] = {"dropout": experts.dropout, "weigh_input": experts.weigh_input}
        made = Experts(*sizes, experts.activation, experts.b_in is not None, experts.backend, **options)
    return made.to(experts.down_proj.dtype).to_empty(device=experts.down_proj.device)


def joined_state(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A model's tensors by name, or those of `state`, with the parts of grown experts and gates put together."""
    found = dict(model.state_dict() if state is None else state)
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, GrownExperts):
            for name, _parameter in module.old.named_parameters():
                _join(found, prefix + name, f"{prefix}old.{name}", f"{prefix}new.{name}", module.is_new)
        for name in getattr(module, "frozen_names", ()):
            _join(found, prefix + name, prefix + FROZEN + name, prefix + NEW + name, module._is_new)
    return found


def _join(state: dict[str, Tensor], whole: str, old: str, new: str, is_new: Sequence[bool]) -> None:
    if old in state and new in state:
        state[whole] = woven(state.pop(old), state.pop(new), is_new)


def _split_experts(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, _parameter in module.old.named_parameters():
        _split(state, f"{prefix}{name}", f"{prefix}old.{name}", f"{prefix}new.{name}", module.is_new)


def _split_gate(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in getattr(module, "frozen_names", ()):
        _split(state, prefix + name, prefix + FROZEN + name, prefix + NEW + name, module._is_new)


def _split(state: dict[str, Any], whole: str, old: str, new: str, is_new: Sequence[bool]) -> None:
    if whole in state:
        value = state.pop(whole)
        if len(value) != len(is_new):
            state[old] = state[new] = value  # refused by name when they are loaded
            return
        state[old], state[new] = rows(value, is_new, False), rows(value, is_new, True)
