"""Intuition-MoR1E: what a token says, and what its instruction resembles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..routing import Routing
from .context import missing
from .dense import to_all
from .linear import LinearRouter


class MoR1ERouter(LinearRouter):
    """Intuition-MoR1E (2404.08985): c (w token_scale softmax(x W^T) + (1 - w) intuition_scale s), over all experts.

    s [E] is the caller's `intuition`: how near the instruction is to each of E clusters, the product of its embedding,
    of length one, with their centres (k-means of the training instructions' embeddings). w = sigmoid(100 omega) and
    c = sigmoid(100 chi) are learnt, a half each at first, and W starts with zeros. All this, the scales 32 and 4, and
    the factors 100, which make omega and chi learn fast, are those of the authors' code (of the second version,
    T-REX); weights do not sum to one.
    `zoo.moe.RankOneExperts` are its experts.

    Context: intuition, [E] for all, [B, E] one a sequence, or one a token; mask. losses as in `TopKRouter`, of the
    softmax. Raises ValueError without intuition and for one of another shape.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        token_scale: float = 32.0,
        intuition_scale: float = 4.0,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_experts, **options)
        self.token_scale, self.intuition_scale = token_scale, intuition_scale
        self.omega, self.chi = nn.Parameter(torch.empty(())), nn.Parameter(torch.empty(()))
        self.reset_parameters()

    @property
    def k(self) -> int:
        """How many experts a token meets: all."""
        return self.num_experts

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Zero all: experts alike, and each half open."""
        self.weight.zero_()
        if hasattr(self, "chi"):  # not yet, when the parent class is made
            self.omega.zero_()
            self.chi.zero_()

    def route(self, logits: Tensor, mask: Tensor | None = None, intuition: Any = None, **context: Any) -> Routing:
        """Decide from logits [T, E] or [B, S, E]."""
        near = self._near(intuition, logits)
        logits, mask, split = self._flat(logits, mask)
        probs = logits.softmax(-1)
        losses = self._losses(logits, probs, torch.ones_like(probs, dtype=torch.bool), mask, split, context)
        omega, chi = ((100 * one.to(probs.dtype)).sigmoid() for one in (self.omega, self.chi))
        weight = chi * (omega * self.token_scale * probs + (1 - omega) * self.intuition_scale * near)
        return to_all(weight, mask, losses=losses, probs=probs)

    def _near(self, intuition: Any, logits: Tensor) -> Tensor:
        """Intuition of each token, [T, E]."""
        if intuition is None:
            raise missing(type(self).__name__, "intuition")
        near = torch.as_tensor(intuition, dtype=logits.dtype, device=logits.device)
        flat, number = logits.reshape(-1, self.num_experts), near.shape[0] if near.dim() else 0
        if near.shape in (logits.shape[-1:], flat.shape):
            return near.expand(flat.shape)
        if near.shape == logits.shape:
            return near.reshape(flat.shape)
        # Some blocks hand on several sequences as one list of tokens.
        whole = number == logits.shape[0] if logits.dim() == 3 else number and not flat.shape[0] % number
        if near.dim() != 2 or near.shape[1] != self.num_experts or not whole:
            raise ValueError(
                f"{type(self).__name__}: intuition has shape {list(near.shape)}, expected [{self.num_experts}] for "
                f"all, one for each sequence, or one for each of {list(logits.shape[:-1])} tokens"
            )
        return near.repeat_interleave(flat.shape[0] // max(number, 1), dim=0, output_size=flat.shape[0])

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{super().extra_repr()}, token_scale={self.token_scale:g}, intuition_scale={self.intuition_scale:g}"
