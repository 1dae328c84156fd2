"""MoEBERT: one expert a token or a sentence, weighed by its probability."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from .merging import pool
from .topk import TopKRouter


class MoEBERTRouter(TopKRouter):
    """MoEBERT's trainable gates (2204.07675): the expert of largest softmax(x W^T), its output times that probability.

    level "token" is the authors' gate-token, which is Switch's; "sentence" their gate-sentence, where x is the mean of
    the tokens of a sequence [B, S, D] (of all tokens, where they come as one list) without padding. Later tokens then
    decide for earlier ones: not for causal models. The published models have hash gates instead, `HashRouter`: random,
    or balanced with `zoo.moe.routers.hash.balanced_table`. Their balance loss is losses={"switch": w}, with weight 0 in
    the authors' script; here tokens count in it, not sentences. Other options as in `TopKRouter`.

    Context: mask. Raises ValueError for another level, and with "sentence" for jitter and noise, which would part the
    tokens of a sentence.
    """

    def __init__(
        self, dim: int, num_experts: int, k: int = 1, *, level: Literal["token", "sentence"] = "token", **options: Any
    ) -> None:
        if level not in ("token", "sentence"):
            raise ValueError(f"MoEBERTRouter: level must be 'token' or 'sentence', got {level!r}")
        if level == "sentence" and (options.get("jitter") or options.get("noise")):
            raise ValueError("MoEBERTRouter: jitter and noise differ between the tokens of a sentence; leave them out")
        super().__init__(dim, num_experts, k, **options)
        self.level = level

    @property
    def plain(self) -> bool:
        """As in `TopKRouter`: where tokens decide."""
        return self.level == "token"

    def _logits(self, x: Tensor, **context: Any) -> Tensor:
        if self.level == "token":
            return super()._logits(x, **context)
        rows = x if x.dim() == 3 else x[None]
        mask = context.get("mask")
        mean = pool(rows, None if mask is None else mask.reshape(rows.shape[:2]).bool())[0]
        logits = super()._logits(mean, **context)
        return logits.unsqueeze(1).expand(*rows.shape[:2], -1).reshape(*x.shape[:-1], self.num_experts)
