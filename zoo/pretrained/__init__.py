"""Published checkpoints and our modules: one small table a family, readers and writers of their files."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dispatch import from_pretrained, save_pretrained

__all__ = [
    "from_pretrained",
    "save_pretrained",
]

_LAZY = {
    "from_pretrained": "dispatch",
    "save_pretrained": "dispatch",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
