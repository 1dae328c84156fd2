"""Models whose experts stay on the host or in files, and come to the device when tokens meet them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..moe import Experts, MoE, OffloadedExperts, QuantisedExperts
from ..moe.expert_sources import OnHost, tensors_of
from ..moe.experts import check_sizes
from ..moe.routers import TopKRouter
from ..pretrained.adopt import materialize
from ..pretrained.sharded import fill, views
from ..pretrained.tensorfile import Entry
from .expert_files import parted
from .quantising import stacks_of, together


def offload(model: nn.Module, slots: int, device: torch.device | str | None = None, ahead: bool = True) -> nn.Module:
    """A copy of a model on a device that has memory for `slots` experts of each layer (`zoo.moe.OffloadedExperts`).

    The experts stay where the given model has them, usually the host's memory, in numbers of few bits too
    (`zoo.quantise`), and copy when tokens meet them; those met last stay. All else is copied to `device`, by default
    where the model is. With `ahead` each layer lets those come that the next layer's gate would choose for its tokens
    (Mixtral offloading, arXiv 2312.17238), where that is a `TopKRouter`. Experts are frozen and without dropout from
    then on, and must not be changed in the given model. `zoo.from_pretrained(folder, offload=slots)` leaves experts in
    their files, which must not be changed either.

    Raises ValueError for fewer slots than one, a model without experts, experts spread over processes or merged by
    their gate, naming the layer.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    stacks = stacks_of(model, "offload", (Experts, QuantisedExperts))
    memo: dict[int, Any] = {}
    for name, experts in stacks.items():
        whole = together(experts)
        held = _slots(name, whole, slots)
        source = OnHost(whole, lock=device is not None and torch.device(device).type == "cuda")
        memo[id(experts)] = OffloadedExperts(held, experts.num_experts, source).train(experts.training)
    found = copy.deepcopy(model, memo)
    if device is not None:
        found = found.to(device)
    if ahead:
        look_ahead(found)
    return found


def read(
    model: Any,
    targets: Mapping[str, Tensor],
    entries: Mapping[str, Entry],
    slots: int,
    format: str | None = None,
    device: Any = None,
) -> None:
    """Give a model without memory some, and fill it from files, in which its experts stay; they are read when met.

    targets: the view into the model's state that each of the entries of that name fills. format: None, or that of
    `zoo.quantise` in which experts come: as the files have them, or rounded each time they come. Raises as `offload`.
    """
    where = views(model, targets)
    stacks = stacks_of(model, "offload")
    rest, files = parted(where, entries, stacks)
    for name, experts in stacks.items():
        held = _slots(name, experts, slots, format)
        model.set_submodule(name, OffloadedExperts(held, experts.num_experts, files[name]))
    materialize(model, torch.device(device or torch.get_default_device()), initialize=False)
    fill(model, rest, entries)
    look_ahead(model)


def look_ahead(model: nn.Module) -> None:
    """Let each layer's offloaded experts come while the layer before is computed, as the gate guesses by its tokens."""
    layers = [(m.router, m.experts) for m in model.modules() if isinstance(m, MoE)]
    for (_, before), (router, after) in pairwise(layers):
        if not isinstance(before, OffloadedExperts) or not isinstance(after, OffloadedExperts) or after is before:
            continue
        if type(router) is TopKRouter and router.dim == before.dim:
            before.follow(router, after)


def _slots(name: str, experts: Experts | QuantisedExperts, slots: int, format: str | None = None) -> Any:
    """Experts of the same kind, without memory, for as many as there are slots."""
    check_sizes(f"offload: {name}", slots=slots)
    if experts.parallel is not None:
        raise ValueError(f"offload: {name}: experts that are spread over processes cannot be offloaded")
    bias = experts.b_in is not None
    if isinstance(experts, QuantisedExperts):
        format = experts.format
    sizes = (min(slots, experts.num_experts), experts.dim, experts.hidden_dim, experts.activation, bias)
    given: dict[str, Any] = {"backend": experts.backend, "weigh_input": experts.weigh_input}
    with torch.device("meta"):
        held: Any = Experts(*sizes, **given) if format is None else QuantisedExperts(*sizes, format, **given)
    like = tensors_of(experts)
    with torch.no_grad():
        for own, tensor in tensors_of(held).items():
            if own in like:
                tensor.data = tensor.data.to(like[own].dtype)
    return held if next(iter(like.values())).is_meta else held.to_empty(device=next(iter(like.values())).device)
