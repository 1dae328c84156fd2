"""Published checkpoints and our modules: one small table a family, readers and writers of their files."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .densify import to_dense
    from .dispatch import from_pretrained, save_pretrained
    from .pruning import prune
    from .upcycling import upcycle, upcycle_optimizer

__all__ = ["from_pretrained", "prune", "save_pretrained", "to_dense", "upcycle", "upcycle_optimizer"]

_LAZY = {
    "from_pretrained": "dispatch",
    "prune": "pruning",
    "save_pretrained": "dispatch",
    "to_dense": "densify",
    "upcycle": "upcycling",
    "upcycle_optimizer": "upcycling",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
