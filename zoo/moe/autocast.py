"""Autocast where it must not round what a gate decides by; the meta device, on which shapes are tried out, has none."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def is_on(x: Tensor) -> bool:
    """Whether products of x would be rounded."""
    # torch.amp.is_autocast_available would break the graph in torch 2.11.
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def off(x: Tensor) -> AbstractContextManager[object]:
    """A context in which products of x are not rounded."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def computed(x: Tensor) -> torch.dtype:
    """The type in which matrix products take x here, which is that of what travels to other processes' experts."""
    low = is_on(x) and x.dtype == torch.float32
    return torch.get_autocast_dtype(x.device.type) if low else x.dtype
