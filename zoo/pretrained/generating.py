"""What transformers' `generate` needs to know of `moe_context`, which it would refuse as an argument of no use."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from ..moe.routers import HashRouter, LoryRouter

KEY = "moe_context"


def take_context(model: Any) -> None:
    """Let model.generate(..., moe_context={"task": ...}) tell gates what model(..., moe_context=...) tells them.

    Labels of sequences [B] are repeated for the beams of each, or its several answers. Gates hear of padding with any
    kind of cache, hash layers of the token before those that are computed, and Lory's, which decide once, of where the
    prompt ends.
    """
    if hasattr(model, "_validate_model_kwargs") and not isinstance(model._validate_model_kwargs, _Validate):
        model._validate_model_kwargs = _Validate(model)
        model._expand_inputs_for_generation = _Expand(model)
        model.prepare_inputs_for_generation = _Prepare(model)


def hears(model: Any) -> bool:
    """Whether the gates of a model hear what `moe_context` says."""
    return isinstance(getattr(model, "_validate_model_kwargs", None), _Validate)


class _Own:
    """Stands in for a method of the model; an object survives copying and pickling with it."""

    def __init__(self, model: Any) -> None:
        self.model = model


class _Validate(_Own):
    def __call__(self, model_kwargs: dict[str, Any]) -> None:
        known = {name: value for name, value in model_kwargs.items() if name != KEY}
        type(self.model)._validate_model_kwargs(self.model, known)


class _Expand(_Own):
    def __call__(self, expand_size: int = 1, **kwargs: Any) -> Any:
        if expand_size > 1 and kwargs.get(KEY):
            kwargs[KEY] = {name: _repeated(value, expand_size) for name, value in kwargs[KEY].items()}
        if any(isinstance(module, LoryRouter) for module in self.model.modules()):
            embeds = kwargs.get("inputs_embeds")
            prompt = (kwargs["input_ids"] if embeds is None else embeds).shape[1]
            # transformers hands this on to every step: what the first one decides, the others find there.
            kwargs[KEY] = {"prompt": prompt, "decided": {}, **(kwargs.get(KEY) or {})}
        # A static method in transformers 5.17.
        theirs = inspect.getattr_static(type(self.model), "_expand_inputs_for_generation")
        return theirs.__get__(self.model, type(self.model))(expand_size=expand_size, **kwargs)


class _Prepare(_Own):
    hears_previous: bool | None = None

    def __call__(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = self._theirs()(input_ids, *args, **kwargs)
        told = self._told(input_ids, kwargs.get("attention_mask"), inputs)
        return {**inputs, KEY: {**told, **(inputs.get(KEY) or {})}} if told else inputs

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._theirs())  # `generate` looks there for what a model takes

    def _theirs(self) -> Any:
        return type(self.model).prepare_inputs_for_generation.__get__(self.model)

    def _told(self, ids: Tensor, mask: Tensor | None, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the model's own inputs do not say: padding, where they have a mask of attention alone, and the past."""
        told: dict[str, Any] = {}
        new = inputs.get("input_ids")
        if new is None:
            return told
        length, total = new.shape[1], ids.shape[1]
        whole = isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= total
        real = mask.bool() if isinstance(mask, Tensor) and whole else None
        given = inputs.get("attention_mask")
        # A token by itself, as in decoding, is no padding.
        hidden = real is not None and length > 1 and not (isinstance(given, Tensor) and given.dim() == 2)
        if real is not None and hidden and not bool(real[:, -length:].all()):
            told["mask"] = real[:, -length:]
        if self.hears_previous is None or length == total:
            self.hears_previous = any(isinstance(m, HashRouter) and m.feature != "token" for m in self.model.modules())
        if self.hears_previous and length < total:
            before = ids[:, -length - 1]
            told["previous_ids"] = before if real is None else before.where(real[:, -length - 1], ids[:, -length])
        return told


def _repeated(value: Any, times: int) -> Any:
    return value.repeat_interleave(times, dim=0) if isinstance(value, torch.Tensor) and value.dim() else value
