"""Experts of low rank, to stand beside a layer that stays as it is."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import autocast
from .experts import check_sizes
from .kernels.linear import grouped_linear
from .routing import Routing

# Up to so many rows of A together, one product with all of them is faster than sorting tokens by expert (one CPU core).
ONE_PRODUCT = 64


class LoRAExperts(nn.Module):
    """E linear maps of rank r, computed together: f_e(x) = alpha / r * B_e A_e x (LoRA, 2106.09685), D -> O.

    LLaVA-MoLE (2401.16160, section 3.2) adds the one of the highest logit to a frozen MLP: `MoE` with a `TopKRouter` of
    k=1, normalize=True (its weight is one) and the MLP as `shared`. Beside one linear layer see `AdaptedLinear`.
    A starts as `nn.Linear` does, or from N(0, init_std^2), and B with zeros, so that nothing changes at first.
    `dropout` acts in training on what the experts read, alike for all experts of a token.

    Tokens in another type than the parameters are computed in that of the parameters, and what comes out is in the
    tokens' again; under autocast all is in its own.
    Where most experts meet most tokens, or E r is small, it is one product with A as [E r, D], the weights times what
    comes out, and one with B as [O, E r]; else tokens are sorted by expert. No [T, E, D] is ever made.

    Parameters: a [E, r, D], b [E, O, r]. out_dim (O) is D by default. Raises ValueError for a size below one.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        rank: int = 32,
        alpha: float = 64.0,
        out_dim: int | None = None,
        dropout: float = 0.0,
        init_std: float | None = None,
    ) -> None:
        super().__init__()
        out_dim = dim if out_dim is None else out_dim
        check_sizes("LoRAExperts", num_experts=num_experts, dim=dim, rank=rank, out_dim=out_dim)
        if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise ValueError(f"LoRAExperts: alpha must be a number, got {alpha!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"LoRAExperts: dropout must be at least 0 and below 1, got {dropout}")
        self.num_experts, self.dim, self.out_dim, self.rank, self.alpha = num_experts, dim, out_dim, rank, alpha
        self.dropout, self.init_std = dropout, init_std
        self.a = nn.Parameter(torch.empty(num_experts, rank, dim))
        self.b = nn.Parameter(torch.empty(num_experts, out_dim, rank))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw A uniformly within 1/sqrt(D) or from N(0, init_std^2), and zero B."""
        if self.init_std is None:
            self.a.uniform_(-1 / math.sqrt(self.dim), 1 / math.sqrt(self.dim))
        else:
            self.a.normal_(0.0, self.init_std)
        self.b.zero_()

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Weighted sum [T, O] of what each token's experts make of tokens x [T, D]."""
        out = self._mixed(x, routing)
        return out if autocast.is_on(x) else out.to(x.dtype)

    def _mixed(self, x: Tensor, routing: Routing) -> Tensor:
        tokens, experts = x.shape[0], self.a.shape[0]  # merged experts are one a group, whatever num_experts says
        met = routing.token_index.numel()
        if experts * self.rank <= ONE_PRODUCT or 2 * met >= tokens * experts:
            if met == tokens * experts:
                return self.mix(x, routing.weight.view(experts, tokens).T)
            return self.mix(_asked(x, routing), routing.dense())
        rows = grouped_linear(self.reads(x).index_select(0, routing.token_index), self.a, routing.offsets)
        rows = rows * (self.alpha / self.rank * routing.weight[:, None]).to(rows.dtype)
        out = grouped_linear(rows, self.b, routing.offsets)
        return out.new_zeros(tokens, out.shape[1]).index_add(0, routing.token_index, out)

    def mix(self, x: Tensor, weight: Tensor) -> Tensor:
        """Sum over all experts, [T, O], with weights [T, E]."""
        x = self.reads(x)
        a, b = (self.a, self.b) if autocast.is_on(x) else (self.a.to(x.dtype), self.b.to(x.dtype))
        rows = F.linear(x, a.flatten(0, 1)).unflatten(-1, (a.shape[0], self.rank))
        rows = rows * (self.alpha / self.rank * weight[..., None]).to(rows.dtype)
        return F.linear(rows.flatten(-2), b.transpose(0, 1).flatten(1))

    def apart(self, x: Tensor) -> Tensor:
        """What every expert makes of tokens x [T, D], unweighted: [T, E, O]."""
        x = self.reads(x)
        a, b = (self.a, self.b) if autocast.is_on(x) else (self.a.to(x.dtype), self.b.to(x.dtype))
        rows = F.linear(x, a.flatten(0, 1)).unflatten(-1, a.shape[:2])
        return torch.einsum("ter,eor->teo", self.alpha / self.rank * rows, b)

    def each(self, rows: Tensor, offsets: Tensor, experts: Tensor | None = None) -> Tensor:
        """What experts, or those [G] of them, make of rows [A, D] sorted by expert, unweighted: [A, O]."""
        a, b = (w if experts is None else w.index_select(0, experts) for w in (self.a, self.b))
        hidden = self.alpha / self.rank * grouped_linear(rows, a, offsets)
        return grouped_linear(hidden, b, offsets)

    def reads(self, x: Tensor) -> Tensor:
        """Tokens as the experts read them: in their type, with dropout."""
        x = x if autocast.is_on(x) else x.to(self.a.dtype)
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    @torch.no_grad()
    def product(self, weight: Tensor) -> Tensor:
        """alpha / r * sum_e weight_e B_e A_e, [O, D], for weights [E]: what one merged layer adds."""
        scaled = self.b * (self.alpha / self.rank * weight.to(self.b.dtype))[:, None, None]
        return scaled.transpose(0, 1).flatten(1) @ self.a.flatten(0, 1)

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{self.num_experts}, dim={self.dim}, out_dim={self.out_dim}, rank={self.rank}, alpha={self.alpha}"


def _asked(x: Tensor, routing: Routing) -> Tensor:
    """Tokens x [T, D], zero where they meet no expert: there may be a nan, which a weight of zero does not hide."""
    asked = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device).index_fill(0, routing.token_index, True)
    return x.where(asked[:, None], 0)
