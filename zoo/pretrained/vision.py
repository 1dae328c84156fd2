"""Vision checkpoints: the original V-MoE files into timm models, and timm's own folders (config.json, safetensors)."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from timm.models._hub import save_config_for_hf
from timm.models._input import get_model_args

from ..convert.sharing import shares_depth
from ..convert.splitting import split_again
from ..convert.upcycling import upcycle
from ..moe import MoE
from ..moe.grown import joined_state
from .language import resolve_dtype
from .staging import staged
from .storable import storable
from .tensorfile import DTYPES, read_header, write_file
from .vision_fill import Unset, fill, some
from .vision_layers import put_layers
from .vmoe import DTYPES as VMOE_DTYPES
from .vmoe import Checkpoint
from .vmoe_arguments import choose_router, described, infer
from .vmoe_names import as_theirs, our_name

CURRENT = ("img_size", "in_chans", "num_classes", "global_pool")
CONFIG, WEIGHTS, UPCYCLED, SPLIT, CHANGED = "config.json", "model.safetensors", "upcycled", "split", "changed"
VMOE_SIZES = {512: "small", 768: "base", 1024: "large", 1280: "huge"}
SOFT_SIZES = {**VMOE_SIZES, 384: "small"}


def from_vmoe(
    prefix: str | os.PathLike[str],
    *,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    new_head: bool = False,
    dtype: torch.dtype | str | None = "auto",
    device: torch.device | str | None = None,
    **arguments: Any,
) -> Any:
    """An original V-MoE or Soft MoE checkpoint, PREFIX.index and PREFIX.data-*, as a timm model on our layers.

    Sizes come from the arrays: width, depth, heads, patches, experts and their blocks, head and pooling, image size
    where positions are learnt. What arrays do not tell (k, capacity, groups, noise, losses, image size) comes from
    `config`, the original model's arguments as a mapping or a JSON file {"model": ..., "image_size": ...}, by default
    PREFIX.json where that exists; else from the published defaults. Arguments of `VisionTransformerMoE` go before all:
    another img_size resamples learnt positions, another patch_size or other in_chans the patches. new_head=True starts
    a new head of num_classes, num_classes=0 leaves the head out. dtype "auto" keeps the checkpoint's. The model is in
    eval mode; its `provenance` says which arguments came from where. Peak memory is the model's plus one stored slice,
    256 MB at most in published files.

    Raises FileNotFoundError and ValueError as `Checkpoint`, and ValueError naming file and key for missing and surplus
    arrays, wrong shapes, and a num_classes that is not the checkpoint's.
    """
    checkpoint = Checkpoint(prefix)
    where, leaves = checkpoint.index_path, checkpoint.leaves
    found = infer({key: leaf.shape for key, leaf in leaves.items()}, where)
    _check_classes(where, found["num_classes"], num_classes, new_head)
    known = described(checkpoint.prefix, config, found)
    given = {**arguments, **({} if num_classes is None else {"num_classes": num_classes})}
    merged = {"pos_embed": "sincos2d", "img_size": 224, **known, **found, **given}
    merged["router"] = choose_router(known.get("router"), found["router"], arguments)
    if dtype == "auto":
        dtype = VMOE_DTYPES[leaves["embedding/kernel"].dtype]
    model = _build(_published_name(found), merged, {}, dtype, device)
    if not next(model.parameters()).is_meta:
        fill(
            model,
            leaves,
            where,
            our_name,
            as_theirs,
            channels=found["in_chans"],
            kernel=(found["embed_dim"], found["in_chans"], *found["patch_size"]),
            head=not (new_head or num_classes == 0),
        )
    if new_head:
        model.reset_classifier(model.num_classes)
    model.provenance = {
        "source": str(checkpoint.prefix),
        "arrays": found,
        "config": {key: value for key, value in known.items() if key not in found or key == "router"},
        "given": given,
        "assumed": _assumed(model, {**known, **found, **given, "router": merged["router"]}),
    }
    return model.eval()


def from_timm(
    folder: str | os.PathLike[str],
    *,
    num_classes: int | None = None,
    new_head: bool = False,
    dtype: torch.dtype | str | None = "auto",
    device: torch.device | str | None = None,
    **arguments: Any,
) -> Any:
    """A vision model from a folder in timm's layout, as `zoo.save_pretrained` and timm write it.

    Arguments go before those that config.json holds, as in `from_vmoe`; where a model takes images of any size,
    img_size is the one that its `pretrained_cfg` names. Raises ValueError naming file and tensor for missing and
    surplus tensors, wrong shapes, a damaged file, and a num_classes that is not the checkpoint's.
    """
    path = Path(folder).expanduser()
    config = read_config(path)
    entries = read_header(_weights(path))
    classes = int(config.get("num_classes", config.get("pretrained_cfg", {}).get("num_classes", 0)))
    _check_classes(path / CONFIG, classes, num_classes, new_head)
    stored = {"num_classes": classes, **(config.get("model_args") or {})}
    merged = {**stored, **arguments, **({} if num_classes is None else {"num_classes": num_classes})}
    if dtype == "auto":
        dtype = next((DTYPES[e.dtype] for e in entries.values() if e.dtype in ("F32", "F16", "BF16")), torch.float32)
    cfg = dict(config.get("pretrained_cfg") or {})
    if not timm.is_model(config["architecture"]):
        raise ValueError(f"{path / CONFIG}: architecture {config['architecture']!r} is none of timm's and none of ours")
    size = cfg.get("input_size", (3, 0, 0))
    if "img_size" in arguments and "img_size" not in stored and _takes_any_size(config["architecture"]):
        cfg["input_size"] = (int(stored.get("in_chans", 3)), *to_2tuple(merged.pop("img_size")))
    model = _build(
        config["architecture"], merged, cfg, dtype, device, draw=bool(config.get(UPCYCLED) or config.get(SPLIT))
    )
    for how in config.get(UPCYCLED, []):
        model = upcycle(model, **how)
    for how in config.get(SPLIT, []):
        model = split_again(model, **how)
    model = put_layers(model, **config.get(CHANGED, {}))
    if not next(model.parameters()).is_meta:
        first = entries.get("patch_embed.proj.weight")
        patch = to_2tuple(getattr(getattr(model, "patch_embed", None), "patch_size", None))
        if first is not None and len(first.shape) == 4:
            patch = first.shape[2:]
        grid = (size[1] // patch[0], size[2] // patch[1]) if patch[0] else None
        channels = int(stored.get("in_chans", size[0]))
        fill(model, entries, path / WEIGHTS, channels=channels, grid=grid, head=not (new_head or num_classes == 0))
    if new_head:
        model.reset_classifier(model.num_classes)
    return model.eval()


def save_timm(model: Any, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a vision model in timm's layout: config.json with architecture and arguments, and model.safetensors.

    `zoo.from_pretrained(folder)` reads it, and `timm.create_model("local-dir:" + folder, pretrained=True)`, or
    "hf-hub:" once it is there; one that was upcycled or split, or has layers put in, is read by zoo alone. The same
    model gives the same bytes. Raises ValueError for an argument that JSON cannot hold, such as a router given as a
    function, and for a model that was changed since it was made; FileExistsError as `staged`.
    """
    arguments, extra = stored(model)
    with staged(folder, overwrite) as staging:
        save_config_for_hf(model, str(staging / CONFIG), model_config=extra, model_args=arguments)
        config = json.loads((staging / CONFIG).read_text(encoding="utf-8"))
        (staging / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        write_file(staging / WEIGHTS, joined_state(model).items())


def stored(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `save_timm` writes of how a model was made, and raises: timm's arguments, and what was done to it since."""
    # timm looks at the model itself for what may have changed since it was made.
    fixed = {name: value for name, value in model._model_args.items() if name not in CURRENT}
    arguments = {name: storable(value, name) for name, value in fixed.items()}
    upcycled = storable(getattr(model, "upcycled", []), "upcycled")
    split = storable(getattr(model, "split_how", []), "split")
    changed = storable(getattr(model, "changed", {}), "changed")
    if changed.get("share_depth") and not shares_depth(model):
        warnings.warn(
            "save_pretrained: blocks shared their weights until a conversion gave some their own; read back none do",
            stacklevel=4,
        )
        del changed["share_depth"]
    if not (upcycled or split) or getattr(model, "reshaped", False):
        _check_rebuilds(model, arguments, upcycled, split, changed)
    return arguments, {name: v for name, v in ((UPCYCLED, upcycled), (SPLIT, split), (CHANGED, changed)) if v}


def _check_rebuilds(
    model: Any,
    arguments: Mapping[str, Any],
    upcycled: list[dict[str, Any]],
    split: list[dict[str, Any]],
    changed: Mapping[str, Any],
) -> None:
    """Raise ValueError unless timm would build the same model from what is stored."""
    name = model.pretrained_cfg["architecture"]
    with torch.device("meta"):
        twin = timm.create_model(name, **get_model_args(model, dict(arguments)))
        for how in upcycled:
            twin = upcycle(twin, **how)
        for how in split:
            twin = split_again(twin, **how)
        twin = put_layers(twin, **changed)
    shapes, expected = ({n: t.shape for n, t in joined_state(m).items()} for m in (model, twin))
    if other := sorted(n for n in shapes.keys() | expected.keys() if shapes.get(n) != expected.get(n)):
        raise ValueError(
            f"save_pretrained: timm's {name} with this model's arguments has other tensors ({some(other)}); "
            "a model that was changed after it was made can be stored by its state_dict"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder in timm's layout; raises ValueError for another."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: not valid JSON ({error})") from None
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise ValueError(f"{folder / CONFIG}: not a configuration of timm: it names no architecture")
    return config


def _weights(folder: Path) -> Path:
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder / WEIGHTS}: no such file (pickled weights are not read)")
    return folder / WEIGHTS


def _check_classes(where: Path, stored: int, wanted: int | None, new_head: bool) -> None:
    if new_head and not wanted:
        raise ValueError("new_head=True needs num_classes, the number of classes of the new head")
    if wanted and wanted != stored and not new_head:
        raise ValueError(
            f"{where}: the checkpoint's head has {stored} classes, num_classes={wanted} was asked for; "
            "give new_head=True to start a new head"
        )


def _published_name(found: Mapping[str, Any]) -> str:
    """The registered architecture nearest to the shapes; every argument is given beside it."""
    soft = isinstance(found["router"], Mapping)
    size = (SOFT_SIZES if soft else VMOE_SIZES).get(found["embed_dim"])
    name = f"{'soft_moe' if soft else 'vmoe'}_{size}_patch{found['patch_size'][0]}_224"
    return name if timm.is_model(name) else "soft_moe_tiny_test" if soft else "vmoe_tiny_test"


def _build(
    name: str,
    arguments: Mapping[str, Any],
    cfg: Mapping[str, Any],
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
    draw: bool = False,
) -> Any:
    """timm's model of that name, its weights undrawn unless asked for."""
    overlay = {**cfg, "num_classes": arguments["num_classes"]}
    if "img_size" in arguments:
        side = arguments["img_size"]
        height, width = (side, side) if isinstance(side, int) else side
        overlay["input_size"] = (arguments.get("in_chans", 3), height, width)
    place: Any = {"device": None if device is None else torch.device(device), "dtype": resolve_dtype(dtype)}
    with nullcontext() if draw else Unset():  # weights are about to be read
        return timm.create_model(name, pretrained_cfg_overlay=overlay, **arguments, **place)


def _takes_any_size(architecture: str) -> bool:
    """Whether it has no argument for the size of images, as convolutional networks have none."""
    known = timm.get_pretrained_cfg(architecture, allow_unregistered=True)
    return known is not None and not known.fixed_input_size


def _assumed(model: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that neither arrays nor configuration nor the user gave, with the values in use."""
    router: Any = next((m.router for m in model.modules() if isinstance(m, MoE)), None)
    inside = known["router"] if isinstance(known["router"], Mapping) else {}
    found: dict[str, Any] = {} if "img_size" in known else {"img_size": tuple(model.patch_embed.img_size)}
    for name in ("k", "capacity", "noise_std"):
        if name not in {*known, *inside} and hasattr(router, name):
            found[name] = getattr(router, name)
    if hasattr(router, "group_sequences") and "group_size" not in inside and "group_images" not in known:
        found["group_images"] = router.group_sequences
    return found
