"""`from_pretrained` and `save_pretrained`: which reader or writer a source or a model needs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import extras
from ..convert import adapter_folder
from . import causal, few_bits, hub, image_text, moe_llava, recommendation, switch, vision_language
from . import folder as language
from .peek import peek
from .vmoe import is_prefix

HUB = ("revision", "cache_dir", "local_files_only", "token")
LAYOUTS = {
    "timm": "an image classifier",
    "recommendation": "a recommendation model",
    "limoe": "a LIMoE",
    "transformers": "a model of text, or of images and text",
}


@extras.named()
def from_pretrained(source: str | os.PathLike[str], **options: Any) -> Any:
    """A published checkpoint as a model on our layers, in eval mode.

    source: a folder, or a hub repository id (then revision, cache_dir, local_files_only and token are the hub's), in
    transformers' layout (a language model, `zoo.pretrained.folder.from_pretrained` says which options it takes; one
    from images to text, `zoo.pretrained.image_text.from_pretrained`; or a Switch Transformer), MoE-LLaVA's
    (`zoo.pretrained.moe_llava.from_pretrained`), timm's (`zoo.pretrained.vision.from_timm`) or our own of a
    recommendation model (`zoo.pretrained.recommendation.load`), a LIMoE (`zoo.pretrained.vision_language.load`) or
    adapters, ours or a LoRA of peft's (`zoo.convert.adapter_folder.load`; `base` is the model they stand beside); or
    the prefix of an original V-MoE checkpoint (`from_vmoe`). All take dtype and device, all but recommendation and
    adapters router, losses, capacity and backend. Raises what these do, naming file and tensor, and ValueError for
    quantise and offload of another layout than transformers'.
    """
    name = str(source).removesuffix(".index")
    if is_prefix(name) or _has_shards(name):
        return _named(_vision().from_vmoe(name, **options), name)
    path = hub.local_folder(source, **{key: options.pop(key) for key in HUB if key in options})
    if adapter_folder.is_adapted(path):
        return adapter_folder.load(path, **options)
    others = (_is_timm, recommendation.is_recommendation, vision_language.is_vision_language, moe_llava.is_moe_llava)
    key = next((key for key in ("quantise", "offload") if options.get(key) is not None), None)
    if key is not None and any(is_other(path) for is_other in others):
        raise ValueError(
            f"from_pretrained: {key} is for transformers' layout; read {path} whole, then zoo.{key}(model)"
        )
    if recommendation.is_recommendation(path):
        return recommendation.load(path, **options)
    if _is_timm(path):
        return _named(_vision().from_timm(path, **options), source)
    if vision_language.is_vision_language(path):
        return _named(vision_language.load(path, **options), source)
    if moe_llava.is_moe_llava(path):
        return _named(moe_llava.from_pretrained(path, **options), source)
    if image_text.is_image_text(path):
        return _named(image_text.from_pretrained(path, **options), source)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path / 'config.json'}: no such file; expected a folder of save_pretrained's, or the hub's"
        )
    reader = switch if switch.is_switch(path) else language if language.has_table(path) else causal
    return _named(reader.from_pretrained(path, **options), source)


def layout_of(source: str | os.PathLike[str]) -> str | None:
    """Which of LAYOUTS a folder, or a V-MoE checkpoint's prefix, on this machine has; None for adapters and elsewhere.

    "transformers" stands for MoE-LLaVA's too.
    """
    name = str(source).removesuffix(".index")
    if is_prefix(name) or _has_shards(name):
        return "timm"
    path = Path(source).expanduser()
    if not (path / "config.json").is_file() or adapter_folder.is_adapted(path):
        return None
    known = (
        ("timm", _is_timm),
        ("recommendation", recommendation.is_recommendation),
        ("limoe", vision_language.is_vision_language),
    )
    return next((layout for layout, has in known if has(path)), "transformers")


@extras.named()
def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
    peft: bool = False,
) -> None:
    """Write a model in its family's own published layout: transformers', timm's (one file always), or ours of
    recommendation models and LIMoE; of a model from `zoo.adapt` the adapters alone, in a folder of ours, or with `peft`
    a LoRA as peft does (`zoo.convert.adapter_peft.write`), for whatever else reads such folders.

    See `zoo.pretrained.folder.save_pretrained`, `zoo.pretrained.image_text.save`, `zoo.pretrained.vision.save_timm`,
    `zoo.pretrained.recommendation.save`, `zoo.pretrained.vision_language.save`, `zoo.convert.adapter_folder.save`.
    Nothing half written is left behind, and a folder that is not empty is only written to with `overwrite`. Of
    transformers' models, state_dict is written instead of the model's own tensors where it is given, by the model's own
    names.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    if getattr(model, "adapted", None):
        return adapter_folder.save(model, folder, overwrite=overwrite, state_dict=state_dict, peft=peft)
    if peft:
        raise ValueError(f"save_pretrained: peft's layout is for LoRA, {type(model).__name__} has no adapters")
    _check(model)
    made: Any = getattr(model, "made_with", None)
    if made and made["network"].startswith("vision_language/"):
        return vision_language.save(model, folder, overwrite=overwrite)
    if made:
        return recommendation.save(model, folder, overwrite=overwrite)
    if hasattr(model, "pretrained_cfg"):
        return _vision().save_timm(model, folder, overwrite=overwrite)
    writer: Any
    if getattr(getattr(model, "config", None), "model_type", None) == switch.MODEL_TYPE:
        writer = switch.save
    elif image_text.is_wrapper(model) or causal.is_ours(model):
        writer = image_text.save
    else:
        writer = language.save_pretrained
    return writer(model, folder, max_shard_size=max_shard_size, overwrite=overwrite, state_dict=state_dict)


def check_savable(model: nn.Module) -> None:
    """Raise what `save_pretrained` would of a model that has no layout, as far as it shows before anything is written.

    For whoever trains first and saves afterwards. Language models have `zoo.pretrained.causal.check_published`.
    """
    model = getattr(model, "_orig_mod", model)
    if getattr(model, "adapted", None):
        return
    _check(model)
    made: Any = getattr(model, "made_with", None)
    if made and made["network"].startswith("vision_language/"):
        vision_language.stored(model)
    elif hasattr(model, "pretrained_cfg"):
        _vision().stored(model)
    elif not made and image_text.is_wrapper(model):
        image_text.check(model)


def _check(model: nn.Module) -> None:
    few_bits.check(model)
    made: Any = getattr(model, "made_with", None)
    if made and getattr(model, "reshaped", False):
        raise ValueError(
            f"save_pretrained: {made['network']} was changed by to_dense or prune, which its arguments cannot say; "
            "keep its state_dict"
        )


def _named(model: Any, source: str | os.PathLike[str]) -> Any:
    """A model that says where it was read from, as transformers' do: adapters and trainers look for it there."""
    model.name_or_path = str(source)
    if hasattr(getattr(model, "config", None), "name_or_path"):
        model.config.name_or_path = str(source)
    return model


def _vision() -> Any:
    from . import vision

    return vision


def _has_shards(prefix: str) -> bool:
    path = Path(prefix).expanduser()
    return path.parent.is_dir() and any(path.parent.glob(f"{path.name}.data-*-of-*"))


def _is_timm(folder: Path) -> bool:
    """Whether config.json is timm's: it names an architecture, and no model_type."""
    config = peek(folder)
    return "architecture" in config and "model_type" not in config
