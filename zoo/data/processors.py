"""A processor for a LLaVA that has none: its tokenizer with a token for images, and what its vision tower takes."""

from __future__ import annotations

import tempfile
from typing import Any

from ..nearest import unknown
from .captions import IMAGE_TOKEN
from .tokenizer import Tokenizer

TOWERS = ("clip_vision_model", "siglip_vision_model")


def llava_processor(tokenizer: Tokenizer, config: Any) -> Any:
    """transformers' `LlavaProcessor` for a model with this configuration.

    Raises ValueError for a model that is no LLaVA, and for a vision tower whose preparation is not known.
    """
    from transformers import CLIPImageProcessor, LlavaProcessor, SiglipImageProcessor

    if config.model_type != "llava":
        raise ValueError(f"a {config.model_type} has a processor of its own; name its folder as data.processor")
    vision = config.vision_config
    if vision.model_type not in TOWERS:
        raise unknown("vision tower to prepare images for", vision.model_type, TOWERS)
    side = vision.image_size
    if vision.model_type == TOWERS[0]:
        images: Any = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    else:
        images = SiglipImageProcessor(size={"height": side, "width": side})
    return LlavaProcessor(
        images,
        with_image_token(tokenizer),
        patch_size=vision.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(vision.model_type == TOWERS[0]),  # the class token
    )


def with_image_token(tokenizer: Tokenizer) -> Any:
    """A fast tokenizer of transformers, with the special token <image>."""
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        fast = PreTrainedTokenizerFast.from_pretrained(folder)
    # The data pipeline of language models reads special tokens as text, this one must not.
    fast.backend_tokenizer.encode_special_tokens = False
    if IMAGE_TOKEN not in fast.get_vocab():
        fast.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    return fast
