"""DYNMoE: a token meets every expert that scores above the expert's threshold, and experts come and go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import autocast, balance
from ..auxiliary import AuxiliaryLosses
from ..experts import Experts
from ..layer import MoE
from ..routing import Routing
from .base import Router, added, is_recomputation, orthogonal_
from .context import label_sources

LOSSES = {"top_any_load": 1e-2, "top_any_cost": 1e-2, "diverse_and_simple": 1e-2}
LARGEST_SCALE = 100.0


class DynamicRouter(Router):
    """DYNMoE's top-any gate (2405.14297, section 3.1): meet every e with sigmoid(a cos(x, w_e)) > sigmoid(a G_e).

    Each expert met has the same weight, 1 / (how many are met). The switch is 1 where s > threshold, its gradient that
    of relu(s - threshold), straight through; the number met has none. In training a token may meet none; in evaluation
    it then meets the expert of largest s. a = min(1 / temperature, 100) is fixed, 1 in the authors' code; embeddings w
    start orthogonal, G at zero. Losses (weight 0.01, MoE-LLaVA's for their sum) are top_any_load, top_any_cost and
    diverse_and_simple. `adapt_experts` removes experts that no token met and adds one for tokens that met none, by
    what training forwards saw while `recording` was True. Context: mask.

    Raises ValueError for a temperature that is not positive.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        temperature: float = 1.0,
        losses: Mapping[str, float | Mapping[str, Any]] | None = LOSSES,
        dtype: torch.dtype | None = torch.float32,
    ) -> None:
        super().__init__(dim, num_experts)
        if temperature <= 0:
            raise ValueError(f"DynamicRouter: temperature must be positive, got {temperature}")
        self.scale, self.dtype, self.losses = min(1 / temperature, LARGEST_SCALE), dtype, AuxiliaryLosses(losses)
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.threshold = nn.Parameter(torch.empty(num_experts))
        self.recording = False
        # Not buffers: they differ between processes on purpose.
        self.met: Tensor | None = None
        self.unmet: Tensor | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make the embeddings orthogonal, and zero the thresholds."""
        orthogonal_(self.weight)
        self.threshold.zero_()
        self.met = self.unmet = None

    def forward(self, x: Tensor, mask: Tensor | None = None, **context: Any) -> Routing:
        """Route tokens x [T, D] or [B, S, D]; mask [T] or [B, S], False for tokens to leave out."""
        # Autocast would round the scores, and with them the choice.
        if autocast.is_on(x):
            with autocast.off(x):
                return self.forward(x, mask, **context)
        sequences, given = (x.shape[0], x.shape[1]) if x.dim() == 3 else None, x
        x = x.reshape(-1, self.dim).to(x.dtype if x.dtype == torch.float64 else self.dtype or x.dtype)
        if mask is not None:
            mask = mask.reshape(-1).bool()
            x = x.where(mask[:, None], 0)  # nan there would reach the gradients
        cosine = F.linear(F.normalize(x, dim=-1), F.normalize(self.weight.to(x.dtype), dim=-1))
        score = (cosine * self.scale).sigmoid()
        margin = (score - (self.threshold.to(x.dtype) * self.scale).sigmoid()).relu()
        met = margin > 0
        if mask is not None:
            met = met & mask[:, None]
        switches = met + (margin - margin.detach())
        self._record(x, met, mask)
        losses = {}
        if self.training and self.losses.terms:
            sources = {
                "switches": lambda: switches,
                "embeddings": lambda: self.weight.to(x.dtype),
                "logits": lambda: cosine,
                "probs": lambda: score / score.sum(-1, keepdim=True),
                "selected": lambda: met.to(x.dtype),
                "gates": lambda: switches / met.sum(-1, keepdim=True).clamp(min=1),
                "mask": lambda: mask,
                **label_sources("DynamicRouter", context, given, mask),
            }
            losses = self.losses(sources, {"sequence": sequences, "group": None})
        if not self.training:
            best = torch.zeros_like(met).scatter(-1, score.argmax(-1, keepdim=True), True)
            alone = best & ~met.any(-1, keepdim=True)
            if mask is not None:
                alone = alone & mask[:, None]
            met, switches = met | alone, switches + alone
        weight = switches / met.sum(-1, keepdim=True).clamp(min=1)
        return Routing.from_matrix(
            weight, met, losses=losses, probs=score / score.sum(-1, keepdim=True), asked=met.sum(-1)
        )

    @torch.no_grad()
    def _record(self, x: Tensor, met: Tensor, mask: Tensor | None) -> None:
        """Remember how often each expert was met, and the sum of the tokens that met none."""
        if not (self.recording and self.training) or is_recomputation():
            return
        nowhere = ~met.any(-1) if mask is None else ~met.any(-1) & mask
        self.met, self.unmet = added(self.met, met.sum(0)), added(self.unmet, x[nowhere].sum(0))

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{self.dim}, num_experts={self.num_experts}"


@torch.no_grad()
def adapt_experts(layer: MoE, max_experts: int = 64) -> tuple[list[int], int]:
    """Remove experts that no token met, and add one if tokens met none (DYNMoE, section 3.2); which and how many.

    Goes by what the layer's `DynamicRouter` recorded, over all processes, and forgets it. The new expert's embedding is
    the sum of the tokens without an expert, of unit length, its threshold 0, its weights drawn anew. At least one
    expert stays, and there are max_experts at most. Parameters are replaced: make the optimizer anew, or hand it those.

    Raises TypeError for a layer without a DynamicRouter and `Experts`, ValueError where nothing was recorded.
    """
    router, experts = layer.router, layer.experts
    if not isinstance(router, DynamicRouter) or not isinstance(experts, Experts):
        kinds = f"{type(router).__name__} and {type(experts).__name__}"
        raise TypeError(f"adapt_experts: expected a layer of a DynamicRouter and Experts, got {kinds}")
    if router.met is None or router.unmet is None:
        raise ValueError("adapt_experts: nothing was recorded; set layer.router.recording = True and train")
    met, unmet = balance.all_reduce(router.met), balance.all_reduce(router.unmet)
    router.met = router.unmet = None
    keep = met.nonzero().squeeze(-1)
    if not keep.numel():
        keep = torch.zeros(1, dtype=torch.int64, device=met.device)
    grows = bool(unmet.any()) and keep.numel() < max_experts
    _replace(router, "weight", keep, F.normalize(unmet, dim=0)[None] if grows else None)
    _replace(router, "threshold", keep, unmet.new_zeros(1) if grows else None)
    fresh = Experts(1, experts.dim, experts.hidden_dim, experts.activation, experts.b_in is not None) if grows else None
    for name, _ in list(experts.named_parameters()):
        _replace(experts, name, keep, None if fresh is None else getattr(fresh, name))
    router.num_experts = experts.num_experts = keep.numel() + grows
    removed = sorted(set(range(met.numel())) - set(keep.tolist()))
    return removed, int(grows)


def _replace(module: nn.Module, name: str, keep: Tensor, new: Tensor | None) -> None:
    """Replace a parameter [E, ..] by its rows `keep` and, at the end, `new`."""
    old: Tensor = getattr(module, name)
    rows = old.index_select(0, keep)
    rows = rows if new is None else torch.cat([rows, new.to(rows.device, rows.dtype)])
    module.register_parameter(name, nn.Parameter(rows, requires_grad=old.requires_grad))
