"""Whether a run can write where it is told to, asked before it works for hours."""

from __future__ import annotations

import os
from pathlib import Path


def check_writable(key: str, folder: str | os.PathLike[str]) -> None:
    """Raise ValueError when a folder can neither be written to nor made; nothing is made. URLs are not looked at."""
    if "://" in str(folder):
        return
    path = Path(folder).expanduser().absolute()
    there = next(p for p in (path, *path.parents) if p.exists())
    if not there.is_dir():
        raise ValueError(f"{key}: cannot write to {folder}: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{key}: cannot write to {folder}: {there} is read-only")
