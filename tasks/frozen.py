"""Checkpoints without frozen weights, where the files that the model was read from have them."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from zoo.convert.adapter_folder import weights_fingerprint
from zoo.convert.adapting import adapter_state
from zoo.moe import QuantisedExperts

FINGERPRINT = "frozen_weights"
# Conversions that make the same frozen weights of the same files, every time.
EXACT = {"adapt", "compose_adapters", "quantise"}
# Overrides that draw no weights.
PLAIN = {"attn_implementation", "backend", "base", "capacity", "device", "dtype", "quantise", "revision"}


def in_files(arguments: Any, conversions: list[tuple[str, Any]]) -> bool:
    """Whether a task's arguments read a model whose frozen weights are all in its files: no gate, say, is new."""
    made = arguments["router"] is not None or {*(arguments["overrides"] or {})} - PLAIN
    return bool(arguments["pretrained"]) and not made and {name for name, _ in conversions} <= EXACT


def names(model: nn.Module) -> set[str]:
    """Names in the model's state of what never changes: frozen parameters, and numbers of experts in few bits.

    Adapters are not among them, frozen or not: they may have been drawn at random.
    """
    found = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    for name, module in model.named_modules():
        if isinstance(module, QuantisedExperts):
            found |= {f"{name}.{buffer}" for buffer, _ in module.named_buffers()}
    return found - adapter_state(model).keys()


def leave_out(checkpoint: dict[str, Any], left: set[str], model: nn.Module) -> None:
    """Take tensors out of a Lightning checkpoint, of an average too, and note which model's weights they are."""
    for part in ("state_dict", "current_model_state"):
        if part in checkpoint:
            checkpoint[part] = {name: value for name, value in checkpoint[part].items() if name not in left}
    checkpoint[FINGERPRINT] = weights_fingerprint(model)


def check(checkpoint: dict[str, Any], model: nn.Module) -> None:
    """Warn where a checkpoint was trained beside other frozen weights than the model's."""
    then = checkpoint.get(FINGERPRINT)
    if then and (now := weights_fingerprint(model)) and then != now:
        warnings.warn("the checkpoint was trained beside other frozen weights than the model's", stacklevel=2)


def forgive(module: Any, incompatible: Any) -> None:
    """A hook after reading a state: what was left out is not missing."""
    left = {f"model.{name}" for name in names(module.model)}
    # An average's copy of the module is called "module".
    incompatible.missing_keys[:] = [n for n in incompatible.missing_keys if n.removeprefix("module.") not in left]
