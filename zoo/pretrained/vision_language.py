"""LIMoE as folders: config.json, which names the model and its arguments, and model.safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..convert.splitting import split_again
from ..convert.upcycling import upcycle
from ..moe.grown import joined_state
from .language import resolve_dtype
from .peek import peek
from .staging import staged
from .storable import storable
from .tensorfile import DTYPES, Entry, read_all, read_header, write_file

CONFIG, WEIGHTS, NETWORK = "config.json", "model.safetensors", "network"
POSITIONS, PATCHES = "image_positions", "patch_embed.proj.weight"
# What was done to a model since it was made: the model's attribute, and the key of config.json.
UPCYCLED, SPLIT = ("upcycled", "upcycled"), ("split_how", "split")


def is_vision_language(folder: Path) -> bool:
    """Whether config.json in a folder is one that `save` wrote."""
    return str(peek(folder).get(NETWORK, "")).startswith("vision_language/")


def save(model: Any, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a model, upcycled or split ones too. The same model gives the same bytes.

    Raises ValueError for an argument that JSON cannot hold, such as a router given as a function, and for a model that
    was changed since it was made; FileExistsError as `staged`.
    """
    config = stored(model)
    with staged(folder, overwrite) as staging:
        (staging / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_file(staging / WEIGHTS, sorted(joined_state(model).items()))


def stored(model: Any) -> dict[str, Any]:
    """config.json of a model; raises ValueError as `save`."""
    config = storable(model.made_with, "argument")
    for attribute, key in (UPCYCLED, SPLIT):
        if found := getattr(model, attribute, []):
            config[key] = storable(found, key)
    with torch.device("meta"):
        twin = _made(config)
    shapes, expected = ({n: t.shape for n, t in joined_state(m).items()} for m in (model, twin))
    if other := sorted(n for n in shapes.keys() | expected.keys() if shapes.get(n) != expected.get(n)):
        raise ValueError(
            f"save_pretrained: {config[NETWORK]} with this model's arguments has other tensors ({other[0]}); a model "
            "that was changed after it was made can be stored by its state_dict"
        )
    return config


def _made(config: dict[str, Any], **arguments: Any) -> Any:
    """The model that config.json describes, with values to be filled in."""
    from .. import create_model

    model = create_model(config[NETWORK], **{**config["overrides"], **arguments})
    for how in config.get(UPCYCLED[1], []):
        model = upcycle(model, **how)
    for how in config.get(SPLIT[1], []):
        model = split_again(model, **how)
    return model


def load(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = "auto",
    device: torch.device | str | None = None,
    **arguments: Any,
) -> Any:
    """The model of a folder that `save` wrote, in eval mode; arguments of the model go before those stored.

    Another image_size resamples the positions of patches, another patch_size or other channels the patches, as timm
    does. dtype "auto" keeps the checkpoint's. Raises ValueError naming file and tensor for missing and surplus tensors,
    wrong shapes and a damaged file, and FileNotFoundError for a file that is not there.
    """
    path = Path(folder).expanduser()
    config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    if not (path / WEIGHTS).is_file():
        raise FileNotFoundError(f"{path / WEIGHTS}: no such file (pickled weights are not read)")
    entries = read_header(path / WEIGHTS)
    try:
        model: Any = _made(config, **arguments)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / CONFIG}: {type(error).__name__}: {error}") from error
    if dtype == "auto":
        dtype = next((DTYPES[e.dtype] for e in entries.values() if e.dtype in ("F64", "F32", "F16", "BF16")), None)
    place: dict[str, Any] = {"dtype": resolve_dtype(dtype), "device": device}
    model = model.to(**{name: value for name, value in place.items() if value is not None})
    if not next(model.parameters()).is_meta:
        _fill(model, entries, path / WEIGHTS)
    return model.eval()


@torch.no_grad()
def _fill(model: Any, entries: Mapping[str, Entry], where: Path) -> None:
    """Read all tensors, positions of patches and the patches' weights as they are stored, and adapt these two."""
    from timm.layers import resample_abs_pos_embed, resample_patch_embed
    from timm.models import adapt_input_conv

    state = dict(model.state_dict())
    old = {}
    for name in (POSITIONS, PATCHES):
        stored, ours = (list(t[name].shape) if name in t else [] for t in (entries, state))
        # Of positions [1, N, D] N may differ, of patches [D, C, P, P] all but D.
        kept = slice(0, None, 2) if name == POSITIONS else slice(0, 1)
        if stored != ours and len(stored) == len(ours) and stored[kept] == ours[kept]:
            old[name] = state[name].new_empty(stored)
    read_all({**state, **old}, entries, where)
    if POSITIONS in old:
        state[POSITIONS].copy_(resample_abs_pos_embed(old[POSITIONS], list(model.patch_embed.grid_size), None, 0))
    if PATCHES in old:
        patches = resample_patch_embed(old[PATCHES], list(model.patch_embed.patch_size))
        state[PATCHES].copy_(adapt_input_conv(model.channels, patches, patches.shape[1]))
