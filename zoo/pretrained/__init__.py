"""Published checkpoints and our modules: one small table a family, readers and writers of their files."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter_compose import compose_adapters
    from .adapter_merge import merge_adapters
    from .adapting import adapt
    from .dispatch import from_pretrained, save_pretrained
    from .upcycling import upcycle, upcycle_optimizer

__all__ = [
    "adapt",
    "compose_adapters",
    "from_pretrained",
    "merge_adapters",
    "save_pretrained",
    "upcycle",
    "upcycle_optimizer",
]

_LAZY = {
    "adapt": "adapting",
    "compose_adapters": "adapter_compose",
    "merge_adapters": "adapter_merge",
    "from_pretrained": "dispatch",
    "save_pretrained": "dispatch",
    "upcycle": "upcycling",
    "upcycle_optimizer": "upcycling",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
