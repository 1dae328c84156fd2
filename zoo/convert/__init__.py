"""From one model to another: dense to sparse and back, several to one, fewer bits, experts beside frozen weights."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter_compose import compose_adapters
    from .adapter_merge import merge_adapters
    from .adapting import adapt
    from .averaging import average
    from .densify import to_dense
    from .growing import grow, output_regularization
    from .mixing import mix
    from .offloading import offload
    from .pruning import prune
    from .quantising import quantise
    from .sharing import share_depth
    from .split_distillation import layerwise_distillation
    from .split_predictor import fit_predictor
    from .splitting import set_k, split
    from .upcycling import upcycle, upcycle_optimizer

__all__ = [
    "adapt",
    "average",
    "compose_adapters",
    "fit_predictor",
    "grow",
    "layerwise_distillation",
    "merge_adapters",
    "mix",
    "offload",
    "output_regularization",
    "prune",
    "quantise",
    "set_k",
    "share_depth",
    "split",
    "to_dense",
    "upcycle",
    "upcycle_optimizer",
]

_LAZY = {
    "adapt": "adapting",
    "average": "averaging",
    "compose_adapters": "adapter_compose",
    "fit_predictor": "split_predictor",
    "grow": "growing",
    "layerwise_distillation": "split_distillation",
    "merge_adapters": "adapter_merge",
    "mix": "mixing",
    "offload": "offloading",
    "output_regularization": "growing",
    "prune": "pruning",
    "quantise": "quantising",
    "set_k": "splitting",
    "share_depth": "sharing",
    "split": "splitting",
    "to_dense": "densify",
    "upcycle": "upcycling",
    "upcycle_optimizer": "upcycling",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
