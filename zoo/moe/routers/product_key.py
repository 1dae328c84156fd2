"""Product keys: the best of very many experts, found by comparing with two short lists of half keys."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import autocast
from ..kernels import transformed
from ..routing import Routing
from .base import Router, is_recomputation


class ProductKeyRouter(Router):
    """PEER's retrieval (2407.04153, algorithm 1): E = n^2 experts, whose key is a pair of n + n half keys.

    Each of `heads` heads has a query q = x W_h and scores expert (i, j) by q_1 . c_i + q_2 . c'_j, halves of the query
    against half keys c, c' [n, key_dim / 2] that all heads share, as in the paper. The k best pairs lie among the k
    best i times the k best j, so that E scores are never computed. Combine weights are the softmax over a head's k
    scores, or with score="sigmoid" their sigmoids; heads are summed, and may choose the same expert.

    query_norm puts the queries through batch norm ("batch": the paper reports that it spreads the use of experts;
    statistics are over tokens that are not masked, and not kept under torch.func) or layer norm ("layer"). Defaults: 8
    heads, k = 16, key_dim 128. Context: mask. Raises ValueError unless E is a square, key_dim even and k at most n.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 16,
        *,
        heads: int = 8,
        key_dim: int = 128,
        score: Literal["softmax", "sigmoid"] = "softmax",
        query_norm: Literal["batch", "layer"] | None = None,
        dtype: torch.dtype | None = torch.float32,
    ) -> None:
        super().__init__(dim, num_experts)
        side = math.isqrt(num_experts)
        if side * side != num_experts:
            near = f"{side**2} or {(side + 1) ** 2}"
            raise ValueError(f"ProductKeyRouter: num_experts must be a square, such as {near}, got {num_experts}")
        if not 1 <= k <= side or heads < 1 or key_dim < 2 or key_dim % 2:
            raise ValueError(
                f"ProductKeyRouter: expected 1 <= k <= {side} half keys, heads >= 1 and an even key_dim, got k={k}, "
                f"heads={heads}, key_dim={key_dim}"
            )
        if score not in ("softmax", "sigmoid") or query_norm not in (None, "batch", "layer"):
            raise ValueError(
                f"ProductKeyRouter: score must be 'softmax' or 'sigmoid' and query_norm None, 'batch' or 'layer', "
                f"got {score!r} and {query_norm!r}"
            )
        self.k_per_head, self.heads, self.key_dim, self.side = k, heads, key_dim, side
        self.score, self.dtype = score, dtype
        self.weight = nn.Parameter(torch.empty(heads * key_dim, dim))
        self.keys = nn.Parameter(torch.empty(2, side, key_dim // 2))
        norms = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
        width = heads * key_dim if query_norm == "batch" else key_dim
        self.query_norm = norms[query_norm](width) if query_norm else None
        self.reset_parameters()

    @property
    def k(self) -> int:
        """How many experts a token meets: those of all heads, where one may occur twice."""
        return self.heads * self.k_per_head

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W uniformly within 1/sqrt(dim), half keys within 1/sqrt(key_dim / 2), and reset the norm."""
        self.weight.uniform_(-1 / math.sqrt(self.dim), 1 / math.sqrt(self.dim))
        bound = 1 / math.sqrt(self.key_dim // 2)
        self.keys.uniform_(-bound, bound)
        if self.query_norm is not None:
            self.query_norm.reset_parameters()

    def forward(self, x: Tensor, **context: Any) -> Routing:
        """Route tokens x [T, D] or [B, S, D]."""
        if autocast.is_on(x):
            with autocast.off(x):
                return self.forward(x, **context)
        x = x.reshape(-1, self.dim)
        if x.dtype != torch.float64:
            x = x.to(self.dtype or x.dtype)
        mask = context.get("mask")
        if mask is not None:
            mask = mask.reshape(-1).bool()
            x = x.where(mask[:, None], 0)
        expert, score = self._best(self._queries(x, mask))
        weight = score.softmax(-1) if self.score == "softmax" else score.sigmoid()
        keep = None if mask is None else mask[:, None].expand(-1, self.k)
        asked = self.k if mask is None else self.k * mask
        return Routing.from_choices(expert.flatten(1), weight.flatten(1), self.num_experts, keep=keep, asked=asked)

    def _queries(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """One query a head, [T, heads, key_dim]."""
        queries = F.linear(x, self.weight.to(x.dtype))
        if isinstance(self.query_norm, nn.BatchNorm1d):
            queries = self._batch_norm(queries, mask)
        queries = queries.unflatten(-1, (self.heads, self.key_dim))
        if isinstance(self.query_norm, nn.LayerNorm):
            norm = self.query_norm
            scale, shift = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
            queries = F.layer_norm(queries, (self.key_dim,), scale, shift, norm.eps)
        return queries

    def _batch_norm(self, queries: Tensor, mask: Tensor | None) -> Tensor:
        norm = self.query_norm
        assert isinstance(norm, nn.BatchNorm1d)
        real = queries if mask is None else queries[mask]
        # One token has no variance: then by what was seen before.
        fresh = self.training and real.shape[0] > 1
        kept = [statistic for statistic in (norm.running_mean, norm.running_var) if statistic is not None]
        if fresh and transformed.is_active():
            kept = []  # a transform lets nothing be changed in place, and under vmap each sample has its own
        mean, var = (statistic.to(queries.dtype, copy=True) for statistic in kept) if kept else (None, None)
        scale, shift = norm.weight.to(queries.dtype), norm.bias.to(queries.dtype)
        normed = F.batch_norm(real, mean, var, scale, shift, fresh, norm.momentum or 0.0, norm.eps)
        if fresh and not is_recomputation():  # checkpointing must not move the statistics a second time
            for statistic, moved in zip(kept, (mean, var)):
                if moved is not None:
                    statistic.copy_(moved)
        return normed if mask is None else torch.zeros_like(queries).masked_scatter(mask[:, None], normed)

    def _best(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """The k experts of every head and their scores, best first, [T, heads, k] each."""
        k, halves = self.k_per_head, queries.unflatten(-1, (2, -1))
        scores = torch.einsum("thpd,pnd->pthn", halves, self.keys.to(queries.dtype))
        best, index = scores.topk(k, dim=-1)
        sums = (best[0].unsqueeze(-1) + best[1].unsqueeze(-2)).flatten(-2)
        pairs = (index[0].unsqueeze(-1) * self.side + index[1].unsqueeze(-2)).flatten(-2)
        score, among = sums.topk(k, dim=-1)
        return pairs.gather(-1, among), score

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{self.dim}, num_experts={self.num_experts}, heads={self.heads}, k={self.k_per_head}"
