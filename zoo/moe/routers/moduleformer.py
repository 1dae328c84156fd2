"""ModuleFormer: a gate with a hidden layer, balanced by mutual information."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .topk import TopKRouter

LOSSES = {"mutual_information": 1e-3}


class ModuleFormerRouter(TopKRouter):
    """ModuleFormer (2306.04640, section 3): the k largest of softmax(W GELU(A x + b)), not divided by their sum.

    Dropout on the hidden layer in training. sample of the k are drawn in training instead of being the largest: after
    the k - sample best, from the other probabilities plus 1e-6, without putting back. The loss is
    mutual_information, -I(E; X); the code's other is {"switch": w, "z": 0.1 w}. The code's third gate, cosines in a
    hidden space with a learnt temperature, is `XMoERouter(routing_dim=256, form="tutel")` but for that one's limit.
    Other options as in `TopKRouter`.

    Raises ValueError unless 0 <= sample <= k.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 2,
        *,
        hidden_dim: int = 256,
        dropout: float = 0.1,
        sample: int = 0,
        losses: Mapping[str, float | Mapping[str, Any]] | None = LOSSES,
        **options: Any,
    ) -> None:
        if not 0 <= sample <= k:
            raise ValueError(f"ModuleFormerRouter: expected 0 <= sample <= k={k}, got {sample}")
        super().__init__(dim, num_experts, k, losses=losses, **options)
        self.hidden = nn.Linear(dim, hidden_dim)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_dim))
        self.dropout, self.sample = dropout, sample
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw both layers as `nn.Linear` does."""
        super().reset_parameters()
        if hasattr(self, "sample"):  # not yet, when the parent class is made
            self.hidden.reset_parameters()
            bound = self.weight.shape[1] ** -0.5
            self.weight.uniform_(-bound, bound)

    def _logits(self, x: Tensor, **context: Any) -> Tensor:
        hidden = F.gelu(F.linear(x, self.hidden.weight.to(x.dtype), self.hidden.bias.to(x.dtype)))
        return super()._logits(F.dropout(hidden, self.dropout, self.training))

    def _preference(self, logits: Tensor, mask: Tensor | None) -> Tensor | None:
        if not self.training or not self.sample:
            return None
        probs = logits.detach().softmax(-1)
        best = probs.topk(self.k - self.sample, dim=-1).indices
        # The largest of log p + Gumbel noise are a sample without putting back.
        noisy = (probs + 1e-6).log() - torch.empty_like(probs).exponential_().log()
        return noisy.scatter(-1, best, float("inf"))
