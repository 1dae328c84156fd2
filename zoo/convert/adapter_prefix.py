"""Prefixes in the attention of any transformers model: keys and values of their own before those of the tokens.

Attention hands queries, keys and values to a function that its config names. An attention module with a prefix has a
config of its own, which names a function that puts the prefix there, widens mask and position bias to what every token
may see, and calls the one that the model's config names.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..moe import GatedPrefix

NAME = "gated_prefix"
KNOWN = ("eager", "sdpa")


def attach(attention: Any, prefix: GatedPrefix) -> None:
    """Let an attention module put a prefix before its keys and values."""
    _register()
    attention.add_module(NAME, prefix)
    beneath, own = attention.config, copy.copy(attention.config)
    own._attn_implementation_internal, own.beneath = NAME, beneath
    attention.config = own
    attention.register_forward_pre_hook(_before, with_kwargs=True)
    attention.register_forward_hook(_after)


def heads_of(attention: Any, keys: int, values: int) -> tuple[int, int, int]:
    """How many heads keys have, and the widths of one head's keys and values; raises ValueError where none is known."""
    names = ("head_dim", "attention_head_size", "key_value_proj_dim")
    size = next((getattr(attention, name) for name in names if isinstance(getattr(attention, name, None), int)), 0)
    if not size or keys % size or not hasattr(attention, "config"):
        raise ValueError(
            f"adapt: UniPELT has prefixes for transformers' attention alone, not for {type(attention).__name__}; leave "
            'them out with rank={"prefix": 0}'
        )
    if hasattr(attention, NAME):
        raise ValueError(f"adapt: UniPELT: {type(attention).__name__} has a prefix already")
    heads = keys // size
    return heads, size, values // heads


def _before(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not torch.compiler.is_compiling():
        _register()  # the model may have come from another process
    x: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    attention._prefix_now = attention.gated_prefix(x)


def _after(attention: Any, args: tuple[Any, ...], out: Any) -> None:
    attention._prefix_now = None


def _register() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _with_prefix)


def _with_prefix(
    attention: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = attention.config.beneath._attn_implementation
    if name not in KNOWN:
        raise ValueError(f"UniPELT: prefixes are known to {' and '.join(KNOWN)} attention, not to {name!r}")
    home: Any = sys.modules[type(attention).__module__]  # where a family's eager attention is
    function = ALL_ATTENTION_FUNCTIONS.get_interface(name, home.eager_attention_forward)
    more = [part.to(query.dtype) for part in attention._prefix_now]
    length, queries, keys = more[0].shape[2], query.shape[2], key.shape[2]
    key, value = torch.cat([more[0], key], dim=2), torch.cat([more[1], value], dim=2)
    if attention_mask is None and name == "sdpa" and queries > 1:
        causal = kwargs.get("is_causal")
        if getattr(attention, "is_causal", True) if causal is None else causal:
            attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=key.device).tril(keys - queries)[
                None, None
            ]
    if attention_mask is not None:
        attention_mask = F.pad(attention_mask, (length, 0), value=attention_mask.dtype == torch.bool)
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = F.pad(kwargs["position_bias"], (length, 0))
    out, weights = function(attention, query, key, value, attention_mask, **kwargs)
    return out, None if weights is None else weights[..., length:]
