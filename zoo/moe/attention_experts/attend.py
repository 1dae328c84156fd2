"""What attention experts share: which keys a query sees, the keys and values kept from before, and the product itself.

B batch, S queries, K keys (those kept first, then the new ones), H heads, d the width of a head.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Cache(Protocol):
    """What a layer asks of a cache: `KeyValues`, or a layer of a `transformers` cache, such as cache.layers[i]."""

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values [B, H, S, d], and give all that were kept, [B, H, K, d]."""


class KeyValues:
    """Keys and values of one layer, [B, H, K, d] each: those of the tokens so far. One a layer and generation."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, H, S, d], and give them all."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys, values
        return keys, values


def checked(
    layer: str, x: Tensor, dim: int, mask: Tensor | None, context: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """Tokens x [B, S, D], zero where padding, and what the router gets: the mask [B, S] of these tokens added.

    mask [B, K] is of the kept tokens too; its last S columns are those of x.
    Raises ValueError where tokens come as one list or are of another width than `dim`, or a mask is of fewer tokens.
    """
    if x.dim() != 3:
        raise ValueError(f"{layer} attends within sequences: expected tokens as [B, S, D], got {list(x.shape)}")
    if x.shape[-1] != dim:
        raise ValueError(f"{layer}: expected tokens [B, S, {dim}], got {list(x.shape)}")
    if mask is None:
        return x, context
    if mask.dim() != 2 or mask.shape[0] != x.shape[0] or mask.shape[1] < x.shape[1]:
        raise ValueError(
            f"{layer}: expected a mask [B, K] of the tokens and those in the cache before them, "
            f"got {list(mask.shape)} for tokens {list(x.shape)}"
        )
    here = mask[:, mask.shape[1] - x.shape[1] :].bool()
    return x.where(here.unsqueeze(-1), 0), {**context, "mask": here}


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    mask: Tensor | None,
    position: Tensor | None = None,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(query key^T / sqrt(d)) value: query [B, G*H, S, d] against key, value [B, H, K, d] gives [B, G*H, S, d].

    Query heads that share a key head are adjacent. mask [B, K] is False for keys that are padding. position [B, H, S]
    is which of the keys a query itself is; without it queries are the last S keys. attention_mask [B or 1, 1, N, K],
    True where one of the last N keys, as a query, sees a key, takes the place of both causal and mask. A query always
    sees something, so that one that is padding stays finite: itself, or with an attention_mask all keys.
    Raises ValueError for a mask of another length than the keys.
    """
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is not None:
        mask, whole = None, False
        if attention_mask.dim() != 4 or attention_mask.shape[3] != keys:
            raise ValueError(
                f"attention: expected an attention_mask [B or 1, 1, S, {keys}], got {list(attention_mask.shape)}"
            )
    elif mask is not None and mask.shape[1] != keys:
        raise ValueError(f"attention: the mask is of {mask.shape[1]} tokens, but there are {keys} keys")
    else:
        whole = causal and mask is None and position is None and queries == keys
    seen = None
    if attention_mask is not None:
        seen = _rows(attention_mask, position, query)
    elif not whole and (mask is not None or (causal and (queries > 1 or position is not None))):
        if position is None:
            position = torch.arange(keys - queries, keys, device=query.device)
        seen = _visible(position, keys, causal, mask)
    # Not the comparison itself: traced, it is no bool.
    grouped = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    return F.scaled_dot_product_attention(query, key, value, seen, dropout, whole, **grouped)


def busiest(counts: Tensor) -> int:
    """The largest of the counts [N], N > 0, at least one; compiled, at least two, so that one graph does for all."""
    least = 2 if torch.compiler.is_compiling() else 1
    most = int(counts.max().clamp(min=least))
    torch._check(most >= least)
    return most


def _visible(position: Tensor, keys: int, causal: bool, mask: Tensor | None) -> Tensor:
    """Which keys queries at position [.., S] see, [B or 1, .., S, K]."""
    position = position.unsqueeze(-1)
    key = torch.arange(keys, device=position.device)
    seen = key <= position if causal else torch.ones_like(key, dtype=torch.bool)
    return seen if mask is None else (seen & mask[:, None, None].bool()) | (key == position)


def _rows(attention_mask: Tensor, position: Tensor | None, query: Tensor) -> Tensor:
    """The rows of an attention mask that belong to queries [B, H, S, d]; one that sees nothing, padding, sees all."""
    rows, keys = attention_mask.shape[2:]
    seen = attention_mask | ~attention_mask.any(-1, keepdim=True)
    if position is None:
        return seen
    place = (position - (keys - rows)).unsqueeze(-1).expand(*query.shape[:3], keys)
    return seen.expand(*query.shape[:2], rows, keys).gather(2, place)
