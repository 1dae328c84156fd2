"""Conversions that look at data say how the same is made without: for a checkpoint, whose weights are read after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Conversion = TypeVar("Conversion", bound=Callable[..., Any])


def made_again_by(again: Callable[..., Any]) -> Callable[[Conversion], Conversion]:
    """Mark a conversion with the function that makes the same structure without data, as `conversion.again`.

    `again(model, decided, **arguments)` gets the arguments that the conversion was called with, by name and without
    calibrate, and what its result noted in `decided`: what data decided of parameters' shapes and of which layers there
    are. What they decided of values alone is not made again: a state dict has it.
    """

    def mark(conversion: Conversion) -> Conversion:
        conversion.again = again  # type: ignore[attr-defined]
        return conversion

    return mark
