"""Gates that merge experts: their weights are averaged, once a group of tokens, and only the average is run."""

from __future__ import annotations

import math
import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import autocast
from ..blend import Blend
from .base import Router


class SMEARRouter(Router):
    """SMEAR (2306.03745, section 3): one expert a sequence, theta = sum_e p_e theta_e, weights and biases alike.

    p = softmax(LN(mean of the sequence's tokens) LN(W)^T), both layer norms with their own scale and shift, as in the
    authors' code: W [E, D] starts at N(0, 0.01^2), the scale of its norm at 0.01, and there is no bias. dropout zeroes
    each expert of a sequence with that probability in training and divides p by its sum, 1e-10 added to each first; 0.1
    in the paper, 0 in the code and here. Padding has no part in the mean (the code averages it in).

    All tokens of a sequence see each other: not for causal models; with the context causal=True the router warns, once.
    Context: mask. Raises ValueError where tokens come as one list, and for a dropout outside [0, 1).
    """

    merges = True

    def __init__(
        self, dim: int, num_experts: int, *, dropout: float = 0.0, dtype: torch.dtype | None = torch.float32
    ) -> None:
        super().__init__(dim, num_experts)
        if not 0 <= dropout < 1:
            raise ValueError(f"SMEARRouter: dropout must be in [0, 1), got {dropout}")
        self.dropout, self.dtype = dropout, dtype
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.input_norm, self.weight_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self._warned = False
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W, and set the norms as the authors' code does."""
        self.weight.normal_(std=0.01)
        for norm, scale in ((self.input_norm, 1.0), (self.weight_norm, 0.01)):
            norm.weight.fill_(scale)
            norm.bias.zero_()

    def forward(self, x: Tensor, **context: Any) -> Blend:
        """Merge experts for each sequence of tokens x [B, S, D]."""
        if context.get("causal") and not self._warned:
            self._warned = True
            warnings.warn("SMEARRouter in a causal model: a token's output depends on later ones", stacklevel=2)
        x, mask, exact = prepared("SMEARRouter", x, context.get("mask"), self.dtype)
        with exact:
            pooled, _ = pool(x, mask)
            weight = _norm(self.weight.to(x.dtype), self.weight_norm)
            probs = F.linear(_norm(pooled, self.input_norm), weight).softmax(-1)
            if self.training and self.dropout:
                probs = probs * (torch.rand_like(probs) >= self.dropout) + 1e-10
                probs = probs / probs.sum(-1, keepdim=True)
        return Blend(probs, sequence_offsets(x), x.shape[0] * x.shape[1], None if mask is None else mask.flatten())

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{self.dim}, num_experts={self.num_experts}, dropout={self.dropout}"


class LoryRouter(Router):
    """Lory (2405.03133, section 3): merging for causal models, by segments of `segment` tokens of a sequence.

    e_i = softmax(mean of segment i's tokens W^T), and segment i runs through the expert merged by e_{i-1}, so that no
    token depends on later ones. The first segment, having none before it, is merged by its own e_1 without gradient;
    inside it, and only there, a token's output does depend on later ones. Padding has no part in the means, and a
    segment after nothing but padding counts as the first.

    In generation the paper decides once, by the prompt: prompt=n in the context merges every sequence by the mean of
    its first n tokens (padding among them left out), and weights=blend.weight takes the weights [B, E] of that call for
    tokens that follow. With decided={} beside prompt the gate keeps them there itself, for later calls with the same
    dict; `generate` of a language model does so.

    Context: mask. Raises ValueError where tokens come as one list.
    """

    merges = True

    def __init__(
        self, dim: int, num_experts: int, segment: int = 256, *, dtype: torch.dtype | None = torch.float32
    ) -> None:
        super().__init__(dim, num_experts)
        if segment < 1:
            raise ValueError(f"LoryRouter: segment must be at least 1, got {segment}")
        self.segment, self.dtype = segment, dtype
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W uniformly within 1/sqrt(dim)."""
        bound = 1 / math.sqrt(self.dim)
        self.weight.uniform_(-bound, bound)

    def forward(self, x: Tensor, **context: Any) -> Blend:
        """Merge experts for each segment of tokens x [B, S, D]."""
        x, mask, exact = prepared("LoryRouter", x, context.get("mask"), self.dtype)
        batch, length, dim = x.shape
        prompt, weight = context.get("prompt"), context.get("weights")
        flat = None if mask is None else mask.flatten()
        decided = context.get("decided")
        with exact:
            if decided is not None:
                weight = decided.get(id(self), weight)
            if weight is not None:
                return Blend(weight, sequence_offsets(x), batch * length, flat)
            if prompt is not None:
                pooled, _ = pool(x[:, :prompt], None if mask is None else mask[:, :prompt])
                weight = self._probs(pooled)
                if decided is not None:
                    decided[id(self)] = weight
                return Blend(weight, sequence_offsets(x), batch * length, flat)
            segments = -(-length // self.segment)
            missing = segments * self.segment - length
            real = x.new_ones(batch, length, dtype=torch.bool) if mask is None else mask
            filled, real = F.pad(x, (0, 0, 0, missing)), F.pad(real, (0, missing))
            pooled, known = pool(filled.view(-1, self.segment, dim), real.view(-1, self.segment))
            weight = _shifted(self._probs(pooled).view(batch, segments, self.num_experts), known.view(batch, segments))
        starts = torch.arange(segments, device=x.device) * self.segment
        lengths = (length - starts).clamp(max=self.segment).repeat(batch)
        offsets = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        return Blend(weight.flatten(0, 1), offsets, batch * length, flat)

    def _probs(self, pooled: Tensor) -> Tensor:
        return F.linear(pooled, self.weight.to(pooled.dtype)).softmax(-1)

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{self.dim}, num_experts={self.num_experts}, segment={self.segment}"


def _shifted(own: Tensor, known: Tensor) -> Tensor:
    """Each segment's predecessor's probabilities [B, P, E], or its own where that has no token (known [B, P])."""
    follows = F.pad(known, (1, 0))[:, :-1]
    return torch.where(follows.unsqueeze(-1), own.roll(1, dims=1), own.detach())


def prepared(
    router: str, x: Tensor, mask: Tensor | None, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None, AbstractContextManager[object]]:
    """Tokens [B, S, D] in the router's dtype, masked ones zero, the mask [B, S], and a context without autocast.

    Raises ValueError, naming the router, where the tokens came as one list.
    """
    if x.dim() != 3:
        raise ValueError(f"{router} decides for whole sequences: expected tokens as [B, S, D], got {list(x.shape)}")
    if x.dtype != torch.float64:
        x = x.to(dtype or x.dtype)
    if mask is not None:
        mask = mask.reshape(x.shape[:2]).bool()
        x = x.where(mask.unsqueeze(-1), 0)
    return x, mask, autocast.off(x)


def pool(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean over the real tokens of each sequence, [B, D] from x [B, S, D] zero where masked; and whether it has any."""
    if mask is None:
        return x.sum(1) / max(x.shape[1], 1), x.new_full((x.shape[0],), x.shape[1] > 0, dtype=torch.bool)
    count = mask.sum(1)
    return x.sum(1) / count.clamp(min=1).unsqueeze(-1).to(x.dtype), count > 0


def sequence_offsets(x: Tensor) -> Tensor:
    """Where the tokens of each sequence begin in x [B, S, D] as one list, and where the last ends, [B+1] int32."""
    return torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device) * x.shape[1]


def _norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
