"""Tiles that were measured on this very GPU, which come before the table's: a file a model of GPU.

`zoo tune` writes it: $MOE_ZOO_CACHE/tiles, or moe-zoo/tiles below the user's cache folder. It is read once, when a
kernel is first launched. An entry holds for experts of one size with about so many rows, and for the version of Triton
it was measured with, whose successors may need more shared memory for the same tile.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from .plans import Plan, Tile


class Key(NamedTuple):
    """Bytes of an element, width D, hidden width F of gated experts, and a name of `plans.ROWS`."""

    element_size: int
    dim: int
    hidden_dim: int
    rows: str


@dataclass
class Entry:
    """The fastest tiles found for a key, and how much faster they were than the table's: by direction."""

    key: Key
    plan: Plan
    gain: dict[str, float] = field(default_factory=dict)
    triton: str = triton.__version__


def gpu_name(device: torch.device) -> str:
    """What the driver calls a GPU; "interpreter" where there is none."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def file_of(gpu: str) -> Path:
    """Where the tiles of a GPU are kept."""
    root = os.environ.get("MOE_ZOO_CACHE")
    folder = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe-zoo"
    return folder / "tiles" / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', gpu)}.json"


@cache
def tuned(device: torch.device) -> dict[Key, Plan]:
    """The plans that hold on a device."""
    file = file_of(gpu_name(device))
    entries = read(file) if file.is_file() else []
    current = {entry.key: entry.plan for entry in entries if entry.triton == triton.__version__}
    if entries and not current:
        warnings.warn(
            f"{file} was measured with triton {entries[0].triton}, here is {triton.__version__}: the built-in tiles "
            "are used; `zoo tune` measures again",
            stacklevel=2,
        )
    return current


def read(file: Path) -> list[Entry]:
    """All entries of a file; ValueError for one that `write` did not make."""
    try:
        return [_parse(item) for item in json.loads(file.read_text())["entries"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file} does not hold tiles as `zoo tune` writes them ({reason}); delete it") from error


def _parse(item: dict[str, Any]) -> Entry:
    plan = Plan(**{each.name: Tile(**item["plan"][each.name]) for each in fields(Plan)})
    for name, tile in vars(plan).items():
        for size in ("m", "n", "k", "warps", "stages", "group"):
            if not isinstance(value := getattr(tile, size), int) or value < 1:
                raise ValueError(f"{name}.{size} is {value!r}, expected a positive integer")
    if plan.up.m != plan.down.m or plan.d_hidden.m != plan.d_x.m:
        raise ValueError("up and down share m, and so do d_hidden and d_x")
    return Entry(Key(*(item[name] for name in Key._fields)), plan, item["gain"], item["triton"])


def write(gpu: str, entries: Iterable[Entry]) -> Path:
    """Put entries into the GPU's file, in place of older ones with the same keys; the file is replaced whole."""
    file = file_of(gpu)
    kept = {entry.key: entry for entry in (read(file) if file.is_file() else [])}
    kept |= {entry.key: entry for entry in entries}
    items = [
        {**entry.key._asdict(), "triton": entry.triton, "gain": entry.gain, "plan": asdict(entry.plan)}
        for entry in sorted(kept.values(), key=lambda entry: entry.key)
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, draft = tempfile.mkstemp(prefix=f".{file.stem}-", dir=file.parent)
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(json.dumps({"gpu": gpu, "entries": items}, indent=1) + "\n")
        os.replace(draft, file)
    except BaseException:
        os.unlink(draft)
        raise
    tuned.cache_clear()
    return file
