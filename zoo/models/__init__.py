"""Backbones with MoE layers in them: a registry by name, one file a domain.

    zoo.list_models("language/*")
    model = zoo.create_model("language/mixtral_tiny", num_hidden_layers=2)

Importing this package costs nothing; torch, transformers and timm load when a model is built.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .registry import create_model, list_models

if TYPE_CHECKING:
    from .domain_ensemble import DomainEnsemble
    from .fusion import FusionOfExperts
    from .language import dense_twin
    from .parameters import count_parameters
    from .transformers_experts import register_experts

__all__ = [
    "DomainEnsemble",
    "FusionOfExperts",
    "count_parameters",
    "create_model",
    "dense_twin",
    "list_models",
    "register_experts",
]

_LAZY = {
    "DomainEnsemble": "domain_ensemble",
    "FusionOfExperts": "fusion",
    "count_parameters": "parameters",
    "dense_twin": "language",
    "register_experts": "transformers_experts",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
