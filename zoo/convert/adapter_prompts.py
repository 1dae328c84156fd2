"""Soft prompts before the tokens of a transformers language model: its decoder is called with more than it was given.

What comes out is cut back to the tokens, so that labels, logits and generation know nothing of prompts. With a cache
they are in front of the first tokens, and later calls only count them in mask and positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..moe import PromptMixture
from ..pretrained.context import KEY, decoder_of
from ..pretrained.decoders import CACHES

NAME = "soft_prompts"


def decoder_name(model: nn.Module) -> str:
    """Where the decoder is whose tokens get prompts; raises ValueError for a model that has none."""
    config: Any = getattr(model, "config", None)
    if not hasattr(model, "get_decoder") or getattr(config, "is_encoder_decoder", True):
        raise ValueError(f"adapt: soft prompts need a language model of one stack, got {type(model).__name__}")
    decoder = decoder_of(model)
    if hasattr(decoder, NAME):
        raise ValueError("adapt: the model has soft prompts already")
    return next(name for name, module in model.named_modules() if module is decoder)


def attach(decoder: Any, prompts: PromptMixture) -> None:
    """Let a decoder put prompts before its tokens."""
    decoder.add_module(NAME, prompts)
    decoder.register_forward_pre_hook(_before, with_kwargs=True, prepend=True)
    decoder.register_forward_hook(_after, with_kwargs=True)


def _before(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if len(args) > 1:
        raise ValueError(f"soft prompts: call {type(decoder).__name__} with keywords besides input_ids")
    ids = kwargs.get("input_ids", args[0] if args else None)
    given = kwargs.get("inputs_embeds")
    x: Tensor = decoder.get_input_embeddings()(ids) if given is None else given
    prompts: PromptMixture = decoder.soft_prompts
    mask = kwargs.get("attention_mask")
    cache = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        found = list(mask.shape) if isinstance(mask, Tensor) else f"a {type(mask).__name__} of masks"
        raise ValueError(f"soft prompts: {type(decoder).__name__} expected an attention_mask [B, S], got {found}")
    begun = cache is not None and cache.get_seq_length() > 0
    prompts.before = 0 if begun else prompts.length
    if not begun:
        told = {name: value for name, value in (kwargs.get(KEY) or {}).items() if name not in ("mask", "token_ids")}
        first = prompts(x, None if mask is None else mask[:, -x.shape[1] :], **told)
        x = torch.cat([first.to(x.dtype), x], dim=1)
    kwargs = {**kwargs, "inputs_embeds": x, "input_ids": None}
    if mask is not None:
        kwargs["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], prompts.length), mask], dim=1)
    for name in ("position_ids", "cache_position"):
        if (positions := kwargs.get(name)) is not None:
            start = torch.arange(prompts.before, device=positions.device).expand(*positions.shape[:-1], -1)
            kwargs[name] = torch.cat([start, positions + prompts.length], dim=-1)
    return (), kwargs


def _after(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    cut = decoder.soft_prompts.before
    if isinstance(out, tuple):
        return (out[0][:, cut:], *out[1:])
    out.last_hidden_state = out.last_hidden_state[:, cut:]
    return out
