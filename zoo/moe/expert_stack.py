"""Experts of recommendation: small MLPs of any depth, stacked, an activation after every layer.

T tokens, D width, E experts, A assignments sorted by expert; H, O the units of one layer, of the last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import expert_stack_cpu
from .kernels import get_activation
from .routing import Routing


class ExpertStack(nn.Module):
    """E MLPs of the same sizes: h_0 = x, h_l = act(norm(W_l h_(l-1) + b_l)), f_e(x) = h_L.

    `hidden` are the units of every layer, such as (128, 64); `activation` is a plain one of `zoo.moe.kernels`.
    norm="batch" normalises each unit over the tokens, as HoME's experts do with activation "silu" (2408.05430, eq. 6);
    norm="layer" the units of each expert. `dropout` acts after every activation in training.

    Parameters: weights.l [E, H_l, H_(l-1)] and biases.l [E, H_l], drawn as `nn.Linear`'s, each expert on its own.
    Raises ValueError on a size below one, an unknown or gated activation, an unknown norm, a dropout outside [0, 1).
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden: Sequence[int],
        activation: str = "relu",
        norm: Literal["batch", "layer"] | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = tuple(hidden)
        if min(num_experts, dim, len(hidden), *hidden) < 1:
            raise ValueError(
                f"ExpertStack: num_experts, dim and every layer of hidden must be at least 1, "
                f"got {num_experts}, {dim}, {list(hidden)}"
            )
        if get_activation(activation).gated:
            raise ValueError(f"ExpertStack: activation must be a plain one, got {activation!r}, which is gated")
        if norm not in (None, "batch", "layer"):
            raise ValueError(f"ExpertStack: norm must be None, 'batch' or 'layer', got {norm!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"ExpertStack: dropout must be at least 0 and below 1, got {dropout}")
        self.num_experts, self.dim, self.hidden, self.out_dim = num_experts, dim, hidden, hidden[-1]
        self.activation, self.norm, self.dropout = activation, norm, dropout
        fan_in = (dim, *hidden[:-1])
        self.weights = nn.ParameterList(torch.empty(num_experts, h, d) for h, d in zip(hidden, fan_in))
        self.biases = nn.ParameterList(torch.empty(num_experts, h) for h in hidden)
        self.norms = nn.ModuleList(_Norm(norm, num_experts, h) for h in hidden if norm is not None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weights and biases uniformly within 1/sqrt(fan in)."""
        for weight, bias in zip(self.weights, self.biases):
            bound = 1 / math.sqrt(weight.shape[-1])
            weight.uniform_(-bound, bound)
            bias.uniform_(-bound, bound)

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        """What every expert makes of tokens x [T, D], or of its own x [T, E, D]: [T, E, O].

        With a routing of tokens x [T, D] only its assignments are computed: [A, O], not weighted.
        """
        if routing is not None:
            return self._assigned(x, routing)
        if self._is_plain_relu and expert_stack_cpu.supports(x, self.weights[0]):
            return expert_stack_cpu.relu_stack(x, list(self.weights), list(self.biases))
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            if x.dim() == 2:
                # One wide product, [T, D] x [D, E * H].
                x = F.linear(x, weight.flatten(0, 1), bias.flatten()).unflatten(-1, bias.shape)
            else:
                x = torch.baddbmm(bias.unsqueeze(1), x.transpose(0, 1), weight.mT).transpose(0, 1)
            x = self._after(layer, x)
        return x

    @property
    def _is_plain_relu(self) -> bool:
        return self.activation == "relu" and self.norm is None and not (self.training and self.dropout)

    def _after(self, layer: int, x: Tensor) -> Tensor:
        """Norm, activation and dropout of x [T, E, H]."""
        if self.norms:
            x = self.norms[layer](x)
        x = get_activation(self.activation).forward(x)
        return F.dropout(x, self.dropout) if self.training and self.dropout else x

    def _assigned(self, x: Tensor, routing: Routing) -> Tensor:
        if self.norm == "batch" and self.training:
            raise ValueError("ExpertStack: batch norm in training needs every token; leave out the routing")
        bounds, outputs = routing.offsets.tolist(), []
        # unbind: the gradient of w[e] would be as large as w for every expert.
        layers = [list(zip(w.unbind(), b.unbind())) for w, b in zip(self.weights, self.biases)]
        for e in range(self.num_experts):
            start, end = bounds[e], bounds[e + 1]
            # An expert that all tokens meet needs no gather; with a gate that is the same for all, each one used is so.
            rows = x if end - start == x.shape[0] else x.index_select(0, routing.token_index[start:end])
            for layer, pairs in enumerate(layers):
                rows = F.linear(rows, *pairs[e])
                if self.norms:
                    rows = self.norms[layer].of_expert(rows, e)  # type: ignore[operator]
                rows = get_activation(self.activation).forward(rows)
                if self.training and self.dropout:
                    rows = F.dropout(rows, self.dropout)
            outputs.append(rows)
        return torch.cat(outputs)

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        options = "".join(f", {n}={getattr(self, n)!r}" for n in ("norm", "dropout") if getattr(self, n))
        return f"{self.num_experts}, {self.dim}, {list(self.hidden)}, activation={self.activation!r}{options}"


class _Norm(nn.Module):
    """Batch norm of each unit over tokens, or layer norm of each expert's units, of x [T, E, H]."""

    def __init__(self, kind: str, num_experts: int, units: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_experts, units))
        self.bias = nn.Parameter(torch.zeros(num_experts, units))
        self.batch = nn.BatchNorm1d(num_experts * units, affine=False) if kind == "batch" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.batch is None:
            x = F.layer_norm(x, x.shape[-1:])
        elif x.shape[0] > 1 or not self.training:
            x = self.batch(x.flatten(1)).unflatten(-1, self.weight.shape)
        return torch.addcmul(self.bias, x, self.weight)

    def of_expert(self, x: Tensor, e: int) -> Tensor:
        """The same for x [T, H] of expert e, with the running statistics of a batch norm."""
        if self.batch is None:
            x = F.layer_norm(x, x.shape[-1:])
        else:
            running: Any = (self.batch.running_mean, self.batch.running_var)
            mean, var = (s.view_as(self.weight)[e] for s in running)
            x = (x - mean) * (var + self.batch.eps).rsqrt()
        return torch.addcmul(self.bias[e], x, self.weight[e])
