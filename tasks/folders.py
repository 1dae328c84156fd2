"""Folders of a run: whether it can write where it is told to, asked before it works for hours, and what it leaves."""

from __future__ import annotations

import os
import shutil
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


def check_free(key: str, folder: str | os.PathLike[str]) -> None:
    """Raise ValueError when a folder that is to be made has something in it already, or cannot be written to."""
    check_writable(key, folder)
    path = Path(folder).expanduser()
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"{key}: {folder} exists and is not empty")


def remove_unused(logs: Path) -> None:
    """Remove a run's folder of logs, version_N, where there is nothing in it but the run's configuration."""
    if not (logs.name.startswith("version_") and logs.is_dir()):
        return
    if all(
        path.name in ("config.yaml", "hparams.yaml") or path.name.startswith("events.out.tfevents")
        for path in logs.iterdir()
    ):
        shutil.rmtree(logs)
