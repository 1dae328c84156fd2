"""Arguments of conversions that are whole numbers, or functions that run a model over data."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

Calibrate = Callable[[nn.Module], Iterable[Tensor]]


def whole(what: str, value: Any) -> int:
    """A whole number; raises ValueError naming what it is said for, also for True, which Python takes for 1."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{what} must be a whole number, got {value!r}") from None


def whole_each(what: str, value: Any) -> int | list[int]:
    """A whole number, or several; raises ValueError naming what they are said for."""
    if isinstance(value, Iterable) and not isinstance(value, str) and getattr(value, "ndim", 1) > 0:
        return [whole(what, one) for one in value]
    return whole(what, value)


def losses_of(what: str, calibrate: Calibrate, model: nn.Module) -> Iterator[Tensor]:
    """The losses of the batches that calibrate runs a model over; raises ValueError where it gives nothing like it."""
    if not callable(calibrate):
        raise ValueError(
            f"{what}: calibrate: expected a function that runs the model it is given over batches, got {calibrate!r}"
        )
    losses = calibrate(model)
    if not isinstance(losses, Iterable) or (isinstance(losses, Tensor) and not losses.dim()):
        raise ValueError(
            f"{what}: calibrate: expected a function that yields, or returns a list of, the loss of each batch; "
            f"it returned {None if losses is None else type(losses).__name__}"
        )
    return iter(losses)
