"""Uni-Perceiver-MoE: routing by what kind of token it is, not by what it holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import autocast
from ..routing import Routing
from .context import missing
from .topk import TopKRouter


class AttributeRouter(TopKRouter):
    """Attribute routing of Uni-Perceiver-MoE (2206.04674, section 3): token choice on an embedding of attribute bits.

    The input of W is LN(GELU(A b + c)), or LN(A b + c) with activation=False, as the code offers both; b [.., bits] are
    the token's attributes: its task, modality, causal mask and so on, 8 in the paper. Tokens of the same attributes go
    the same way, so that conflicting tasks part. As published: k=1 or 2, noise="fixed", noise_std=1/E, capacity with
    drop="priority". Context: attributes, [bits] for all, [B, bits] a sequence or one a token; mask. Options as in
    `TopKRouter`.

    Raises ValueError without attributes, and where their shape does not fit.
    """

    def __init__(
        self, dim: int, num_experts: int, k: int = 2, *, bits: int = 8, activation: bool = True, **options: Any
    ) -> None:
        super().__init__(dim, num_experts, k, **options)
        self.bits, self.activation = bits, activation
        self.embedding = nn.Linear(bits, dim)
        self.norm = nn.LayerNorm(dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W as `TopKRouter` does, the embedding as `nn.Linear`."""
        super().reset_parameters()
        if hasattr(self, "norm"):  # not yet, when the parent class is made
            self.embedding.reset_parameters()
            self.norm.reset_parameters()

    def forward(self, x: Tensor, **context: Any) -> Routing:
        """Route tokens x [T, D] or [B, S, D] by their attributes alone."""
        attributes = context.pop("attributes", None)
        if attributes is None:
            raise missing("AttributeRouter", "attributes")
        dtype = x.dtype if x.dtype == torch.float64 else self.dtype or x.dtype
        given = attributes
        attributes = attributes.to(x.device, dtype)
        if x.dim() == 3 and attributes.shape == (x.shape[0], self.bits):
            attributes = attributes[:, None]
        if attributes.shape[-1:] != (self.bits,) or attributes.dim() > x.dim():
            raise ValueError(
                f"AttributeRouter: attributes has shape {list(given.shape)}, expected [.., {self.bits}] for all, "
                f"for each sequence or for each of {list(x.shape[:-1])} tokens"
            )
        with autocast.off(x):
            embedded = F.linear(attributes, self.embedding.weight.to(dtype), self.embedding.bias.to(dtype))
            if self.activation:
                embedded = F.gelu(embedded)
            scale, shift = self.norm.weight.to(dtype), self.norm.bias.to(dtype)
            embedded = F.layer_norm(embedded, (self.dim,), scale, shift, self.norm.eps)
        return super().forward(embedded.expand(x.shape), **context)
