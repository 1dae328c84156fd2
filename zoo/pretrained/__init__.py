"""Published checkpoints and our modules: one small table a family, readers and writers of their files."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .averaging import average
    from .dispatch import from_pretrained, save_pretrained
    from .growing import grow, output_regularization
    from .mixing import mix
    from .sharing import share_depth
    from .upcycling import upcycle, upcycle_optimizer

__all__ = [
    "average",
    "from_pretrained",
    "grow",
    "mix",
    "output_regularization",
    "save_pretrained",
    "share_depth",
    "upcycle",
    "upcycle_optimizer",
]

_LAZY = {
    "average": "averaging",
    "from_pretrained": "dispatch",
    "grow": "growing",
    "mix": "mixing",
    "output_regularization": "growing",
    "save_pretrained": "dispatch",
    "share_depth": "sharing",
    "upcycle": "upcycling",
    "upcycle_optimizer": "upcycling",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
