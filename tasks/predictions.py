"""The file that predictions about images leave."""

from __future__ import annotations

import csv
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .folders import check_writable
from .training import share_of


def write_predictions(file: str, trainer: Any, predictions: list[Any]) -> None:
    """Write rows with the same keys of all processes, a list a batch, to a new CSV file; call it on all."""
    told: list[Any] = [(0, predictions)]
    if trainer.world_size > 1:
        told = [None] * trainer.world_size
        dist.all_gather_object(told, (share_of(trainer)["rank"], predictions))
    if not trainer.is_global_zero:
        return
    # A batch of all processes is consecutive images, share by share; several may have the same one.
    parts = [part for _, part in sorted(dict(told).items())]
    found = [row for batch in zip_longest(*parts, fillvalue=[]) for part in batch for row in part]
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(found[0]) if found else [])
        writer.writeheader()
        writer.writerows(found)
    print(f"{len(found)} rows in {path}")


def check_predictions(file: str, wanted: bool) -> None:
    """Raise ValueError when the file that predictions are wanted in exists, or cannot be written."""
    if not wanted:
        return
    if Path(file).exists():
        raise ValueError(f"predictions: {file} exists; name another file")
    check_writable("predictions", Path(file).parent)
