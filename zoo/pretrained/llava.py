"""A LLaVA (2304.08485) out of its parts: a pretrained language model, a pretrained vision tower, a fresh projector."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..data.processors import TOWERS
from ..nearest import unknown
from . import folder as files
from . import hub
from .language import resolve_dtype


def join(
    language_model: str | os.PathLike[str],
    vision_tower: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    vocab_size: int | None = None,
    vision_feature_layer: int = -2,
) -> Any:
    """transformers' LlavaForConditionalGeneration of two folders or hub repositories, to be trained from there.

    The projector is two linear layers with GELU between them, initialised as torch does, as LLaVA's. A bias of the
    head, which Phi has, is left out, as LLaVA and MoE-LLaVA do. vocab_size makes room for a token of images where the
    language model has none to spare: the new embeddings are drawn around the mean of the others. The last id stands for
    images until `model.config.image_token_id` says otherwise.
    Raises ValueError for a vision tower that is no CLIP or SigLIP, a vocabulary that would lose tokens, and missing
    tensors; FileNotFoundError and ConnectionError where there is nothing to read.
    """
    from transformers import AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    kind = resolve_dtype(dtype)
    tower = _tower(hub.local_folder(vision_tower), kind)
    text = _read(AutoModelForCausalLM, hub.local_folder(language_model), kind)
    size = text.get_input_embeddings().num_embeddings
    if vocab_size is not None and vocab_size < size:
        raise ValueError(f"vocab_size={vocab_size}: {language_model} has {size} tokens, which are kept")
    if vocab_size is not None:
        text.resize_token_embeddings(vocab_size)
    config = LlavaConfig(
        text_config=text.config,
        vision_config=tower.config,
        image_token_index=text.config.vocab_size - 1,
        projector_hidden_act="gelu",
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy="default" if tower.config.model_type == TOWERS[0] else "full",
        tie_word_embeddings=text.config.tie_word_embeddings,
    )
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration._from_config(config)
    model.model.vision_tower, model.model.language_model = tower, text.get_decoder()
    model.model.multi_modal_projector = LlavaMultiModalProjector(config).to(kind)
    model.lm_head.weight = text.get_output_embeddings().weight
    model.generation_config = text.generation_config
    return model.eval()


def _tower(folder: Path, dtype: torch.dtype | None) -> Any:
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder)
    config = getattr(config, "vision_config", config)
    if config.model_type not in TOWERS:
        raise unknown(f"vision tower in {folder}", config.model_type, TOWERS)
    return _read(AutoModel, folder, dtype, config=config)


def _read(found: Any, folder: Path, dtype: torch.dtype | None, **options: Any) -> Any:
    files._entries(folder)  # names the file that is missing or damaged
    given = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True, **options}
    model, report = found.from_pretrained(folder, dtype=dtype or torch.get_default_dtype(), **given)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{folder}: {files._some(missing)} missing; {model.config.model_type} needs them")
    return model
