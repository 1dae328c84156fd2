"""The mixture-of-experts layer: router, experts, and what runs beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .experts import Experts
from .routers.base import Router
from .routing import Routing


class MoE(nn.Module):
    """Route tokens to experts, combine what comes back, and add what every token gets.

    y = sum_e g_e(x) f_e(x) + shared(x). `shared` is any module [.., D] -> [.., D]: a shared expert (DeepSeekMoE), or the
    dense MLP of a residual MoE (DeepSpeed, Arctic). `shared_gate=True` scales it by sigmoid(w . x) (Qwen2-MoE);
    `mix_gate=True` weighs both sides by softmax(W x) instead (DeepSpeed's residual form).

    Raises ValueError when the router and the experts disagree on the number of experts or the width, or when a gate is
    asked for without a shared expert.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        shared: nn.Module | None = None,
        shared_gate: bool = False,
        mix_gate: bool = False,
    ) -> None:
        super().__init__()
        if router.num_experts != experts.num_experts or router.dim != experts.dim:
            raise ValueError(
                f"MoE: the router routes {router.num_experts} experts of width {router.dim}, "
                f"but there are {experts.num_experts} of width {experts.dim}"
            )
        if shared is None and (shared_gate or mix_gate):
            raise ValueError("MoE: shared_gate and mix_gate need a shared expert")
        if shared_gate and mix_gate:
            raise ValueError("MoE: shared_gate and mix_gate exclude each other")
        self.router, self.experts, self.shared = router, experts, shared
        self.shared_gate = nn.Linear(experts.dim, 1, bias=False) if shared_gate else None
        self.mix_gate = nn.Linear(experts.dim, 2) if mix_gate else None
        self._record: list[Routing] | None = None

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply to tokens x [..., D]; keywords go to the router (see `Router`)."""
        routing = self.router(x if x.dim() == 3 else x.reshape(-1, x.shape[-1]), **context)
        # A recomputation for activation checkpointing runs inside the backward pass: it is the same step again.
        if self._record is not None and (torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1):
            self._record.append(routing)
        tokens = x.reshape(-1, x.shape[-1])
        y = routing.apply(tokens, self.experts).view(x.shape)
        if self.shared is None:
            return y
        beside = self.shared(x)
        if self.mix_gate is not None:
            mix = self.mix_gate(x).softmax(-1)
            return y * mix[..., :1] + beside * mix[..., 1:]
        if self.shared_gate is not None:
            beside = torch.sigmoid(self.shared_gate(x)) * beside
        return y + beside


@dataclass
class Step:
    """What the MoE layers of a model decided during one step: the routings of every layer, in call order."""

    routings: dict[str, list[Routing]] = field(default_factory=dict)

    def losses(self) -> dict[str, Tensor]:
        """Each auxiliary loss summed over layers and calls; the values are weighted and ready to add."""
        total: dict[str, Tensor] = {}
        for calls in self.routings.values():
            for routing in calls:
                for name, value in routing.losses.items():
                    total[name] = total[name] + value if name in total else value
        return total


@contextmanager
def record(model: nn.Module) -> Iterator[Step]:
    """Collect routing decisions and auxiliary losses of every `MoE` in `model` while the block runs.

    Nothing is kept outside such a block, so a model that nobody records costs nothing. Every forward call counts once:
    recomputation by activation checkpointing does not add to it, whether backward runs inside the block or after.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, MoE)}
    step = Step({name: [] for name in layers})
    before = {name: layer._record for name, layer in layers.items()}
    for name, layer in layers.items():
        layer._record = step.routings[name]
    try:
        yield step
    finally:
        for name, layer in layers.items():
            layer._record = before[name]
