"""Sentence-level gating: all tokens of a sentence go where their mean goes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import autocast
from ..routing import Routing
from .gshard import GShardRouter
from .merging import pool


class SentenceRouter(GShardRouter):
    """Sentence-level MoE (2110.03742, section 3): GShard's top-2 gate on the mean token of each sentence.

    As in lingvo, padding has no part in the mean, second="all", and capacity and loss are those of tokens. A sentence
    is a sequence [B, S, D], or, with the context segment_ids [B, S], the tokens of one id in a sequence; tokens given
    as one list are one sentence. Later tokens decide for earlier ones: not for causal models. Context: mask,
    segment_ids. Options as in `GShardRouter`, but jitter and noise, which would part the tokens of a sentence, and with
    no capacity by default.

    Raises ValueError for jitter, noise and a segment_ids of another shape than the tokens.
    """

    def __init__(self, dim: int, num_experts: int, **options: Any) -> None:
        if options.get("jitter") or options.get("noise"):
            raise ValueError("SentenceRouter: jitter and noise differ between the tokens of a sentence; leave them out")
        super().__init__(dim, num_experts, **{"second": "all", "capacity": None, **options})

    def forward(self, x: Tensor, **context: Any) -> Routing:
        """Route tokens x [T, D] or [B, S, D] by the means of their sentences."""
        shape = x.shape[:-1]
        if x.dtype != torch.float64:
            x = x.to(self.dtype or x.dtype)
        rows = x if x.dim() == 3 else x[None]
        mask, segments = context.get("mask"), context.get("segment_ids")
        if mask is not None:
            mask = mask.reshape(rows.shape[:2]).bool()
            rows = rows.where(mask.unsqueeze(-1), 0)  # a masked token may hold anything, even nan
        if segments is None:
            mean = pool(rows, mask)[0].unsqueeze(1).expand(rows.shape)
        elif segments.shape != shape:
            raise ValueError(f"SentenceRouter: segment_ids has shape {list(segments.shape)}, expected {list(shape)}")
        else:
            # A mean by products of rows, for ids of any size.
            segments = segments.reshape(rows.shape[:2])
            same = segments[:, :, None] == segments[:, None, :]
            same = (same if mask is None else same & mask[:, None, :]).to(rows.dtype)
            with autocast.off(x):
                mean = same @ rows / same.sum(-1, keepdim=True).clamp(min=1)
        return super().forward(mean.reshape(*shape, self.dim), **context)
