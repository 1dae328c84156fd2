"""LIMoE as folders: config.json, which names the model and its arguments, and model.safetensors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from ..moe.grown import joined_state
from .language import resolve_dtype
from .peek import peek
from .staging import staged
from .storable import storable
from .tensorfile import DTYPES, read_all, read_header, write_file

CONFIG, WEIGHTS, NETWORK = "config.json", "model.safetensors", "network"


def is_vision_language(folder: Path) -> bool:
    """Whether config.json in a folder is one that `save` wrote."""
    return str(peek(folder).get(NETWORK, "")).startswith("vision_language/")


def save(model: Any, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a model. The same model gives the same bytes.

    Raises ValueError for an argument that JSON cannot hold, such as a router given as a function; FileExistsError as
    `staged`.
    """
    config = storable(model.made_with, "argument")
    with staged(folder, overwrite) as staging:
        (staging / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_file(staging / WEIGHTS, sorted(joined_state(model).items()))


def load(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = "auto",
    device: torch.device | str | None = None,
    **arguments: Any,
) -> Any:
    """The model of a folder that `save` wrote, in eval mode; arguments of the model go before those stored.

    dtype "auto" keeps the checkpoint's. Raises ValueError naming file and tensor for missing and surplus tensors, wrong
    shapes and a damaged file, and FileNotFoundError for a file that is not there.
    """
    from .. import create_model

    path = Path(folder).expanduser()
    config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    if not (path / WEIGHTS).is_file():
        raise FileNotFoundError(f"{path / WEIGHTS}: no such file (pickled weights are not read)")
    stored = read_header(path / WEIGHTS)
    try:
        model: Any = create_model(config[NETWORK], **{**config["overrides"], **arguments})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / CONFIG}: {type(error).__name__}: {error}") from error
    if dtype == "auto":
        dtype = next((DTYPES[e.dtype] for e in stored.values() if e.dtype in ("F64", "F32", "F16", "BF16")), None)
    place: dict[str, Any] = {"dtype": resolve_dtype(dtype), "device": device}
    model = model.to(**{name: value for name, value in place.items() if value is not None})
    if not next(model.parameters()).is_meta:
        read_all(model.state_dict(), stored, path / WEIGHTS)
    return model.eval()
