"""Blocks that share their weights over depth: WideNet (2107.11817)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..moe import MoE, OffloadedExperts, QuantisedExperts
from ..parallel.spread import repeated
from .dense_mlps import is_mlp
from .origin import made_by


def share_depth(model: nn.Module, *, within: str = "") -> nn.Module:
    """A copy of a model whose blocks share all weights but those of their norms (WideNet, 2107.11817).

    Attention, gate and experts of every block are the first one's, so that depth costs no parameters, and experts in
    all blocks make up for them (`zoo.upcycle(..., layers="all")`, moe_layers="all"). Norms, also those of queries
    and keys, stay each block's own: experts meet other tokens at every depth. Only parameters are shared, with the
    first block whose own has the same name and shape; modules, buffers and biases of the choice are not.

    Works on timm's and transformers' blocks, each stage's by themselves, those of a submodule where `within` names one.
    `zoo.save_pretrained` writes shared weights once for each block; timm models read back share them again, others do
    not. Convert first and share then: what `upcycle`, `split`, `mix` and `to_dense` put into a shared model is each
    block's own.
    `zoo.parallel.parallelize` refuses such a model, DDP takes it. Raises ValueError where no two blocks are alike.
    """
    shared = tie_depth(copy.deepcopy(getattr(model, "_orig_mod", model)), within)
    made_by("share_depth", shared)
    return shared


def tie_depth(model: Any, within: str = "") -> Any:
    """The same, of the given model itself."""
    for name, module in model.get_submodule(within).named_modules():
        if isinstance(module, (OffloadedExperts, QuantisedExperts)):
            few, after = (
                ("in few bits", "quantise") if isinstance(module, QuantisedExperts) else ("offloaded", "offload")
            )
            raise ValueError(f"share_depth: {name} are {few}, and no parameters; share first and {after} then")
    shared = 0
    for stack in _stacks(model.get_submodule(within)):
        first: dict[Any, nn.Parameter] = {}
        for block in stack:
            for path, owner, name, parameter in list(_weights(block)):
                kept = first.setdefault((path, name, parameter.shape), parameter)
                if kept is not parameter:
                    setattr(owner, name, kept)
                    shared += 1
    if not shared:
        place = f" under {within!r}" if within else ""
        raise ValueError(f"share_depth: {type(model).__name__} has no two blocks with the same weights{place}")
    if hasattr(model, "pretrained_cfg") and not within:
        model.changed = {**getattr(model, "changed", {}), "share_depth": True}
    return model


def shares_depth(model: Any) -> bool:
    """Whether blocks share all weights that `tie_depth` would have them share."""
    for stack in _stacks(model):
        first: dict[Any, nn.Parameter] = {}
        for block in stack:
            for path, _, name, parameter in _weights(block):
                if first.setdefault((path, name, parameter.shape), parameter) is not parameter:
                    return False
    return True


def _stacks(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Blocks that run one after the other: of each tower, of each stage of one that has stages."""
    for stack in repeated(model):
        inner = [[part for found in repeated(block) for part in found if _has_mlp(part)] for block in stack]
        if any(len(parts) > 1 for parts in inner):
            for block in stack:
                yield from _stacks(block)
        else:
            yield stack


def _has_mlp(part: nn.Module) -> bool:
    """Whether a part of a block would be a block itself, with an MLP or experts among others."""
    own = (module for path, module in part.named_modules() if path)
    return any(isinstance(module, MoE) or is_mlp(module) for module in own)


def _weights(block: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Path and module of every parameter of a block that is not a norm's, with its name there."""
    for path, module in block.named_modules():
        if "Norm" not in type(module).__name__:
            for name, parameter in module.named_parameters(recurse=False):
                yield path, module, name, parameter
