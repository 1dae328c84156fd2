"""A linear layer that stays as it is, and a mixture of parameter-efficient experts beside it.

D inputs, O outputs, E experts. The linear layer is any module [.., D] -> [.., O]: `nn.Linear`, transformers' Conv1D.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import expert_losses
from .layer import Recorded, _check
from .lora import LoRAExperts
from .routers.base import Router
from .routing import Routing

Columns = tuple[int, int]


class _Beside(nn.Module):
    """What wraps a linear layer looks like one: some blocks ask for the type of its weight."""

    base: Any

    @property
    def weight(self) -> Tensor:
        """The linear layer's."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The linear layer's."""
        return self.base.bias

    @property
    def in_features(self) -> int:
        """D."""
        return features(self.base)[0]

    @property
    def out_features(self) -> int:
        """O."""
        return features(self.base)[1]


class LoRALinear(_Beside):
    """y = W x + alpha / r * B A x (LoRA, 2106.09685): one expert, and no gate.

    `columns`, a pair (start, stop), has it add to these outputs alone, such as the values of a fused projection.
    """

    def __init__(self, base: nn.Module, lora: LoRAExperts, columns: Columns | None = None) -> None:
        super().__init__()
        check_sizes(type(self).__name__, base, lora.dim, lora.out_dim, columns)
        if lora.num_experts != 1:
            raise ValueError(f"LoRALinear: expected one expert, got {lora.num_experts}")
        self.base, self.lora, self.columns = base, lora, columns

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x [..., D]."""
        return add(self.base(x), self.lora.mix(x, x.new_ones(1, 1)), self.columns)


