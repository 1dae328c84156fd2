"""SiRA: token choice with dropout on the gate."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from .topk import TopKRouter


class SiRARouter(TopKRouter):
    """SiRA (2311.09179): TopK(Dropout(softmax(x W^T))), with a limit on tokens an expert takes and a balance loss.

    In training each probability is zeroed with `expert_dropout` and else divided by 1 - expert_dropout, before the
    choice: an expert that is chosen all the same has weight zero. Weights are not renormalised. There is no authors'
    code; k=4 and the rate are not checked against the paper. Options as in `TopKRouter`, the losses too: they see the
    probabilities before dropout. Raises ValueError for a rate outside [0, 1).
    """

    def __init__(self, dim: int, num_experts: int, k: int = 4, *, expert_dropout: float = 0.5, **options: Any) -> None:
        if not 0 <= expert_dropout < 1:
            raise ValueError(f"SiRARouter: expert_dropout must be at least 0 and below 1, got {expert_dropout}")
        super().__init__(dim, num_experts, k, **options)
        self.expert_dropout = expert_dropout

    @property
    def plain(self) -> bool:
        """As in `TopKRouter`: dropout is for training."""
        return True

    def _choose(self, scores: Tensor, preference: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super()._choose(F.dropout(scores, self.expert_dropout, self.training), preference)
