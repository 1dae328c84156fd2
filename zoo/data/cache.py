"""Where what was computed from a corpus is kept: $MOE_ZOO_CACHE, or moe-zoo below the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_root() -> Path:
    """The cache folder; it can be deleted at any time."""
    given = os.environ.get("MOE_ZOO_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe-zoo"


def cached(kind: str, *key: str, fill: Callable[[Path], None]) -> Path:
    """The folder for `key`, made by `fill` the first time. It appears whole or, after an error, not at all."""
    digest = hashlib.sha256("\0".join(key).encode()).hexdigest()[:16]
    final = cache_root() / kind / digest
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{digest}-", dir=final.parent))
    try:
        fill(draft)
        try:
            draft.rename(final)
        except OSError:
            if not final.is_dir():  # otherwise another process was faster, and its result is the same
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return final