class AdaptedLinear(Recorded, _Beside):
    """y = W x + alpha / r * sum_e p_e(x) B_e A_e x, with p from any gate that `MoE` may have.

    The published layers are settings of it:
        MoLoRA (2309.05444), LoRAMoE (2312.09979)   `DenseRouter`
        MoELoRA (2402.12851), MoLA (2402.08562)     `TopKRouter` with normalize=True
        SiRA (2311.09179)                           `SiRARouter`
        MOELoRA (2310.18339), another one           `TaskMixtureRouter`
        MoCLE (2312.12379)                          `MoCLERouter`
        Omni-SMoLA (2312.00968)                     `SoftRouter`
        MoR1E (2404.08985)                          `MoR1ERouter`, and `RankOneExperts`
        MeteoRA (2405.13053)                        trained LoRAs as experts, and `TopKRouter`
        MoLE (2404.13628)                           the same, and `MoLERouter`: see `ComposedLinear`
    `columns` as in `LoRALinear`. `contrastive` weighs MoELoRA's loss between experts' outputs in training, a number or
    the options of `zoo.moe.expert_losses.contrastive` with "weight"; the recorded decision carries it. A token that is
    masked, or that capacity drops, gets W x.

    Raises ValueError when layer, gate and experts disagree on sizes.
    """

    def __init__(
        self,
        base: nn.Module,
        router: Router,
        lora: LoRAExperts,
        columns: Columns | None = None,
        contrastive: float | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_sizes(type(self).__name__, base, lora.dim, lora.out_dim, columns)
        _check_gate(type(self).__name__, router, self.gate_dim(lora), lora.num_experts)
        self.base, self.router, self.lora, self.columns = base, router, lora, columns
        options = contrastive if isinstance(contrastive, Mapping) else {"weight": contrastive or 0.0}
        known = ("weight", *list(inspect.signature(expert_losses.contrastive).parameters)[3:])
        if "weight" not in options or not set(options) <= set(known):
            raise ValueError(f"AdaptedLinear: contrastive takes weight, and of {', '.join(known[1:])}; got {options}")
        self.contrastive = dict(options)

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply to x [..., D]; keywords go to the gate (see `Router`)."""
        y = self.base(x)
        decision = self._decide(self._seen(x, context), context)
        tokens = x.reshape(-1, x.shape[-1])
        if self.training and self.contrastive.get("weight") and isinstance(decision, Routing):
            options = {name: value for name, value in self.contrastive.items() if name != "weight"}
            loss = expert_losses.contrastive(self.lora, tokens, decision, **options)
            decision.losses["contrastive"] = self.contrastive["weight"] * loss
        return add(y, decision.apply(tokens, self.lora), self.columns)

    @staticmethod
    def gate_dim(lora: LoRAExperts) -> int:
        """The width of what the gate reads."""
        return lora.dim

    def _seen(self, x: Tensor, context: dict[str, Any]) -> Tensor:
        return x


class ComposedLinear(AdaptedLinear):
    """y = W x + sum_e g_e E_e, E_e = alpha / r * B_e A_e x: the gate reads what experts make of tokens, not the tokens.

    That is [E_1; ..; E_E], of width E O. With `MoLERouter` it is MoLE (2404.13628, equations 9 to 13) at each matrix,
    m-MoLE in its section 5; the paper's block-wise form, which runs each block once a LoRA, is not here.
    """

    @staticmethod
    def gate_dim(lora: LoRAExperts) -> int:
        """E O."""
        return lora.num_experts * lora.out_dim

    def _seen(self, x: Tensor, context: dict[str, Any]) -> Tensor:
        mask = context.get("mask")
        _check(type(self).__name__, x, self.lora.dim, mask)
        if mask is not None:
            x = x.where(mask.reshape(x.shape[:-1]).bool().unsqueeze(-1), 0)  # nan there would reach the gate's gradient
        return self.lora.apart(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.gate_dim(self.lora))


class ScaledLinear(Recorded, _Beside):
    """A linear layer whose outputs y, or inputs, are multiplied by sum_e p_e l_e: MoV (2309.05444), a mixture of IA3.

    With scale="output" it is y * s(y) (keys and values), with "input" W (x * s(x)) (hidden units of an MLP); the gate
    reads what is scaled, as in the authors' code, which moreover gates every attention head apart: here one gate sees
    all heads. `columns` are the outputs that are scaled. It is computed as 1 + sum_e p_e (l_e - 1), the same where
    weights sum to one, exact at first, and 1 for tokens without experts.

    Parameters: vectors [E, O or D], ones at first. Raises ValueError when layer and gate disagree on sizes.
    """

    def __init__(self, base: nn.Module, router: Router, scale: str = "output", columns: Columns | None = None) -> None:
        super().__init__()
        if scale not in ("input", "output"):
            raise ValueError(f"ScaledLinear: scale must be 'input' or 'output', got {scale!r}")
        if scale == "input" and columns is not None:
            raise ValueError("ScaledLinear: columns are outputs, but scale='input'")
        dim = features(base)[scale == "output"] if columns is None else columns[1] - columns[0]
        _check_gate(type(self).__name__, router, dim, router.num_experts)
        self.base, self.router, self.scale, self.columns = base, router, scale, columns
        self.vectors = nn.Parameter(torch.ones(router.num_experts, dim))

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply to x [..., D]; keywords go to the gate (see `Router`)."""
        if self.scale == "input":
            return self.base(self._scaled(x, context))
        y = self.base(x)
        if self.columns is None:
            return self._scaled(y, context)
        start, stop = self.columns
        return torch.cat([y[..., :start], self._scaled(y[..., start:stop], context), y[..., stop:]], dim=-1)

    def _scaled(self, x: Tensor, context: dict[str, Any]) -> Tensor:
        weight = self._decide(x, context).dense()
        factor = 1 + weight.to(self.vectors.dtype) @ (self.vectors - 1)
        return x * factor.view(x.shape).to(x.dtype)

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{self.vectors.shape[0]}, scale={self.scale!r}, columns={self.columns}"


def add(y: Tensor, more: Tensor, columns: Columns | None) -> Tensor:
    """y [..., O] plus rows [T, O], or [T, stop - start] in its columns."""
    more = more.to(y.dtype).view(*y.shape[:-1], more.shape[-1])
    return y + (more if columns is None else F.pad(more, (columns[0], y.shape[-1] - columns[1])))


def features(linear: Any) -> tuple[int, int]:
    """D and O of a linear layer; transformers' Conv1D holds its weight as [D, O]."""
    if hasattr(linear, "in_features"):
        return linear.in_features, linear.out_features
    return linear.weight.shape[0], linear.weight.shape[1]


def check_sizes(name: str, base: nn.Module, dim: int, out_dim: int, columns: Columns | None) -> None:
    """Raise ValueError unless experts D -> O stand beside a linear layer, or beside columns of it."""
    has, gives = features(base)
    if columns is not None and not 0 <= columns[0] < columns[1] <= gives:
        raise ValueError(f"{name}: columns {columns} are not among the {gives} outputs")
    wanted = gives if columns is None else columns[1] - columns[0]
    if (dim, out_dim) != (has, wanted):
        raise ValueError(f"{name}: the layer leads from {has} to {wanted}, but the experts from {dim} to {out_dim}")


def _check_gate(name: str, router: Router, dim: int, num_experts: int) -> None:
    if (router.dim, router.num_experts) != (dim, num_experts):
        raise ValueError(
            f"{name}: the router routes {router.num_experts} experts of width {router.dim}, "
            f"but there are {num_experts} of width {dim}"
        )
