"""Published checkpoints and our modules: one small table a family, readers and writers of their files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .folder import from_pretrained, save_pretrained

__all__ = ["from_pretrained", "save_pretrained"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import folder

        return getattr(folder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
