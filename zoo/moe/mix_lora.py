"""Experts that share one frozen MLP, each with linear maps of low rank of its own beside its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .adapted import features
from .kernels import get_activation
from .lora import LoRAExperts
from .routing import Routing


class MixLoRAExperts(nn.Module):
    """E MLPs W_down' act(W_gate' x, W_up' x), W' = W + alpha / r * B_e A_e (MixLoRA 2404.15159, section 3.2).

    `base` is the MLP that all share; `layout` names its linear layers (gate or None, up, down), of which `targets`, all
    by default, get experts. W_gate x and W_up x are computed once a token, and their rows taken for each of its
    experts. A fused matrix is [gate; up], with gate_last [up; gate]. The paper's layer is `MoE` with a `TopKRouter` of
    k=2, normalize=True and loss switch: its weights sum to one, so that it starts as the MLP, up to rounding. A token
    that is masked, or that capacity drops, gets nothing.

    Parameters: those of `base`, and `lora` by the name of the linear layer. Raises ValueError for an unknown target.
    """

    def __init__(
        self,
        base: nn.Module,
        layout: tuple[str | None, str, str],
        activation: str,
        num_experts: int,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        gate_last: bool = False,
        targets: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__()
        names = [name for name in layout if name is not None]
        if unknown := set(targets or ()) - set(names):
            raise ValueError(f"MixLoRAExperts: no layer {sorted(unknown)[0]!r}; the MLP has {', '.join(names)}")
        self.base, self.layout, self.activation, self.gate_last = base, tuple(layout), activation, gate_last
        self.num_experts, self.dim = num_experts, features(getattr(base, layout[1]))[0]
        get_activation(activation)
        self.lora = nn.ModuleDict()
        for name in names:
            if targets is None or name in targets:
                size = features(getattr(base, name))
                self.lora[name] = LoRAExperts(num_experts, size[0], rank, alpha, size[1], dropout)

    @property
    def numbers(self) -> int:
        """How many weights the experts have that are not all tokens'."""
        return sum(p.numel() for p in self.lora.parameters())

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Weighted sum [T, D] of what each token's experts make of tokens x [T, D]."""
        *into, down = (name for name in self.layout if name is not None)
        index, act = routing.token_index, get_activation(self.activation)
        rows = x.index_select(0, index)
        parts = [self._add(name, self._base(name)(x).index_select(0, index), rows, routing) for name in into]
        if self.gate_last:
            parts[0] = parts[0].roll(parts[0].shape[-1] // 2, dims=-1)
        if len(parts) == 1 or not act.plain:
            hidden = act.forward(torch.cat(parts, dim=-1))
        else:
            gate, up = parts
            hidden = act.point.f(gate) * up
        out = self._add(down, self._base(down)(hidden), hidden, routing)
        out = out * routing.weight[:, None].to(out.dtype)
        return out.new_zeros(x.shape[0], out.shape[1]).index_add(0, index, out)

    def _base(self, name: str) -> Any:
        return getattr(self.base, name)

    def _add(self, name: str, y: Tensor, rows: Tensor, routing: Routing) -> Tensor:
        if name not in self.lora:
            return y
        lora: Any = self.lora[name]
        return y + lora.each(lora.reads(rows), routing.offsets).to(y.dtype)

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{self.num_experts}, activation={self.activation!r}"
