"""Sequences of several documents in transformers' language models: which families keep documents apart, and how.

Most see from positions that start again where a document begins, and mask attention so. Some build their masks without
looking at positions, but take ready ones. Others carry a state from token to token, or attend to several tokens as one
(DeepSeek-V4), documents or not.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .context import decoder_of

# By the model_type of the language model's configuration.
MASKS_GIVEN = ("afmoe", "gpt_oss")
CARRIES_STATE = (
    "bailing_hybrid",
    "deepseek_v4",
    "granitemoehybrid",
    "jamba",
    "kimi_linear",
    "lara_mini",
    "lfm2_moe",
    "minimax",
    "nemotron_h",
    "qwen3_5_moe_text",
    "qwen3_next",
    "qwen4_exp_text",
    "zaya",
)


def mask_arguments(model: Any, position_ids: Tensor) -> dict[str, Any]:
    """What a model must be given, beside positions [B, S] that start again with each document, to keep these apart."""
    config = decoder_of(model).config
    if config.model_type not in MASKS_GIVEN:
        return {}
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    like = next(model.parameters()).new_empty(1).expand(*position_ids.shape, 1)
    given = (config, like, None, None, position_ids)
    return {
        "attention_mask": {
            "full_attention": create_causal_mask(*given),
            "sliding_attention": create_sliding_window_causal_mask(*given),
        }
    }


def carries_state(model: Any) -> bool:
    """Whether a token of one document hears of the documents before it in the sequence, whatever is masked."""
    return decoder_of(model).config.model_type in CARRIES_STATE
