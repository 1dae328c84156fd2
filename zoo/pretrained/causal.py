"""Language models of the families that `zoo.pretrained.language` has no table of its own for.

transformers reads and writes them, as it does vision-language models (`zoo.pretrained.image_text`): their sparse blocks
are on our layers where `zoo.pretrained.sparse_rows` has a row for them, and else keep transformers' gates, their
experts on our kernels. A dense one is transformers' own as it is, for `zoo.upcycle`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from torch import nn

from ..moe import MoE
from . import few_bits, image_text
from .context import decoder_of
from .language import TABLES, resolve_dtype
from .sparse_blocks import adopt_blocks, check_gates
from .sparse_relatives import published_config
from .sparse_rows import BLOCKS


@functools.cache
def known_types() -> dict[str, str]:
    """transformers' model types of causal language models, and the class of each."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names

    return image_text.first_classes(names)


def class_of(model_type: str, where: str = "") -> Any:
    """transformers' class of a language model type; raises ValueError naming the nearest ones."""
    return image_text.named_class(f"language family{where}", model_type, known_types())


def from_pretrained(folder: Path, **options: Any) -> Any:
    """A published checkpoint as transformers' model; options and errors as `zoo.pretrained.image_text`'s."""
    return image_text.from_pretrained(folder, find=class_of, **options)


def build(
    config: Any, *, dense: bool = False, dtype: Any = None, attn_implementation: str | None = None, **gates: Any
) -> Any:
    """A fresh model of a configuration, or its dense twin; gates are the options of `image_text.put_layers`.

    Raises ValueError for the dense twin of a family without a row in `sparse_rows`.
    """
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model = class_of(config.model_type)._from_config(config, dtype=resolve_dtype(dtype), **options)
    if not dense:
        return image_text.put_layers(model, **gates)
    if not adopt_blocks(model, dense=True):
        raise ValueError(f"dense: {config.model_type} has no sparse blocks of ours")
    return model


def is_ours(model: nn.Module) -> bool:
    """Whether a language model came from here, so that `zoo.pretrained.image_text.save` writes it."""
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type in TABLES or model_type not in known_types() or not hasattr(model, "get_decoder"):
        return False
    return decoder_of(model).config.model_type in BLOCKS or not any(isinstance(m, MoE) for m in model.modules())


def check_published(model: nn.Module) -> None:
    """Raise TypeError for a language model that no published layout has a place for, ValueError naming what differs.

    Adapters have a folder of their own, whatever they stand beside.
    """
    if getattr(model, "adapted", None):
        return
    few_bits.check(model)
    if is_ours(model):
        image_text.check_reshaped(model)
        check_gates(model)
    else:
        published_config(model)
