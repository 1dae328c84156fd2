"""Models over several processes: meshes, `parallelize`, the Lightning strategy, checkpoints in parts.

Importing this package costs nothing; torch.distributed and lightning load when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .mesh import Mesh, Sizes
    from .parts import clip_grad_norm_
    from .spread import parallelize
    from .strategy import ExpertParallelStrategy

__all__ = ["ExpertParallelStrategy", "Mesh", "Sizes", "clip_grad_norm_", "parallelize"]

_LAZY = {
    "ExpertParallelStrategy": "strategy",
    "Mesh": "mesh",
    "Sizes": "mesh",
    "clip_grad_norm_": "parts",
    "parallelize": "spread",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
