"""Short soft prompts of which a gate gives every sequence one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .layer import Recorded
from .routers.base import Router


class PromptMixture(Recorded):
    """[sum_e p_e P_e; X]: what goes before the embeddings X of a sequence, p from their mean (SMoP, EMNLP 2023).

    The paper's gate is `SMoPRouter`: one of the E prompts, times its probability. Gates see a batch of sequences as one
    list of tokens. `before` is for who puts them there: how many it did. Parameters: prompts [E, P, D], from N(0, 1) at
    first. Raises ValueError for a length P below one.
    """

    before = 0

    def __init__(self, router: Router, length: int = 5) -> None:
        super().__init__()
        if length < 1:
            raise ValueError(f"PromptMixture: length must be at least 1, got {length}")
        self.router, self.length = router, length
        self.prompts = nn.Parameter(torch.empty(router.num_experts, length, router.dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the prompts from N(0, 1)."""
        self.prompts.normal_()

    def forward(self, x: Tensor, mask: Tensor | None = None, **context: Any) -> Tensor:
        """The prompts [B, P, D] of sequences x [B, S, D]; mask [B, S], False for tokens that do not count.

        Other keywords go to the gate, one value a sequence.
        """
        if mask is None:
            mean = x.sum(1) / max(x.shape[1], 1)
        else:
            mask = mask.bool()
            mean = x.where(mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        weight = self._decide(mean, context).dense()
        return (weight.to(self.prompts.dtype) @ self.prompts.flatten(1)).unflatten(-1, self.prompts.shape[1:])

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{self.prompts.shape[0]}, length={self.length}, dim={self.prompts.shape[2]}"
