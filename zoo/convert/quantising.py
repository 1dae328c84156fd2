"""Models whose experts are kept in numbers of few bits: made of others, or read so from a folder."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..moe import Experts, MoE, OffloadedExperts, QuantisedExperts
from ..moe.grown import GrownExperts
from ..pretrained.adopt import materialize
from ..pretrained.sharded import fill, views
from ..pretrained.tensorfile import Entry
from .expert_files import parted


def quantise(model: nn.Module, format: str = "float8") -> nn.Module:
    """A copy of a model with its experts, and nothing else, in numbers of few bits (`zoo.moe.QuantisedExperts`).

    format: "float8", "int8" (both half of bfloat16) or "mxfp4" (a quarter). Experts are most of a sparse model, and
    stand rounding better than what all tokens pass (MoQE 2310.02410; 2406.02500 calls it expert slimming). They are
    frozen from then on. `zoo.from_pretrained(..., quantise=format)` reads a model in this way without holding it whole;
    `zoo.save_pretrained` writes language models with a table of ours in float8 (DeepSeek-V3's FP8) and gpt-oss in
    mxfp4, of others keep the state_dict. The given model stays as it is.

    Raises ValueError for an unknown format, a model without experts, experts spread over processes or merged by their
    gate, and numbers that are not finite or that the format does not divide, naming the layer.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    memo: dict[int, Any] = {}
    made: dict[tuple[int, ...], QuantisedExperts] = {}
    for name, experts in stacks_of(model, "quantise").items():
        # Layers that share weights go on doing so.
        weights = tuple(id(parameter) for parameter in experts.parameters())
        if weights not in made:
            made[weights] = _checked(name, together(experts), format)
        memo[id(experts)] = made[weights]
    return copy.deepcopy(model, memo)


def read(
    model: Any, targets: Mapping[str, Tensor], entries: Mapping[str, Entry], format: str, device: Any = None
) -> None:
    """Give a model without memory some, its experts in numbers of few bits, and fill it from files.

    targets: the view into the model's state that each of the entries of that name fills. One matrix of an expert is
    held as it was at a time. Raises as `quantise`.
    """
    where = views(model, targets)
    stacks = stacks_of(model, "quantise")
    rest, files = parted(where, entries, stacks)
    for name, experts in stacks.items():
        model.set_submodule(name, _checked(name, experts, format))
    materialize(model, torch.device(device or torch.get_default_device()), initialize=False)
    fill(model, rest, entries)
    for name, found in files.items():
        experts = model.get_submodule(name)
        for e in range(experts.num_experts):
            found.read(e, experts, e)


def stacks_of(model: nn.Module, what: str, kinds: tuple[type, ...] = (Experts,)) -> dict[str, Any]:
    """Experts of some kinds by name, grown ones as what they are together; raises ValueError where there are none, or a
    gate needs them whole."""
    grown = {name: module for name, module in model.named_modules() if isinstance(module, GrownExperts)}
    parts = {id(part) for module in grown.values() for part in (module.old, module.new)}
    found = {name: m for name, m in model.named_modules() if type(m) in kinds and id(m) not in parts}
    stacks: dict[str, Any] = {**found, **grown}
    if not stacks:
        for name, module in model.named_modules():
            if isinstance(module, (OffloadedExperts, QuantisedExperts)):
                how = "offloaded" if isinstance(module, OffloadedExperts) else "in few bits"
                raise ValueError(f"{what}: {name} are {how} already; give the model that they are from")
        raise ValueError(f"{what}: {type(model).__name__} has no experts of ours (zoo.moe.Experts)")
    for name, module in model.named_modules():
        if isinstance(module, MoE) and module.router.merges and type(module.experts) in kinds:
            raise ValueError(f"{what}: {name}: {type(module.router).__name__} merges experts, which it needs whole")
    return stacks


def together(experts: Any) -> Any:
    """Experts of which some are frozen (`zoo.grow`) in one stack, others as they are."""
    return experts.whole() if isinstance(experts, GrownExperts) else experts


def _checked(name: str, experts: Experts, format: str) -> QuantisedExperts:
    try:
        return QuantisedExperts.of(experts, format)
    except ValueError as error:
        raise ValueError(f"quantise: {name}: {error}") from None
