"""GShard's top-2 gate: a first expert for certain, a second one more or less by chance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..capacity import Capacity
from .base import take_fixed
from .topk import TopKRouter

Second = Literal["all", "none", "random", "threshold", "sampling"]
LOSSES = {"gshard": 1e-2}
CAPACITY = Capacity(1.0)  # of choices, of which there are two a token


class GShardRouter(TopKRouter):
    """GShard (2006.16668, algorithm 1): top-2 of the softmax, and a rule for whether the second expert is met.

    g1 and g2 are the two best probabilities divided by g1 + g2 + 1e-9; `second` says when the second expert is met:
        random     with probability min(1, g2 / threshold): keep where U(0, 1) < g2 / threshold. threshold=0.5 is the
                   paper's 2 g2 > U and fairscale's, 0.2 mesh-tensorflow's default
        all        always (lingvo's default)
        threshold  where g2 > threshold (mesh-tensorflow)
        sampling   always, but it is drawn: the largest logit + Gumbel noise but for the first (lingvo, fairseq's
                   default for Meta's models, DeepSpeed); its weight is still its own probability
        none       never (mesh-tensorflow)
    The default is the paper's. In evaluation the rule is the same, as in all of these codes, unless eval_second says
    otherwise. renormalize="before" fixes g1 and g2 before the rule and capacity drop any (lingvo, mesh-tensorflow);
    "after" applies the rule to the bare probabilities and divides what is left by its sum (fairscale, fairseq,
    DeepSpeed). C is 2 T / E by default, first choices before any second, and the loss gshard with weight 0.01.

    Other options as in `TopKRouter`. Raises ValueError when an option is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        second: Second = "random",
        eval_second: Second | None = None,
        threshold: float = 0.5,
        renormalize: Literal["before", "after"] = "before",
        capacity: Capacity | None = CAPACITY,
        losses: Mapping[str, float | Mapping[str, Any]] | None = LOSSES,
        **options: Any,
    ) -> None:
        before = renormalize == "before"
        take_fixed(self, options, k=2, normalize=before, normalize_eps=1e-9)
        super().__init__(
            dim, num_experts, 2, normalize=before, normalize_eps=1e-9, capacity=capacity, losses=losses, **options
        )
        self.second, self.eval_second = second, second if eval_second is None else eval_second
        self.threshold, self.renormalize = threshold, renormalize
        for name, value in (("second", self.second), ("eval_second", self.eval_second)):
            if value not in get_args(Second):
                raise ValueError(f"GShardRouter: {name} must be one of {', '.join(get_args(Second))}, got {value!r}")
        if renormalize not in ("before", "after"):
            raise ValueError(f"GShardRouter: renormalize must be 'before' or 'after', got {renormalize!r}")

    @property
    def rule(self) -> Second:
        """The rule for the second expert that holds at present."""
        return self.second if self.training else self.eval_second

    def _preference(self, logits: Tensor, mask: Tensor | None) -> Tensor | None:
        if self.rule != "sampling":
            return None
        logits = logits.detach()
        first = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, logits.argmax(-1, keepdim=True), True)
        gumbel = -torch.empty_like(logits).exponential_().log()
        return (logits + gumbel).masked_fill(first, float("inf"))

    def _wanted(self, expert: Tensor, weight: Tensor) -> Tensor | None:
        if self.rule in ("all", "sampling"):
            return None
        first, second = torch.ones_like(expert[:, 0], dtype=torch.bool), weight[:, 1].detach()
        if self.rule == "none":
            kept = ~first
        elif self.rule == "threshold":
            kept = second > self.threshold
        else:
            kept = torch.rand_like(second) * self.threshold < second
        return torch.stack([first, kept], dim=-1)

    def _renormalizes(self) -> bool:
        return self.renormalize == "after" or super()._renormalizes()
