"""What the gates of adapters may know of a batch: padding, token ids, and what a caller says, as tasks.

Linear layers are called with tokens alone. The module that has the blocks hears what the model is called with; where it
hands unknown keywords on to its blocks, the context travels among them, as in `context`, so that a recomputation sees
its own batch. Elsewhere (timm, GPT-2, T5) adapters are told what the newest forward pass was called with: there
activation checkpointing needs the backward of one pass before the forward of the next, where labels or padding differ.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..pretrained.context import ALONE, KEY, MIXERS, _drop, _mask_is_idle, _put, _take, hearer
from ..pretrained.generating import take_context

OF_SEQUENCES = ("intuition",)  # tables of sequences and numbers, which tokens are not
OWN = ("record_logits", "gating")  # what only the gates of the model itself use


class _Told:
    """What adapters are told; not copied, nor pickled."""

    value: dict[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}


def tell(model: nn.Module, adapters: dict[str, list[nn.Module]]) -> None:
    """Let adapters, by the name of the block they are in, hear what the model is called with."""
    take_context(model)
    owners: dict[str, dict[str, list[nn.Module]]] = {}
    for block, found in adapters.items():
        owners.setdefault(_owner(block), {})[block] = found
    for name, blocks in owners.items():
        owner: Any = model.get_submodule(name)
        layers = next(iter(blocks)).rpartition(".")[0]
        entries = list(model.get_submodule(layers).children())
        if _hands_on(owner, entries):
            if not any(hook is _put for hook in owner._forward_pre_hooks.values()):
                owner.register_forward_pre_hook(_put, with_kwargs=True)
            own = {id(model.get_submodule(block)): found for block, found in blocks.items()}
            for entry in entries:
                _listen(entry, own.get(id(entry), []))
        else:
            told: Any = _Told()
            owner = _called_with_ids(model, name)
            owner._adapters_told = [*getattr(owner, "_adapters_told", ()), told]
            if len(owner._adapters_told) == 1:
                owner.register_forward_pre_hook(_hold, with_kwargs=True)
            for adapter in (adapter for found in blocks.values() for adapter in found):
                _hear(adapter, told)


def _owner(block: str) -> str:
    """The module whose blocks these are: the one above the outermost list of blocks."""
    path = block.split(".")
    first = next(i for i, step in enumerate(path) if step.isdigit())
    return ".".join(path[: max(first - 1, 0)])


def _called_with_ids(model: nn.Module, name: str) -> Any:
    """The module of that name, or the one around it that is called with ids and mask, as BERT's encoder is not."""
    path = name.split(".") if name else []
    for end in range(len(path), -1, -1):
        around = model.get_submodule(".".join(path[:end]))
        if hasattr(around, "get_input_embeddings"):
            return around
    return model.get_submodule(name)


def _hands_on(owner: Any, entries: list[Any]) -> bool:
    """Whether keywords reach the attention of every block."""
    if not hasattr(owner, "config") or not all(any(hasattr(e, name) for name in (*MIXERS, ALONE)) for e in entries):
        return False
    forwards = [inspect.signature(module.forward).parameters.values() for module in (owner, *entries)]
    return all(any(p.kind is p.VAR_KEYWORD for p in parameters) for parameters in forwards)


def _listen(block: Any, adapters: Iterable[nn.Module]) -> None:
    """The attention of a block takes the context out for the block's adapters."""
    attention = hearer(block)
    told: Any = _Told()
    attention._adapters_told = [*getattr(attention, "_adapters_told", ()), told]
    if len(attention._adapters_told) == 1:
        # Before the model's own gates take it out, or else it is taken out here.
        attention.register_forward_pre_hook(_look, with_kwargs=True, prepend=True)
        if not any(hook in (_take, _drop) for hook in attention._forward_pre_hooks.values()):
            attention.register_forward_pre_hook(_drop, with_kwargs=True)
    for adapter in adapters:
        _hear(adapter, told)


def _hear(adapter: Any, told: _Told) -> None:
    adapter._adapter_told = told
    adapter.register_forward_pre_hook(_use, with_kwargs=True)


def _look(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for told in attention._adapters_told:
        told.value = kwargs.get(KEY)


def _hold(owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    context = dict(kwargs.pop(KEY, None) or {})
    ids = kwargs.get("input_ids", args[0] if args else None)
    mask = kwargs.get("attention_mask")
    if isinstance(ids, Tensor) and not ids.is_floating_point():  # not images
        context.setdefault("token_ids", ids)
    tokens = ids if isinstance(ids, Tensor) else kwargs.get("inputs_embeds")
    if isinstance(mask, Tensor) and mask.dim() == 2 and tokens is not None and "mask" not in context:
        real = mask[:, -tokens.shape[1] :].bool()
        if torch.compiler.is_compiling() or not bool(real.all()):
            context["mask"] = real
    for told in owner._adapters_told:
        told.value = context
    return args, kwargs


def _use(adapter: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    told = adapter._adapter_told.value or {}
    context = {key: value for key, value in told.items() if key not in OWN and _fits(key, value, args)}
    if "mask" in context and _mask_is_idle(adapter):
        del context["mask"]
    return args, {**context, **kwargs}


def _fits(key: str, value: Any, args: tuple[Any, ...]) -> bool:
    """Whether it is of the tokens that are given: keys and values of cross attention are of others."""
    per_token = (
        isinstance(value, Tensor)
        and value.dim() > 1
        and key not in OF_SEQUENCES
        and len(args) > 0
        and args[0].dim() == 3
    )
    return not per_token or value.shape[:2] == args[0].shape[:2]
