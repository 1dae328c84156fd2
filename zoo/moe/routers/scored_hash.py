"""DeepSeek-V4's first layers: a table of token ids names the experts, and learnt scores weigh them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..routing import Routing
from .context import per_token
from .topk import TopKRouter


class ScoredHashRouter(TopKRouter):
    """Experts by token id, as hash layers (2106.04426) choose them, with the weights of a learnt gate (DeepSeek-V4).

    table[id] [k] are a token's experts e, and its weights s_e / (sum of the chosen s + normalize_eps) * scale of scores
    s = sqrt(softplus(x W^T)). Without a `table` [V, k] each id gets k different experts, drawn by `seed`. Options are
    `TopKRouter`'s, but those that change what is chosen; the defaults of score and normalize are DeepSeek-V4's.

    Context: token_ids [T] or [B, S]; mask. Raises ValueError without token_ids, without table and vocab_size, for a
    table that names no expert of E, or one twice for a token, and for options that choose.
    """

    table: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        vocab_size: int | None = None,
        k: int = 2,
        *,
        table: Tensor | Sequence[Sequence[int]] | None = None,
        seed: int = 42,
        **options: Any,
    ) -> None:
        for name in ("noise", "num_groups", "selection_bias"):
            if options.get(name):
                raise ValueError(f"ScoredHashRouter: {name} has no meaning where a table chooses")
        if table is None and vocab_size is None:
            raise ValueError("ScoredHashRouter: give vocab_size, or a table with the experts of every token id")
        self._given = None if table is None else torch.as_tensor(table, device="cpu").long()
        if self._given is not None:
            k = self._given.shape[-1]
            ordered = self._given.sort(-1).values
            fits = self._given.dim() == 2 and bool(((ordered >= 0) & (ordered < num_experts)).all())
            if not fits or bool((ordered[:, 1:] == ordered[:, :-1]).any()):
                raise ValueError(
                    f"ScoredHashRouter: table must be [V, k], in each row different experts 0..{num_experts - 1}"
                )
            vocab_size = self._given.shape[0]
        self.vocab_size, self.seed = vocab_size or 0, seed
        super().__init__(dim, num_experts, k, **{"score": "sqrt_softplus", "normalize": True, **options})

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W as `TopKRouter` does, and fill the table as it was made."""
        super().reset_parameters()
        if "table" not in self._buffers:
            self.register_buffer("table", torch.empty(self.vocab_size, self.k, dtype=torch.int64))
        if not self.table.is_meta:
            self.table.copy_(self._random() if self._given is None else self._given)

    def _random(self) -> Tensor:
        draw = torch.Generator().manual_seed(self.seed)
        return torch.rand(self.vocab_size, self.num_experts, generator=draw, device="cpu").topk(self.k, dim=-1).indices

    def forward(self, x: Tensor, **context: Any) -> Routing:
        """Route tokens x [T, D] or [B, S, D] by the context's token_ids, with weights of what x holds."""
        ids = per_token("ScoredHashRouter", context, "token_ids", x, self.vocab_size)
        return super().forward(x, **{**context, "preference": self.table[ids]})

    def _choose(self, scores: Tensor, preference: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The experts that preference [T, K] names; without it, for who asks before ids are known, the best scored."""
        if preference is None:
            return super()._choose(scores)
        return preference, self._weights(scores.gather(-1, preference))

    def extra_repr(self) -> str:
        """Sizes and options for `print(model)`."""
        return f"{super().extra_repr()}, vocab_size={self.vocab_size}"
