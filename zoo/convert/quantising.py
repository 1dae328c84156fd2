"""Models whose experts are kept in numbers of few bits: made of others, or read so from a folder."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..moe import Experts, MoE, QuantisedExperts
from ..moe.kernels.codes import BLOCK
from ..moe.quantised import KINDS
from ..pretrained.adopt import materialize
from ..pretrained.quantised import Fp8
from ..pretrained.sharded import View, fill, part_of, views
from ..pretrained.tensorfile import Entry


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
    for name, experts in _stacks(model).items():
        # Layers that share weights go on doing so.
        weights = tuple(id(parameter) for parameter in experts.parameters())
        if weights not in made:
            made[weights] = _checked(name, experts, format)
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
    stacks = _stacks(model)
    for name, experts in stacks.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, _checked(name, experts, format))
    materialize(model, torch.device(device or torch.get_default_device()), initialize=False)
    coded: dict[str, dict[str, View]] = defaultdict(dict)
    for key, view in where.items():
        stack, _, parameter = view.name.rpartition(".")
        if stack in stacks and not parameter.endswith("_bias"):
            coded[view.name][key] = view
    fill(model, {key: view for key, view in where.items() if key not in coded.get(view.name, ())}, entries)
    for parameter, found in coded.items():
        stack, _, own = parameter.rpartition(".")
        experts = model.get_submodule(stack)
        shape = getattr(stacks[stack], own).shape
        if _in_our_blocks(found, entries, experts, own):
            for key, view in found.items():
                _take(view, entries[key], experts, own)
            continue
        for e, matrix in _matrices(found, entries, shape):
            try:
                experts.encode(own, e, matrix.to(getattr(experts, f"{own}_codes").device))
            except ValueError as error:
                raise ValueError(f"{parameter}, expert {e}: {error}") from None


def _in_our_blocks(
    found: Mapping[str, View], entries: Mapping[str, Entry], experts: QuantisedExperts, own: str
) -> bool:
    """Whether the files have a stack in float8 themselves, with scales for the same blocks."""
    return experts.format == "float8" and all(
        isinstance(entry := entries[key], Fp8)
        and entry.block == (BLOCK, BLOCK)
        and (view.dims, view.shape) == ((1, 2), entry.shape)
        and view.shape[0] * experts.parts[own] == getattr(experts, f"{own}_codes").shape[1]
        for key, view in found.items()
    )


def _take(view: View, entry: Any, experts: QuantisedExperts, own: str) -> None:
    """Codes and scales of one matrix as they are in a file."""
    e, row = view.origin[:2]
    part = row // view.shape[0]
    codes, scales = (getattr(experts, f"{own}_{kind}")[e].chunk(experts.parts[own])[part] for kind in KINDS)
    try:
        entry.read_codes(codes, scales)
    except ValueError as error:
        raise ValueError(f"{view.name}, expert {e}: {error}") from None


def _matrices(
    found: Mapping[str, View], entries: Mapping[str, Entry], shape: torch.Size
) -> Iterator[tuple[int, Tensor]]:
    """Each expert's matrix [R, C] of a stack in float32, put together from the files' tensors that it has part in."""
    by_expert: dict[int, list[str]] = defaultdict(list)
    for key, view in found.items():
        many = 0 in view.dims
        count = view.shape[view.dims.index(0)] if many else 1
        for e in range(view.origin[0], view.origin[0] + count):
            by_expert[e].append(key)
    for e in range(shape[0]):
        matrix = torch.empty(shape[1:], dtype=torch.float32, device="cpu")
        for key in by_expert[e]:
            if part := part_of(found[key], (1, *shape[1:]), (e, 0, 0), matrix[None]):
                entries[key].read_part(*part)
        yield e, matrix


def _stacks(model: nn.Module) -> dict[str, Experts]:
    stacks = {name: module for name, module in model.named_modules() if type(module) is Experts}
    if not stacks:
        raise ValueError(f"quantise: {type(model).__name__} has no experts of ours (zoo.moe.Experts)")
    for name, module in model.named_modules():
        if isinstance(module, MoE) and module.router.merges and type(module.experts) is Experts:
            raise ValueError(f"quantise: {name}: {type(module.router).__name__} merges experts, which it needs whole")
    return stacks


def _checked(name: str, experts: Experts, format: str) -> QuantisedExperts:
    try:
        return QuantisedExperts.of(experts, format)
    except ValueError as error:
        raise ValueError(f"quantise: {name}: {error}") from None
