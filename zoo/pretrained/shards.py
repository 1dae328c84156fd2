"""Writing a checkpoint in the Hugging Face layout: its configurations, and weights in one file or several."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from .tensorfile import write_file

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def bytes_of(size: int | str) -> int:
    """A size in bytes, such as of "5GB"; raises ValueError for another text, and for less than one byte."""
    if isinstance(size, str):
        match = re.fullmatch(r"(\d+)\s*([KMGT]B)", size.strip().upper())
        if not match:
            raise ValueError(f'max_shard_size: expected bytes or a size such as "5GB", got {size!r}')
        size = int(match[1]) * UNITS[match[2]]
    if size < 1:
        raise ValueError(f"max_shard_size: expected at least one byte, got {size}")
    return size


def write_configs(model: Any, config: Any, architecture: str, settings: dict[str, Any], folder: Path) -> None:
    """config.json, its quantization_config `settings` if there are any, and generation_config.json."""
    config = copy.deepcopy(config)
    config.architectures = [architecture]
    config.dtype = next(model.parameters()).dtype
    if settings:
        config.quantization_config = settings
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def write_weights(tensors: Iterable[tuple[str, Tensor]], parameters: int, folder: Path, limit: int) -> None:
    """One file of weights, or several of at most `limit` bytes and their index, as transformers names them."""
    shards: list[list[tuple[str, Tensor]]] = [[]]
    filled = total = 0
    for key, tensor in tensors:
        size = tensor.numel() * tensor.itemsize
        if filled and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append((key, tensor))
        filled, total = filled + size, total + size
    if len(shards) == 1:
        return write_file(folder / WEIGHTS, shards[0])
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard)
        weight_map.update(dict.fromkeys((key for key, _ in shard), name))
    index = {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return None
