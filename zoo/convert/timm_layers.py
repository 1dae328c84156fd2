"""Which blocks of a timm model are sparse, as its arguments and `zoo.upcycle` noted it, once some are no more."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from .dense_mlps import blocks_with_mlps

NOTES = ("upcycled", "split_how")  # attributes with what `zoo.upcycle` and `zoo.split` did, a list of arguments


def dense_blocks(model: Any, widths: Mapping[str, int]) -> tuple[nn.Module | None, Callable[[Any], None]]:
    """A timm model without memory that has MLPs where `model` has the `MoE`s called so, and what notes it on a copy.

    None where timm does not know the model, or its arguments no longer fit.
    """
    arguments, notes = _without(model, widths.keys())
    twin, dim = built(model, arguments), getattr(model, "embed_dim", None)
    if twin is not None and dim and len(set(widths.values())) == 1 and not _has_widths(twin, widths):
        wider = {**arguments, "mlp_ratio": next(iter(widths.values())) / dim}
        if (other := built(model, wider)) is not None and _has_widths(other, widths):
            arguments, twin = wider, other

    def note(dense: Any) -> None:
        dense._model_args = arguments
        if hasattr(dense, "moe_layers"):
            dense.moe_layers = tuple(arguments["moe_layers"]) if arguments["moe_layers"] != "none" else ()
        for name, left in notes.items():
            setattr(dense, name, left)

    return twin, note


def built(model: Any, arguments: Mapping[str, Any]) -> nn.Module | None:
    """timm's model of the same architecture with these arguments, without memory; None where it cannot be made."""
    import timm
    from timm.models._input import get_model_args

    name = (model.pretrained_cfg or {}).get("architecture", "")
    if not timm.is_model(name):
        return None
    try:
        with torch.device("meta"):
            return timm.create_model(name, **get_model_args(model, dict(arguments)))
    except (TypeError, ValueError):
        return None


def _without(model: Any, names: Collection[str]) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """The model's arguments, and its notes by attribute, without the blocks whose `MoE`s are called so."""
    arguments = copy.copy(getattr(model, "_model_args", None) or {})
    places = {name: i for i, (name, _) in enumerate(blocks_with_mlps(model))}
    gone = {places[name] for name in names if name in places}
    if hasattr(model, "moe_layers"):
        arguments["moe_layers"] = [i for i in model.moe_layers if i not in gone] or "none"
    notes: dict[str, list[dict[str, Any]]] = {note: [] for note in NOTES if hasattr(model, note)}
    for note, kept in notes.items():
        for how in getattr(model, note):
            own = {name: i for i, (name, _) in enumerate(blocks_with_mlps(model, how.get("within", "")))}
            left = [i for i in how["layers"] if i not in {own[name] for name in names if name in own}]
            if left:
                kept.append({**how, "layers": left})
    return arguments, notes


def _has_widths(twin: nn.Module, widths: Mapping[str, int]) -> bool:
    from .dense_relatives import mlp_at

    found = {name: mlp_at(twin, name) for name in widths}
    return all(mlp is not None and mlp.sizes[1] == widths[name] for name, mlp in found.items())
