"""Names of models, "<domain>/<model>": each domain is a module with a table MODELS and build(name, **overrides)."""

from __future__ import annotations

import importlib
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from .. import extras
from ..nearest import unknown

if TYPE_CHECKING:
    from torch import nn

DOMAINS = ("language", "recommendation", "vision", "vision_language")


def list_models(pattern: str = "*") -> list[str]:
    """Names of all models that match a shell-style pattern, such as "language/*" or "*tiny"."""
    if not isinstance(pattern, str):
        raise TypeError(f"list_models: expected a pattern such as 'language/*', got {pattern!r}")
    names = [f"{domain}/{name}" for domain in DOMAINS for name in _domain(domain).MODELS]
    return sorted(name for name in names if fnmatchcase(name, pattern))


@extras.named()
def create_model(name: str, **overrides: Any) -> nn.Module:
    """Build a model by name with fresh weights; overrides are those of the domain's `build`.

    Under `torch.device("meta")` nothing is allocated. Raises ValueError naming the nearest models for an unknown name.
    """
    if not isinstance(name, str):
        raise TypeError(f"create_model: expected a name such as 'language/mixtral_tiny', got {name!r}")
    domain, _, model = name.partition("/")
    if domain not in DOMAINS:
        raise unknown("model", name, list_models())
    module = _domain(domain)
    if model not in module.MODELS:
        # Names that a domain builds without listing them here: those of the library under it.
        others = module.other_models() if hasattr(module, "other_models") else []
        if model.partition(".")[0] not in others:  # timm's names may end in a tag, which says whose weights
            raise unknown("model", name, [*list_models(), *(f"{domain}/{other}" for other in others)])
    return module.build(model, **overrides)


def _domain(domain: str) -> Any:
    return importlib.import_module(f"{__package__}.{domain}")
