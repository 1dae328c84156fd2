"""Experts of MoE++: MLPs beside experts that cost nothing: zero, copy and constant."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from .experts import Experts
from .kernels import transformed
from .routing import Routing


class ZeroComputationExperts(nn.Module):
    """E experts (MoE++ 2410.07348, section 3.1), in order: MLPs, `constant` constant, `copy` copy, `zero` zero ones.

    constant: a_1 x + a_2 v with a = softmax(W x), W [2, D] and v [D] learnt; copy: x; zero: 0. The MLPs are an
    `Experts`, so their tokens, which come first in a routing, run on the same kernels. As in the authors' code the
    input of every expert is multiplied by input_scale, 2 there for k = 2 (1 leaves it as it is).

    Parameters: those of `Experts` below `mlp`; constant_weight [constant, 2, D], constant [constant, D].
    Raises ValueError when no MLP is left.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        activation: str = "swiglu",
        *,
        constant: int = 2,
        copy: int = 1,
        zero: int = 1,
        input_scale: float = 2.0,
        bias: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        mlps = num_experts - constant - copy - zero
        if mlps < 1 or min(constant, copy, zero) < 0:
            raise ValueError(
                f"ZeroComputationExperts: {num_experts} experts with constant={constant}, copy={copy}, zero={zero} "
                f"leave {mlps} MLPs; expected at least 1"
            )
        self.num_experts, self.dim = num_experts, dim
        self.num_constant, self.num_copy, self.num_zero, self.input_scale = constant, copy, zero, input_scale
        self.mlp = Experts(mlps, dim, hidden_dim, activation, bias, backend)
        self.constant_weight = nn.Parameter(torch.empty(constant, 2, dim))
        self.constant = nn.Parameter(torch.empty(constant, dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw MLPs and W as `nn.Linear` does, and v from N(0, 1)."""
        self.mlp.reset_parameters()
        self.constant_weight.uniform_(-(self.dim**-0.5), self.dim**-0.5)
        self.constant.normal_()

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Weighted sum [T, D] of what each token's experts make of tokens x [T, D]."""
        x = x * self.input_scale
        if transformed.is_active():
            return self._every_token(x, routing)
        mlps = self.mlp.num_experts
        bounds = routing.offsets[mlps:].tolist()
        first = bounds[0]
        weight = routing.weight.to(x.dtype)
        y = self.mlp(
            x,
            Routing(
                routing.token_index[:first], routing.offsets[: mlps + 1], routing.weight[:first], routing.num_tokens
            ),
        )
        # All copies are alike, and zeros give nothing.
        ends = [*bounds[: self.num_constant + 1], bounds[self.num_constant + self.num_copy]]
        for i, (start, end) in enumerate(pairwise(ends)):
            token = routing.token_index[start:end]
            out = x.index_select(0, token)
            if i < self.num_constant:
                share = (out @ self.constant_weight[i].to(x.dtype).T).softmax(-1)
                out = share[:, :1] * out + share[:, 1:] * self.constant[i].to(x.dtype)
            y = y.index_add(0, token, (weight[start:end, None] * out).to(y.dtype))
        return y

    def _every_token(self, x: Tensor, routing: Routing) -> Tensor:
        """The same where no size may hang on what the gate decided: every expert computes every token."""
        mlps, weight = self.mlp.num_experts, routing.dense().to(x.dtype)
        y = self.mlp(x, Routing.from_matrix(weight[:, :mlps], torch.ones_like(weight[:, :mlps], dtype=torch.bool)))
        for i in range(self.num_constant):
            share = (x @ self.constant_weight[i].to(x.dtype).T).softmax(-1)
            out = share[:, :1] * x + share[:, 1:] * self.constant[i].to(x.dtype)
            y = y + weight[:, mlps + i, None] * out
        copies = weight[:, mlps + self.num_constant :][:, : self.num_copy]
        return y + copies.sum(-1, keepdim=True) * x

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{self.num_experts}, constant={self.num_constant}, copy={self.num_copy}, zero={self.num_zero}"
