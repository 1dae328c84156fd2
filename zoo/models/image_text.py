"""Models from images and text to text: transformers' families on our MoE layers, by name.

MODELS is data: a family (transformers' model_type, or moe_llava) and the fields of its configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..nearest import unknown
from .image_text_sizes import MODELS

if TYPE_CHECKING:
    import torch
    from torch import nn


def build(
    name: str,
    *,
    router: Any = None,
    losses: Mapping[str, Any] | None = None,
    capacity: Any = None,
    backend: str = "auto",
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    **fields: Any,
) -> nn.Module:
    """The model called `name` with fresh weights: transformers' class of its family, its sparse blocks on `MoE`.

    router, losses, capacity and backend are as in `zoo.models.language.build`. All other keywords are fields of the
    family's configuration; a mapping, such as text_config={"num_hidden_layers": 4}, changes only what it names. A
    MoE-LLaVA is a llava, upcycled with the options `moe` of `zoo.models.moe_llava.sparse`, or with moe=False as it is.
    Raises ValueError naming the nearest fields or gates for an unknown one.
    """
    from ..pretrained import image_text
    from ..pretrained.language import resolve_dtype
    from . import moe_llava

    moe: Any = fields.pop("moe", {}) if MODELS[name][0] == "moe_llava" else False
    config = configuration(name, **fields)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    found = image_text.class_of(config.model_type)
    model = found._from_config(config, dtype=resolve_dtype(dtype), **options)
    given = {"backend": backend, "router": router, "losses": losses, "capacity": capacity}
    if moe is False:
        return image_text.put_layers(model, **given)
    return moe_llava.sparse(model, **given, **(moe or {}))


def configuration(name: str, **fields: Any) -> Any:
    """transformers' configuration of the model called `name`, with `fields` changed; ValueError for unknown ones."""
    from ..pretrained.image_text import class_of

    if name not in MODELS:
        raise unknown("vision-language model", name, MODELS)
    model_type, preset = MODELS[name]
    config_class = class_of("llava" if model_type == "moe_llava" else model_type).config_class
    plain = config_class(**preset)
    for field, value in fields.items():
        _check_field(plain, field)
        if isinstance(value, Mapping) and hasattr(getattr(plain, field), "model_type"):
            for inner in value:
                _check_field(getattr(plain, field), inner)
    merged = {**preset, **{f: {**preset.get(f, {}), **v} if isinstance(v, Mapping) else v for f, v in fields.items()}}
    return config_class(**merged)


def _check_field(config: Any, field: str) -> None:
    known = {*config.to_dict(), *config.attribute_map, "head_dim"}
    if field not in known:
        shortcuts = {"router", "losses", "capacity", "backend", "dtype", "attn_implementation"}
        raise unknown(f"override of {config.model_type}", field, known | shortcuts)
