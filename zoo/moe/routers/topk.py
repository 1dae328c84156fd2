"""Token choice: every token takes the k experts it scores highest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..auxiliary import AuxiliaryLosses
from ..capacity import Capacity
from ..routing import Routing
from .base import Router

NOISE_FLOOR = 1e-2  # Shazeer 2017, tensor2tensor: the least width of learned noise


class TopKRouter(Router):
    """The gate of most sparse models: logits x W^T, scores, the k best, their weights.

    Published models are settings of it (k omitted where a model may vary it):
        Shazeer       score="softmax_topk", noise="learned", losses importance and load; W starts at zero
        Switch        k=1, jitter=0.01, capacity, losses switch
        GShard        k=2, capacity with drop="choice", renormalize=True, losses gshard
        V-MoE         noise="fixed", noise_std=1/E, capacity, losses importance_vmoe and load_vmoe
        Mixtral       score="softmax_topk" (equal to softmax with normalize=True)
        DeepSeekMoE, OLMoE, Qwen2-MoE   the defaults; Qwen3-MoE normalize=True
        DeepSeek-V2   num_groups, group_topk, group_score="max", scale
        DeepSeek-V3   score="sigmoid", normalize=True, selection_bias=True, group_score="top2_sum", scale=2.5

    score: "softmax" over all experts, "softmax_topk" over the k chosen logits, or "sigmoid". normalize divides the chosen
    weights by their sum plus normalize_eps, scale multiplies them. selection_bias adds a buffer [E] to the scores for the
    choice alone; `zoo.moe.balance.update_biases` moves it by bias_update_rate. With num_groups > 1 a token only chooses
    inside the group_topk groups of highest score, the maximum or the sum of the two best in the group. jitter multiplies
    the router's input by U(1-jitter, 1+jitter), noise adds N(0, noise_std^2) ("fixed") or N(0, (softplus(x W_n^T) +
    0.01)^2) ("learned") to the logits; both, and the losses, only in training. group_size is the scope of capacity: the
    whole batch, each "sequence", or that many consecutive tokens. dtype is the arithmetic's, None for the input's.

    Raises ValueError when an option is unknown or does not fit the others.
    """

    selection_bias: Tensor | None

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 2,
        *,
        score: Literal["softmax", "softmax_topk", "sigmoid"] = "softmax",
        normalize: bool = False,
        normalize_eps: float = 1e-20,
        scale: float = 1.0,
        bias: bool = False,
        selection_bias: bool = False,
        bias_update_rate: float = 1e-3,
        num_groups: int = 1,
        group_topk: int = 1,
        group_score: Literal["max", "top2_sum"] = "max",
        dtype: torch.dtype | None = torch.float32,
        jitter: float = 0.0,
        noise: Literal["fixed", "learned"] | None = None,
        noise_std: float = 1.0,
        capacity: Capacity | None = None,
        group_size: int | Literal["sequence"] | None = None,
        losses: Mapping[str, float | Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(dim, num_experts)
        self.k, self.score, self.normalize, self.normalize_eps, self.scale = (
            k,
            score,
            normalize,
            normalize_eps,
            scale,
        )
        self.num_groups, self.group_topk, self.group_score = num_groups, group_topk, group_score
        self.dtype, self.jitter, self.noise, self.noise_std = dtype, jitter, noise, noise_std
        self.capacity, self.group_size = capacity, group_size
        self.bias_update_rate = bias_update_rate
        self.losses = AuxiliaryLosses(losses)
        self._check()
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, dim)) if noise == "learned" else None
        self.register_buffer("selection_bias", torch.zeros(num_experts) if selection_bias else None)
        # Not a buffer: data parallelism broadcasts buffers, and these counts differ between processes on purpose.
        self.load_since_update: Tensor | None = None
        self.reset_parameters()

    def _check(self) -> None:
        """Raise ValueError on the first option that is unknown or does not fit."""
        known: tuple[tuple[str, object, tuple[object, ...]], ...] = (
            ("score", self.score, ("softmax", "softmax_topk", "sigmoid")),
            ("group_score", self.group_score, ("max", "top2_sum")),
            ("noise", self.noise, (None, "fixed", "learned")),
        )
        for name, value, choices in known:
            if value not in choices:
                raise ValueError(f"TopKRouter: {name} must be one of {choices}, got {value!r}")
        if not 1 <= self.k <= self.num_experts:
            raise ValueError(f"TopKRouter: k must be between 1 and num_experts={self.num_experts}, got {self.k}")
        if self.num_experts % self.num_groups:
            raise ValueError(f"TopKRouter: {self.num_experts} experts do not split into num_groups={self.num_groups}")
        if not 1 <= self.group_topk <= self.num_groups:
            raise ValueError(f"TopKRouter: group_topk must be 1..num_groups={self.num_groups}, got {self.group_topk}")
        if self.num_groups > 1 and self.k > self.group_topk * (self.num_experts // self.num_groups):
            raise ValueError(f"TopKRouter: k={self.k} experts do not fit in group_topk={self.group_topk} groups")
        if isinstance(self.group_size, str) and self.group_size != "sequence":
            raise ValueError(f"TopKRouter: group_size must be None, 'sequence' or a number, got {self.group_size!r}")
        if isinstance(self.group_size, int) and self.group_size < 1:
            raise ValueError(f"TopKRouter: group_size must be at least 1, got {self.group_size}")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W uniformly within 1/sqrt(dim); with learned noise start both matrices at zero, as Shazeer does."""
        bound = 0.0 if self.noise == "learned" else 1 / math.sqrt(self.dim)
        self.weight.uniform_(-bound, bound)
        for parameter in (self.bias, self.noise_weight):
            if parameter is not None:
                parameter.zero_()

    def forward(self, x: Tensor, **context: Any) -> Routing:
        """Route tokens x [T, D] or [B, S, D]; context: mask [T] or [B, S], False for tokens to leave out."""
        # Autocast would round the logits, and with them the choice.
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.dtype or x.dtype)
            if self.training and self.jitter:
                x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
            logits = F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
            if self.noise_weight is not None:
                context["noise_std"] = F.softplus(F.linear(x, self.noise_weight.to(x.dtype))) + NOISE_FLOOR
            return self.route(logits, **context)

    def route(self, logits: Tensor, mask: Tensor | None = None, noise_std: Tensor | None = None, **_: Any) -> Routing:
        """Decide from logits [T, E] or [B, S, E]; noise_std, like the logits, replaces the router's own width."""
        batch = logits.shape[0] if logits.dim() == 3 else None
        logits = logits.reshape(-1, self.num_experts)
        mask = None if mask is None else mask.reshape(-1).bool()
        std = logits.new_tensor(self.noise_std) if noise_std is None else noise_std.reshape_as(logits)
        noisy = logits + torch.randn_like(logits) * std if self.training and self.noise else logits

        expert, weight = self._choose(noisy)
        asked = expert if mask is None else expert.where(mask[:, None], self.num_experts)
        keep = None if mask is None else asked < self.num_experts
        self._count_load(asked)
        losses = self._losses(logits, noisy, std, expert, weight, mask, batch) if self.training else {}
        if self.capacity is not None:
            keep = self._within_capacity(asked, weight, batch)
            if self.capacity.renormalize:
                weight = weight * keep
                weight = weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).eps)
        return Routing.from_choices(
            expert,
            weight,
            self.num_experts,
            keep=keep,
            losses=losses,
            probs=self._probs(logits),
            asked=self.k if mask is None else self.k * mask,
        )

    def _probs(self, logits: Tensor) -> Tensor:
        """The scores as a distribution over experts, [T, E]."""
        if self.score == "sigmoid":
            scores = logits.sigmoid()
            return scores / (scores.sum(-1, keepdim=True) + self.normalize_eps)
        return logits.softmax(-1)

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The k experts of every token, best first, and their combine weights: [T, K] each."""
        if self.score == "softmax":
            scores = logits.softmax(-1)
        else:
            scores = logits.sigmoid() if self.score == "sigmoid" else logits
        choice = scores.detach()
        if self.selection_bias is not None:
            choice = choice + self.selection_bias
        if self.num_groups > 1:
            choice = self._inside_best_groups(choice)
        expert = choice.topk(self.k, dim=-1).indices
        weight = scores.gather(-1, expert)
        if self.score == "softmax_topk":
            weight = weight.softmax(-1)
        if self.normalize:
            weight = weight / (weight.sum(-1, keepdim=True) + self.normalize_eps)
        return expert, weight if self.scale == 1.0 else weight * self.scale

    def _inside_best_groups(self, choice: Tensor) -> Tensor:
        """Scores with -inf outside each token's best groups; 0 would let a negative bias choose outside them."""
        grouped = choice.unflatten(-1, (self.num_groups, -1))
        if self.group_score == "max":
            group_score = grouped.amax(-1)
        else:
            group_score = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        best = group_score.topk(self.group_topk, dim=-1).indices
        allowed = torch.zeros_like(group_score, dtype=torch.bool).scatter_(-1, best, True)
        return grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(-2)

    def _count_load(self, asked: Tensor) -> None:
        """Remember how often each expert was asked for, for the loss-free bias; a recomputation does not count."""
        if self.selection_bias is None or not self.training:
            return
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return
        counts = self.selection_bias.new_zeros(self.num_experts + 1)
        flat = asked.reshape(-1)
        counts = counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=counts.dtype))[:-1]
        self.load_since_update = counts if self.load_since_update is None else self.load_since_update + counts

    def _within_capacity(self, asked: Tensor, weight: Tensor, batch: int | None) -> Tensor:
        """Which choices find a place, [T, K] bool."""
        assert self.capacity is not None
        tokens = asked.shape[0]
        size = self._group_tokens(tokens, batch)
        places = self.capacity.places(size, self.k, self.num_experts, self.training)
        missing = -tokens % size if size else 0
        if missing:  # a last short group is filled with tokens that ask for nothing
            asked = F.pad(asked, (0, 0, 0, missing), value=self.num_experts)
            weight = F.pad(weight, (0, 0, 0, missing))
        grouped = (-1, size, self.k) if size else (1, 0, self.k)
        keep = self.capacity.keep(asked.view(grouped), weight.view(grouped), self.num_experts, places)
        return keep.view(-1, self.k)[:tokens]

    def _group_tokens(self, tokens: int, batch: int | None) -> int:
        """Tokens that share capacity."""
        if self.group_size is None:
            return tokens
        if isinstance(self.group_size, int):
            return self.group_size
        if batch is None:
            raise ValueError("TopKRouter: group_size='sequence' needs tokens as [B, S, D], got one list of tokens")
        return tokens // max(batch, 1)

    def _losses(
        self,
        logits: Tensor,
        noisy: Tensor,
        std: Tensor,
        expert: Tensor,
        weight: Tensor,
        mask: Tensor | None,
        batch: int | None,
    ) -> dict[str, Tensor]:
        if not self.losses.terms:
            return {}
        tokens = logits.shape[0]
        grouped = None
        if self.group_size is not None and (size := self._group_tokens(tokens, batch)) and not tokens % size:
            grouped = (tokens // size, size)
        zeros = logits.new_zeros(logits.shape)
        return self.losses(
            {
                "logits": lambda: logits,
                "noisy_logits": lambda: noisy,
                "noise_std": lambda: std if self.noise else std * 0,
                "probs": lambda: self._probs(logits),
                "selected": lambda: zeros.scatter(-1, expert, 1.0),
                "first": lambda: zeros.scatter(-1, expert[:, :1], 1.0),
                "gates": lambda: zeros.scatter(-1, expert, weight.to(zeros.dtype)),
                "mask": lambda: mask,
                "k": lambda: self.k,
            },
            {"sequence": None if batch is None else (batch, tokens // max(batch, 1)), "group": grouped},
        )
