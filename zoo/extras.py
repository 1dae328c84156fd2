"""Which extra of this package an optional library that is missing belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

EXTRAS = {
    "transformers": "language",
    "tokenizers": "language",
    "datasets": "language",
    "timm": "vision",
    "torchvision": "vision",
    "sklearn": "vision",
    "torchrec": "recommendation",
    "fbgemm_gpu": "recommendation",
    "pyarrow": "recommendation",
}


@contextmanager
def named() -> Iterator[None]:
    """Raise ImportError that says what to install where an optional library is missing; a decorator too."""
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in EXTRAS:
            raise
        message = f"{library} is not installed; it comes with the extra: pip install 'moe-zoo[{EXTRAS[library]}]'"
        raise ImportError(message, name=library) from error
