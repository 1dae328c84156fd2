"""Stacked experts that stay as they are, each with linear maps of low rank of its own beside its projections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .experts import Experts, Weights
from .kernels import get_activation
from .kernels.linear import grouped_linear
from .lora import LoRAExperts
from .offloaded import OffloadedExperts
from .quantised import QuantisedExperts
from .routing import Routing

PARTS = ("gate", "up", "down")


class LoRAOfExperts(nn.Module):
    """Frozen experts (plain, quantised, offloaded) whose weights are W_e + alpha / r * B_e A_e (LoRA, 2106.09685).

    A pair (A_e, B_e) for each expert e and each of `parts`: gate [F, D], up [F, D], and down [D, F]; experts of a plain
    activation have up and down alone. A starts as `nn.Linear` does and B with zeros, so that it starts as `base`, up to
    rounding. `dropout` acts in training on what A reads, alike for gate and up.

    No sum of weights is made: rows, gathered once, go through W_e and through A_e and B_e. Kept for the backward of n
    assignments are [n, D] thrice, [n, 2F] and [n, F] twice, and what is of rank r; beside tokens of another type than
    the adapters' also [n, D] and [n, F] in theirs. Frozen weights get no gradient, and none is computed; under autocast
    they are copied to its type and kept so. Those of few bits and those elsewhere come some at a time, and again in the
    backward, for which nothing is kept but the tokens.

    Parameters: those of `base`; lora.PART.a [E, r, D or F] and lora.PART.b [E, F or D, r].
    Raises ValueError for other experts, those spread over processes, unknown parts or none, and sizes below one.
    """

    def __init__(
        self,
        base: Experts | QuantisedExperts | OffloadedExperts,
        rank: int = 8,
        alpha: float = 16.0,
        parts: Sequence[str] = PARTS,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if (reason := unfit(base)) is not None:
            raise ValueError(f"LoRAOfExperts: {reason}")
        known = PARTS if base.gated else PARTS[1:]
        if not parts or set(parts) - set(known):
            raise ValueError(f"LoRAOfExperts: expected parts among {', '.join(known)}, got {list(parts)}")
        self.base: Any = base
        self.num_experts, self.dim, self.hidden_dim = base.num_experts, base.dim, base.hidden_dim
        self.activation = base.activation
        self.lora = nn.ModuleDict()
        for part in (part for part in known if part in parts):
            sizes = (self.hidden_dim, self.dim) if part == "down" else (self.dim, self.hidden_dim)
            self.lora[part] = LoRAExperts(self.num_experts, sizes[0], rank, alpha, sizes[1], dropout)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Weighted sum [T, D] of what each token's experts make of tokens x [T, D].

        Raises RuntimeError where the experts were spread over processes since.
        """
        if self.base.parallel is not None:
            raise RuntimeError("LoRAOfExperts: experts with adapters cannot be spread over processes")
        if isinstance(self.base, (QuantisedExperts, OffloadedExperts)):
            return self._decoded(x, routing)
        return self._compute(self.base.held, None, x, routing)

    # Which experts are decoded the host decides.
    @torch.compiler.disable
    def _decoded(self, x: Tensor, routing: Routing) -> Tensor:
        y: Tensor = self.base.in_groups(x, routing, self._compute, learns=True)
        if not routing.token_index.numel():  # gradients of zero, as of whole experts
            y = y + sum(p[:0].sum() for p in self.lora.parameters()).to(y.dtype)  # type: ignore[union-attr]
        return y

    def _compute(self, weights: Weights, experts: Tensor | None, x: Tensor, routing: Routing) -> Tensor:
        """The same of those experts [G] (None: all), which have these weights and to which `routing` refers."""
        index, drop = routing.token_index, self.base.dropout if self.training else 0.0
        rows, weight = x.index_select(0, index), routing.weight[:, None]
        if self.base.weigh_input:
            rows = rows * weight.to(rows.dtype)
        into = ("gate", "up") if self.base.gated else ("up",)
        hidden = self._project(into, rows, weights.w_in, weights.b_in, experts, routing)
        hidden = get_activation(self.activation).forward(hidden)
        hidden = F.dropout(hidden, drop) if drop else hidden
        out = self._project(("down",), hidden, weights.w_out, weights.b_out, experts, routing)
        out = F.dropout(out, drop) if drop else out
        if not self.base.weigh_input:
            out = out * weight.to(out.dtype)
        return out.new_zeros(x.shape).index_add(0, index, out)

    def _project(
        self,
        parts: tuple[str, ...],
        rows: Tensor,
        w: Tensor,
        bias: Tensor | None,
        experts: Tensor | None,
        routing: Routing,
    ) -> Tensor:
        """Rows [A, I] through weights [G, O, I], whose rows are those parts, and the pairs beside them: [A, O]."""
        y = grouped_linear(rows, w, routing.offsets)
        if bias is not None:
            y = y + bias.to(y.dtype).index_select(0, routing.expert_index)
        own: list[Any] = [self.lora[part] for part in parts if part in self.lora]
        if not own:
            return y
        read = own[0].reads(rows)
        added = [pair.each(read, routing.offsets, experts).to(y.dtype) for pair in own]
        if len(own) < len(parts):  # of gate and up one alone
            nothing = torch.zeros_like(added[0])
            added = [nothing, *added] if parts[0] not in self.lora else [*added, nothing]
        return y + (added[0] if len(added) == 1 else torch.cat(added, dim=-1))

    @torch.no_grad()
    def merged(self) -> Experts:
        """The experts with their pairs added to weights of their own, which are new.

        Raises ValueError for experts in few bits, as rounded again the sum would be other experts, and offloaded ones.
        """
        if isinstance(self.base, OffloadedExperts):
            raise ValueError("offloaded experts cannot take adapters in")
        if isinstance(self.base, QuantisedExperts):
            raise ValueError(f"experts in few bits ({self.base.format}) cannot take adapters in")
        base: Experts = self.base
        pair: Any
        for part, pair in self.lora.items():
            name = "down_proj" if part == "down" else base._in
            old = getattr(base, name)
            new = old.detach().clone()
            exact = torch.promote_types(pair.a.dtype, torch.float32)
            start = self.hidden_dim if part == "up" and base.gated else 0
            for w, a, b in zip(new[:, start : start + pair.out_dim], pair.a, pair.b):
                w.copy_(w + pair.alpha / pair.rank * (b.to(exact) @ a.to(exact)))
            # Layers that share weights have pairs of their own.
            setattr(base, name, nn.Parameter(new, old.requires_grad))
        return base

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{self.num_experts}, dim={self.dim}, hidden_dim={self.hidden_dim}, activation={self.activation!r}"


def unfit(experts: Any) -> str | None:
    """Why experts cannot have pairs beside their projections; None for those that can."""
    if type(experts) not in (Experts, QuantisedExperts, OffloadedExperts):
        return f"expected Experts, QuantisedExperts or OffloadedExperts, got {type(experts).__name__}"
    return None if experts.parallel is None else "experts that are spread over processes cannot have adapters"
