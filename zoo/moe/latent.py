"""Experts of LatentMoE: MLPs of a narrower space, with one way in and one way out for all of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .experts import Experts
from .routing import Routing


class LatentExperts(nn.Module):
    """E experts over latent tokens (LatentMoE 2601.18089; Nemotron 3 Super, Kimi K3): W_up n(sum_e g_e f_e(W_down x)).

    The gate, and shared experts, see tokens x [T, D] themselves; experts see W_down x [T, latent_dim], which is also
    all that travels to experts of other processes. With D / latent_dim = a the paper makes E and k a times as large.
    n is the identity, or with `norm` an `nn.RMSNorm` (Kimi K3). `bias` is that of the experts.

    Parameters: those of `Experts` below `mlp`, over latent tokens; to_latent.weight [latent_dim, D], from_latent.weight
    [D, latent_dim], and norm.weight [latent_dim]. Raises ValueError for a latent_dim below one.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        activation: str = "swiglu",
        *,
        latent_dim: int,
        norm: bool = False,
        bias: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"LatentExperts: latent_dim must be at least 1, got {latent_dim}")
        self.num_experts, self.dim, self.latent_dim = num_experts, dim, latent_dim
        self.to_latent = nn.Linear(dim, latent_dim, bias=False)
        self.mlp = Experts(num_experts, latent_dim, hidden_dim, activation, bias, backend)
        self.norm = nn.RMSNorm(latent_dim) if norm else None
        self.from_latent = nn.Linear(latent_dim, dim, bias=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw experts and linear layers as they are; ones for the norm."""
        self.mlp.reset_parameters()
        for layer in (self.to_latent, self.from_latent, self.norm):
            if layer is not None:
                layer.reset_parameters()

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Weighted sum [T, D] of what each token's experts make of tokens x [T, D]."""
        y = self.mlp(self.to_latent(x), routing)
        return self.from_latent(y if self.norm is None else self.norm(y))

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{self.num_experts}, dim={self.dim}, latent_dim={self.latent_dim}"
