"""MEO: top-k gating of whole sequences, and the chosen experts' weights merged into one."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..blend import Blend
from .merging import pool, prepared, sequence_offsets
from .topk import TopKRouter

LOSS_WEIGHT = 1e-2
REDUCTION = 64  # of the token attention's width, as in the authors' code


class MEORouter(TopKRouter):
    """Merging experts into one (2310.09832, section 3): theta = sum of g_e theta_e, e the k best experts of a sequence.

    g is Shazeer's noisy top-k gate on the mean of the sequence's tokens: softmax over the k largest of
    x W_g + N(0, 1) (softplus(x W_n) + 0.01), noise in training only, W_g and W_n zero at first. Losses are importance
    and load with weight 0.01, with the unbiased variance, as in the authors' code (`TopKRouter` has the biased one).
    token_attention (the code's level "token") adds W_up relu(W_down x) of width D / 64 to every token first, zero at
    the beginning; without it this is level "sequence". The code merges each linear layer of an MLP by a gate of its
    own; here one gate merges both. Padding has no part in the mean.

    All tokens of a sequence see each other: not for causal models; with the context causal=True the router warns, once.
    Context: mask. Other options as in `TopKRouter`. Raises ValueError where tokens come as one list.
    """

    merges = True

    def __init__(self, dim: int, num_experts: int, k: int = 2, *, token_attention: bool = True, **options: Any) -> None:
        loss = {"weight": LOSS_WEIGHT, "correction": 1}
        defaults = {"score": "softmax_topk", "noise": "learned", "losses": {"importance": loss, "load": loss}}
        super().__init__(dim, num_experts, k, **{**defaults, **options})
        width = max(1, dim // REDUCTION)
        self.attention_down = nn.Linear(dim, width) if token_attention else None
        self.attention_up = nn.Linear(width, dim) if token_attention else None
        self._warned = False
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The gate as in `TopKRouter`; of the attention all is zero but W_down."""
        super().reset_parameters()
        down, up = getattr(self, "attention_down", None), getattr(self, "attention_up", None)
        if down is not None and up is not None:  # not yet, when the parent class is made
            nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
            for tensor in (down.bias, up.weight, up.bias):
                nn.init.zeros_(tensor)

    def forward(self, x: Tensor, **context: Any) -> Blend:  # type: ignore[override]
        """Merge experts for each sequence of tokens x [B, S, D]."""
        if context.get("causal") and not self._warned:
            self._warned = True
            warnings.warn("MEORouter in a causal model: a token's output depends on later ones", stacklevel=2)
        x, mask, exact = prepared("MEORouter", x, context.get("mask"), self.dtype)
        flat, added = None if mask is None else mask.flatten(), None
        with exact:
            if self.attention_down is not None and self.attention_up is not None:
                added = _linear(_linear(x, self.attention_down).relu(), self.attention_up)
                x = x + (added if mask is None else added.where(mask.unsqueeze(-1), 0))
                added = added.flatten(0, 1)
            pooled, known = pool(x, mask)
            routing = super().forward(pooled, mask=None if mask is None else known)
        return Blend(routing.dense(), sequence_offsets(x), x.shape[0] * x.shape[1], flat, routing.losses, added)


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
