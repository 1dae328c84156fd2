"""MoE Zoo: one mixture-of-experts core, and the models and tasks built on it.

Nothing heavy is imported until it is used: `import zoo` costs milliseconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._when_imported import when_imported

if TYPE_CHECKING:
    from . import moe
    from .convert import (
        adapt,
        average,
        compose_adapters,
        grow,
        merge_adapters,
        mix,
        offload,
        prune,
        quantise,
        share_depth,
        split,
        to_dense,
        upcycle,
    )
    from .models import create_model, list_models
    from .pretrained import from_pretrained, save_pretrained

__version__ = "0.1.0"
__all__ = [
    "adapt",
    "average",
    "compose_adapters",
    "create_model",
    "from_pretrained",
    "grow",
    "list_models",
    "merge_adapters",
    "mix",
    "moe",
    "offload",
    "prune",
    "quantise",
    "save_pretrained",
    "share_depth",
    "split",
    "to_dense",
    "upcycle",
]

_LAZY = {
    "adapt": "zoo.convert",
    "average": "zoo.convert",
    "compose_adapters": "zoo.convert",
    "create_model": "zoo.models",
    "from_pretrained": "zoo.pretrained",
    "grow": "zoo.convert",
    "list_models": "zoo.models",
    "merge_adapters": "zoo.convert",
    "mix": "zoo.convert",
    "offload": "zoo.convert",
    "prune": "zoo.convert",
    "quantise": "zoo.convert",
    "save_pretrained": "zoo.pretrained",
    "share_depth": "zoo.convert",
    "split": "zoo.convert",
    "to_dense": "zoo.convert",
    "upcycle": "zoo.convert",
}

when_imported("transformers.integrations.moe", "zoo.models.transformers_experts", "register_experts")
when_imported("timm", "zoo.models.vision", "register_models")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in ("convert", "models", "moe", "pretrained"):
        return importlib.import_module(f"zoo.{name}")
    raise AttributeError(f"module 'zoo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
