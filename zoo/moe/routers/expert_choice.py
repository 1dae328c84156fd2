"""Expert choice: every expert takes the tokens it scores highest."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..capacity import Capacity, as_capacity
from ..kernels import transformed
from ..routing import Routing
from .capped import capped_plan, within_cap
from .context import label_sources
from .groups import GroupSize, check_groups, group_tokens
from .linear import LinearRouter


class ExpertChoiceRouter(LinearRouter):
    """Expert choice (2202.09368, section 3.2): each expert takes the C tokens of a group that it scores highest.

    Scores are the softmax of x W^T over "experts" (the paper, V-MoE's code, flaxformer) or over the "tokens" of the
    group (mesh-tensorflow). The load is even by construction, so no loss is needed; a token meets any number of
    experts, also none. C follows from `capacity` for one choice a token, C = N * factor / E, so that the factor (2 in
    the paper) is how many experts a token meets on average; its `drop` has no meaning here.

    normalize divides the weights of each token by their sum plus normalize_eps (sparse upcycling, 2212.05055);
    noise_std adds N(0, noise_std^2) to the logits in training (V-MoE: 1/E). max_experts is the paper's capped variant
    (EC-CAP): experts choose by `capped_plan`, so that a token meets at most that many; what its rounding to whole
    tokens leaves above the cap is dropped, the token's lowest scores first. losses may name those that need no choice
    of the tokens, such as z. Groups and dtype as in `TopKRouter`.

    An expert sees the whole group before it takes a token, later tokens too: in a causal model training would use the
    future, and generation differ from it. With the context causal=True the router warns, once.

    Raises ValueError when an option is unknown or has no meaning here.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        capacity: Capacity | float | None = None,
        softmax: Literal["experts", "tokens"] = "experts",
        normalize: bool = False,
        normalize_eps: float = 1e-20,
        noise_std: float = 0.0,
        max_experts: int | None = None,
        group_size: GroupSize = None,
        group_sequences: int = 1,
        losses: Mapping[str, float | Mapping[str, Any]] | None = None,
        dtype: torch.dtype | None = torch.float32,
    ) -> None:
        super().__init__(dim, num_experts, losses=losses, dtype=dtype)
        if softmax not in ("experts", "tokens"):
            raise ValueError(f"ExpertChoiceRouter: softmax must be over 'experts' or 'tokens', got {softmax!r}")
        check_groups("ExpertChoiceRouter", group_size, group_sequences)
        self.capacity = Capacity(2.0) if capacity is None else as_capacity(capacity)
        if self.capacity.drop != "choice" or self.capacity.renormalize:
            raise ValueError(
                "ExpertChoiceRouter: capacity.drop and capacity.renormalize have no meaning where experts choose; "
                "normalize divides a token's weights by their sum"
            )
        self.softmax, self.normalize, self.normalize_eps = softmax, normalize, normalize_eps
        self.noise_std, self.max_experts = noise_std, max_experts
        if max_experts is not None and (max_experts < 1 or max_experts < self.capacity.factor):
            raise ValueError(
                f"ExpertChoiceRouter: tokens meet {self.capacity.factor:g} experts on average, so that max_experts "
                f"must be at least that, got {max_experts}"
            )
        self.group_size, self.group_sequences = group_size, group_sequences
        for name, term in self.losses.terms.items():
            if unknown := {"selected", "first", "unbiased", "gates", "k"} & set(term.parameters):
                raise ValueError(
                    f"ExpertChoiceRouter: loss {name!r} reads {', '.join(sorted(unknown))}: choices of tokens, but "
                    "here experts choose, and the load is even"
                )
        self._warned = False

    def route(self, logits: Tensor, mask: Tensor | None = None, causal: bool = False, **context: Any) -> Routing:
        """Decide from logits [T, E] or [B, S, E]."""
        if causal and not self._warned:
            self._warned = True
            warnings.warn(
                "ExpertChoiceRouter in a causal model: an expert picks among all tokens of a group, so that a token's "
                "output depends on later ones; generation will not match training",
                stacklevel=2,
            )
        batch = logits.shape[0] if logits.dim() == 3 else None
        labels = label_sources("ExpertChoiceRouter", context, logits, mask)
        logits, mask, _ = self._flat(logits, mask)
        tokens = logits.shape[0]
        noisy = logits
        if self.training and self.noise_std:
            noisy = logits + torch.randn_like(logits) * self.noise_std
        size = group_tokens("ExpertChoiceRouter", self.group_size, self.group_sequences, tokens, batch) or 1
        scores, here = self._scores(noisy, mask, size)
        token, offsets, weight = self._choose(scores, here, tokens)
        if self.normalize:
            total = weight.new_zeros(tokens).index_add(0, token, weight)
            weight = weight / (total.index_select(0, token) + self.normalize_eps)
        probs = logits.softmax(-1)
        if mask is not None:
            probs = probs * mask[:, None]
        losses = {}
        if self.training and self.losses.terms:
            losses = self._group_losses(logits, noisy, mask, batch, size, labels)
        return Routing(token, offsets, weight, tokens, losses=losses, probs=probs)

    def _scores(self, logits: Tensor, mask: Tensor | None, size: int) -> tuple[Tensor, Tensor | None]:
        """Scores [G, N, E], and which of the tokens [G, N] are there, None where all are."""
        missing = -logits.shape[0] % size
        if missing:  # a last short group is filled with tokens that nobody may take
            mask = logits.new_ones(logits.shape[0], dtype=torch.bool) if mask is None else mask
            mask, logits = F.pad(mask, (0, missing)), F.pad(logits, (0, 0, 0, missing))
        logits = logits.unflatten(0, (-1, size))
        here = None if mask is None else mask.view(-1, size)
        if self.softmax == "experts":
            return logits.softmax(-1), here
        if here is not None:
            # The least finite number: a group without any token must not become nan.
            logits = logits.where(here.unsqueeze(-1), torch.finfo(logits.dtype).min)
        return logits.softmax(1), here

    def _choose(self, scores: Tensor, here: Tensor | None, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens that the experts take [A], sorted by expert and then in order; where each expert's begin; weights."""
        groups, size, experts = scores.shape
        places = min(self.capacity.places(size, 1, experts, self.training), size) if tokens else 0
        by_expert = scores.permute(2, 0, 1)
        if self.max_experts is not None and places:
            wanted = capped_plan(scores.detach(), places, self.max_experts, here).permute(2, 0, 1)
        else:
            wanted = by_expert.detach() if here is None else by_expert.detach().where(here, -1.0)
        chosen = wanted.topk(places, dim=-1, sorted=False).indices.sort(dim=-1).values
        weight = by_expert.gather(-1, chosen).flatten()
        token = (chosen + size * torch.arange(groups, device=scores.device)[:, None]).flatten()
        bounds = torch.arange(experts + 1, dtype=torch.int32, device=scores.device)
        taken = None if here is None else here.expand(experts, -1, -1).gather(-1, chosen)
        if self.max_experts is not None:
            within = within_cap(scores, chosen, self.max_experts)
            taken = within if taken is None else taken & within
        if taken is not None and transformed.is_batched(taken):
            weight, taken = weight.where(taken.flatten(), 0), None  # under vmap sizes hang on no values
        if taken is None:
            return token, bounds * (groups * places), weight
        offsets = F.pad(taken.flatten(1).sum(-1).cumsum(0), (1, 0)).to(torch.int32)
        kept = taken.flatten().nonzero().squeeze(-1)
        return token.index_select(0, kept), offsets, weight.index_select(0, kept)

    def _group_losses(
        self,
        logits: Tensor,
        noisy: Tensor,
        mask: Tensor | None,
        batch: int | None,
        size: int,
        labels: dict[str, Callable[[], Any]],
    ) -> dict[str, Tensor]:
        sources: dict[str, Callable[[], Any]] = {
            "logits": lambda: logits,
            "noisy_logits": lambda: noisy,
            "probs": lambda: logits.softmax(-1),
            "noisy_probs": lambda: noisy.softmax(-1),
            "mask": lambda: mask,
            **labels,
        }
        tokens = logits.shape[0]
        sequences = None if batch is None else (batch, tokens // max(batch, 1))
        return self.losses(sources, {"sequence": sequences, "group": (-(-tokens // size), size)})

    def extra_repr(self) -> str:
        """Sizes and options for `print(model)`."""
        return f"{self.dim}, num_experts={self.num_experts}, softmax={self.softmax!r}, capacity={self.capacity}"
