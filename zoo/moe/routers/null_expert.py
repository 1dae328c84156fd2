"""AdaMoE: null experts, so that a token chooses how many true ones it needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..auxiliary import choice_sources
from ..routing import Routing
from .context import label_sources
from .linear import LinearRouter


class NullExpertRouter(LinearRouter):
    """AdaMoE (2406.13233, section 3): top-k among E true and num_null null experts, which give zero at no cost.

    p = softmax(x W^T), W [E + num_null, D]; of the k largest the true ones count, with weights p divided by the sum
    over the true ones chosen, so 0 to k experts a token. The layer's experts are the E true ones: null experts are no
    assignments. The loss null_load is Switch's with one load for all null experts, their mean, so that the router need
    not tell them apart: what the paper says, and the default of the two. In the authors' code the averaging runs over
    the wrong axis and does nothing, which is the loss "transformers" here. Evaluation is the same but for losses.
    Context: mask.

    Raises ValueError unless num_null >= 1 and 1 <= k <= E + num_null.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 2,
        *,
        num_null: int,
        losses: Mapping[str, float | Mapping[str, Any]] | None = None,
        dtype: torch.dtype | None = torch.float32,
    ) -> None:
        if num_null < 1 or not 1 <= k <= num_experts + num_null:
            raise ValueError(
                f"NullExpertRouter: expected num_null >= 1 and 1 <= k <= num_experts + num_null, got "
                f"num_null={num_null}, k={k} and {num_experts} experts"
            )
        super().__init__(dim, num_experts, losses=losses, dtype=dtype)
        self.k, self.num_null = k, num_null
        self.weight = nn.Parameter(torch.empty(num_experts + num_null, dim))
        self.reset_parameters()

    def route(self, logits: Tensor, mask: Tensor | None = None, **context: Any) -> Routing:
        """Decide from logits [T, E + num_null] or [B, S, E + num_null], true experts first."""
        sequences, given = (logits.shape[0], logits.shape[1]) if logits.dim() == 3 else None, logits
        logits = logits.reshape(-1, self.num_experts + self.num_null)
        if mask is not None:
            mask = mask.reshape(-1).bool()
            logits = logits.where(mask[:, None], 0)  # a masked token may hold anything, even nan
        probs = logits.softmax(-1)
        weight, expert = probs.topk(self.k, dim=-1)
        keep = expert < self.num_experts
        total = (weight * keep).sum(-1, keepdim=True)
        true_weight = weight * keep / total.where(total > 0, 1)
        if mask is not None:
            keep = keep & mask[:, None]
        losses = {}
        if self.training and self.losses.terms:
            sources = choice_sources(logits, logits, None, expert, true_weight, mask, lambda: probs, lambda: probs)
            sources |= label_sources("NullExpertRouter", context, given, mask)
            sources["num_null"] = lambda: self.num_null
            losses = self.losses(sources, {"sequence": sequences, "group": None})
        true_probs = probs[:, : self.num_experts]
        return Routing.from_choices(
            expert,
            true_weight,
            self.num_experts,
            keep=keep,
            losses=losses,
            probs=true_probs / true_probs.sum(-1, keepdim=True),
            asked=keep.sum(-1),
        )

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{self.dim}, num_experts={self.num_experts}, k={self.k}, num_null={self.num_null}"
