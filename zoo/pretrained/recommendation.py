"""Recommendation models as folders: config.json, model.safetensors, and how rows are encoded, preparation.json.

config.json names the model, its arguments and its schema; what is in a vocabulary is in preparation.json alone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from ..data.tables_encode import FILE as PREPARATION
from ..data.tables_encode import Preparation
from .language import resolve_dtype
from .peek import peek
from .staging import staged
from .storable import storable
from .tensorfile import read_all, read_header, write_file

CONFIG, WEIGHTS, NETWORK = "config.json", "model.safetensors", "network"


def is_recommendation(folder: Path) -> bool:
    """Whether config.json in a folder is one that `save` wrote."""
    return str(peek(folder).get(NETWORK, "")).startswith("recommendation/")


def save(model: Any, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a model, and its `preparation` where it has one. The same model gives the same bytes.

    Raises ValueError for an argument that JSON cannot hold, such as a router given as a function; FileExistsError as
    `staged`.
    """
    made = storable(model.made_with, "argument")
    config = {NETWORK: made[NETWORK], "overrides": made["overrides"], "schema": model.schema.table()}
    with staged(folder, overwrite) as staging:
        (staging / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_file(staging / WEIGHTS, sorted(model.state_dict().items()))
        if getattr(model, "preparation", None) is not None:
            model.preparation.save(staging)


def load(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> Any:
    """The model of a folder that `save` wrote, in eval mode, with its `preparation` where there is one.

    Raises ValueError naming file and tensor for missing and surplus tensors, wrong shapes and a damaged file, and
    FileNotFoundError for a file that is not there.
    """
    from .. import create_model

    path = Path(folder).expanduser()
    config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    if not (path / WEIGHTS).is_file():
        raise FileNotFoundError(f"{path / WEIGHTS}: no such file (pickled weights are not read)")
    stored = read_header(path / WEIGHTS)
    try:
        model: Any = create_model(config[NETWORK], schema=config["schema"], **config["overrides"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / CONFIG}: {type(error).__name__}: {error}") from error
    read_all(model.state_dict(), stored, path / WEIGHTS)
    if (path / PREPARATION).is_file():
        model.preparation = Preparation.load(path)
    place: dict[str, Any] = {"dtype": resolve_dtype(dtype), "device": device}
    return model.to(**{name: value for name, value in place.items() if value is not None}).eval()
