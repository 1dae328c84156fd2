"""What transformers' `generate` needs to know of `moe_context`, which it would refuse as an argument of no use."""

from __future__ import annotations

import inspect
from typing import Any

import torch

KEY = "moe_context"


def take_context(model: Any) -> None:
    """Let model.generate(..., moe_context={"task": ...}) tell gates what model(..., moe_context=...) tells them.

    Labels of sequences [B] are repeated for the beams of each, or its several answers.
    """
    if hasattr(model, "_validate_model_kwargs") and not isinstance(model._validate_model_kwargs, _Validate):
        model._validate_model_kwargs = _Validate(model)
        model._expand_inputs_for_generation = _Expand(model)


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
        # A static method in transformers 5.17.
        theirs = inspect.getattr_static(type(self.model), "_expand_inputs_for_generation")
        return theirs.__get__(self.model, type(self.model))(expand_size=expand_size, **kwargs)


def _repeated(value: Any, times: int) -> Any:
    return value.repeat_interleave(times, dim=0) if isinstance(value, torch.Tensor) and value.dim() else value
