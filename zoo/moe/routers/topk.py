"""Token choice: every token takes the k experts it scores highest."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import autocast
from ..auxiliary import AuxiliaryLosses, choice_sources
from ..capacity import Capacity, as_capacity
from ..kernels.choices import top_k
from ..routing import Routing, count_experts
from .base import Router, added, is_recomputation
from .context import label_sources
from .groups import GroupSize, check_groups, group_tokens
from .scores import OF_EACH, inside_best_groups, shares, standardized

NOISE_FLOOR = 1e-2  # Shazeer 2017, tensor2tensor: the least width of learned noise


class TopKRouter(Router):
    """The gate of most sparse models: logits x W^T, scores, the k best, their weights.

    Published models are settings of it (k omitted where a model may vary it):
        Shazeer       score="softmax_topk", noise="learned", losses importance and load; W starts at zero
        Switch        k=1, jitter=0.01, capacity, losses switch
        GShard        k=2, normalize=True, capacity, losses gshard, if every second expert is met; see `GShardRouter`
        V-MoE         noise="fixed", noise_std=1/E, capacity, losses importance_vmoe and load_vmoe
        Mixtral       score="softmax_topk" (equal to softmax with normalize=True)
        DeepSeekMoE, OLMoE, Qwen2-MoE   the defaults; Qwen3-MoE normalize=True
        Skywork-MoE   normalize_logits=1.0 (2406.06563, section 4.1: lambda (z - mean z) / std z); see `SkyworkRouter`
        DeepSeek-V2   num_groups, group_topk, group_score="max", scale
        DeepSeek-V3   score="sigmoid", normalize=True, selection_bias=True, group_score="top2_sum", scale=2.5
        DeepSeek-V4   score="sqrt_softplus", normalize=True, selection_bias=True, scale=1.5; see `ScoredHashRouter`
        Megatron      group_score=k // group_topk; for k=1 it leaves sigmoid scores as they are: normalize=False

    score: "softmax" over all experts, "softmax_topk" over the k chosen logits, or of each expert by itself "sigmoid" or
    "sqrt_softplus". normalize divides the chosen weights by their sum plus normalize_eps, scale multiplies them.
    selection_bias adds a buffer [E] to the scores for the choice alone; `zoo.moe.balance.update_biases` moves it by
    bias_update_rate. With num_groups > 1 a token only chooses inside the group_topk groups of highest score: the
    maximum, the sum of the two best experts or of that many best. Other groups' experts count as group_fill: -inf as in
    the authors' code; 0, as in transformers before 5.23, lets a negative bias choose outside the groups. jitter
    multiplies the router's input by U(1-jitter, 1+jitter), noise adds N(0, noise_std^2) ("fixed") or
    N(0, (softplus(x W_n^T) + 0.01)^2) ("learned") to the logits; both, and the losses, only in training; with
    eval_losses those that need no noise are reported in evaluation too, as V-MoE does.
    capacity may be the factor alone. group_size is its scope: the whole batch, that many consecutive tokens, or
    "sequence", at most group_sequences consecutive sequences; the last group is filled up with tokens that ask for
    nothing. dtype is the arithmetic's, None for the input's; float64 stays.

    Raises ValueError when an option is unknown or does not fit the others.
    """

    selection_bias: Tensor | None

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 2,
        *,
        score: Literal["softmax", "softmax_topk", "sigmoid", "sqrt_softplus"] = "softmax",
        normalize: bool = False,
        normalize_eps: float = 1e-20,
        normalize_logits: float | None = None,
        scale: float = 1.0,
        bias: bool = False,
        selection_bias: bool = False,
        bias_update_rate: float = 1e-3,
        num_groups: int = 1,
        group_topk: int = 1,
        group_score: int | Literal["max", "top2_sum"] = "max",
        group_fill: float = -math.inf,
        dtype: torch.dtype | None = torch.float32,
        jitter: float = 0.0,
        noise: Literal["fixed", "learned"] | None = None,
        noise_std: float = 1.0,
        capacity: Capacity | float | None = None,
        group_size: GroupSize = None,
        group_sequences: int = 1,
        losses: Mapping[str, float | Mapping[str, Any]] | None = None,
        eval_losses: bool = False,
    ) -> None:
        super().__init__(dim, num_experts)
        self.k, self.score = k, score
        self.normalize, self.normalize_eps, self.scale = normalize, normalize_eps, scale
        self.normalize_logits = normalize_logits
        self.num_groups, self.group_topk = num_groups, group_topk
        self.group_score, self.group_fill = group_score, group_fill
        self.dtype, self.jitter, self.noise, self.noise_std = dtype, jitter, noise, noise_std
        self.capacity = None if capacity is None else as_capacity(capacity)
        self.group_size, self.group_sequences = group_size, group_sequences
        self.bias_update_rate = bias_update_rate
        self.losses, self.eval_losses = AuxiliaryLosses(losses), eval_losses
        among_all = type(self)._choose is TopKRouter._choose
        if "sequence" in self.losses.terms and among_all and (selection_bias or num_groups > 1):
            # DeepSeek-V3 (2412.19437, eq. 18): the best scores count, not what bias and groups made of them.
            self.losses.terms["sequence"].options.setdefault("selected", "unbiased")
        self._check()
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, dim)) if noise == "learned" else None
        self.register_buffer("selection_bias", torch.zeros(num_experts) if selection_bias else None)
        # Not a buffer: data parallelism broadcasts buffers, and these counts differ between processes on purpose.
        self.load_since_update: Tensor | None
        self.reset_parameters()

    def _check(self) -> None:
        """Raise ValueError on the first option that is unknown or does not fit."""
        gate = type(self).__name__
        known: tuple[tuple[str, object, tuple[object, ...]], ...] = (
            ("score", self.score, ("softmax", "softmax_topk", *OF_EACH)),
            ("noise", self.noise, (None, "fixed", "learned")),
        )
        for name, value, choices in known:
            if value not in choices:
                raise ValueError(f"{gate}: {name} must be one of {choices}, got {value!r}")
        if not 1 <= self.k <= self.num_experts:
            raise ValueError(f"{gate}: k must be between 1 and num_experts={self.num_experts}, got {self.k}")
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise ValueError(f"{gate}: {self.num_experts} experts do not split into num_groups={self.num_groups}")
        if not 1 <= self.group_topk <= self.num_groups:
            raise ValueError(f"{gate}: group_topk must be 1..num_groups={self.num_groups}, got {self.group_topk}")
        if self.num_groups > 1 and self.k > self.group_topk * (self.num_experts // self.num_groups):
            raise ValueError(f"{gate}: k={self.k} experts do not fit in group_topk={self.group_topk} groups")
        per_group = self.num_experts // self.num_groups
        if self.group_score not in ("max", "top2_sum", *range(1, per_group + 1)):
            raise ValueError(
                f"{gate}: group_score must be 'max', 'top2_sum' or 1..{per_group} (experts a group), "
                f"got {self.group_score!r}"
            )
        check_groups(gate, self.group_size, self.group_sequences)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W uniformly within 1/sqrt(dim); with learned noise zero both matrices, as Shazeer; zero biases."""
        bound = 0.0 if self.noise == "learned" else 1 / math.sqrt(self.dim)
        self.weight.uniform_(-bound, bound)
        for tensor in (self.bias, self.noise_weight, self.selection_bias):
            if tensor is not None:
                tensor.zero_()
        self.load_since_update = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TopKRouter:
        before = self.selection_bias
        super()._apply(fn, recurse)
        if self.load_since_update is not None:
            self.load_since_update = fn(self.load_since_update)
        after = self.selection_bias
        if before is not None and after is not None and after.dtype.itemsize < 4:
            # bfloat16 cannot hold steps of 1e-3 once a bias passes 0.25: model.bfloat16() leaves this buffer float32.
            self.selection_bias = (
                torch.zeros_like(after, dtype=torch.float32) if before.is_meta else before.to(after.device)
            )
        return self

    def forward(self, x: Tensor, **context: Any) -> Routing:
        """Route tokens x [T, D] or [B, S, D]; context: mask [T] or [B, S], False for tokens to leave out."""
        # Autocast would round the logits, and with them the choice.
        if autocast.is_on(x):
            with autocast.off(x):
                return TopKRouter.forward(self, x, **context)  # what a subclass did before, it did
        if x.dtype != torch.float64:
            x = x.to(self.dtype or x.dtype)
        if (mask := context.get("mask")) is not None:
            x = x.where(mask.reshape(x.shape[:-1]).bool().unsqueeze(-1), 0)  # nan there would reach W's gradient
        if self.training and self.jitter:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        logits = self._logits(x, **context)
        if self.training and self.noise_weight is not None:
            context["noise_std"] = F.softplus(F.linear(x, self.noise_weight.to(x.dtype))) + NOISE_FLOOR
        return self.route(logits, **context)

    @torch.no_grad()
    def likeliest(self, x: Tensor) -> Tensor:
        """The experts [T, K] of tokens x [T, D] by score alone: without noise, capacity and losses, best first."""
        with autocast.off(x):
            logits = self._logits(x if x.dtype == torch.float64 else x.to(self.dtype or x.dtype))
            if self.normalize_logits is not None:
                logits = standardized(logits, self.normalize_logits)
            return self._choose(self._scores(logits), self._preference(logits, None))[0]

    def _logits(self, x: Tensor, **context: Any) -> Tensor:
        """Logits [.., E] of tokens x [.., D]."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def route(
        self,
        logits: Tensor,
        mask: Tensor | None = None,
        noise_std: Tensor | None = None,
        preference: Tensor | None = None,
        **context: Any,
    ) -> Routing:
        """Decide from logits [T, E] or [B, S, E]; noise_std, preference [T, E]: in place of the router's own."""
        batch, given = logits.shape[0] if logits.dim() == 3 else None, logits
        logits = logits.reshape(-1, self.num_experts)
        if mask is not None:
            mask = mask.reshape(-1).bool()
            logits = logits.where(mask[:, None], 0)  # a masked token may hold anything, even nan
        if self.normalize_logits is not None:
            logits = standardized(logits, self.normalize_logits)
        noisy, std = self._with_noise(logits, noise_std)

        scores = self._scores(noisy)
        expert, weight = self._choose(scores, self._preference(noisy, mask) if preference is None else preference)
        keep = self._wanted(expert, weight)
        if mask is not None:
            keep = mask[:, None].expand_as(expert) if keep is None else keep & mask[:, None]
        asked = expert if keep is None else expert.where(keep, self.num_experts)
        asked_for = self.k if keep is None else keep.sum(-1)
        self._count_load(asked)
        plain = self.score == "softmax" and noisy is logits and type(self)._scores is TopKRouter._scores
        probs = scores if plain else self._probs(logits)
        losses = {}
        if self.losses.terms and (self.training or self.eval_losses):
            sources = choice_sources(
                logits, noisy, std, expert, weight, mask, lambda: probs, lambda: self._probs(noisy)
            )
            sources |= label_sources(type(self).__name__, context, given, mask)
            if not self.training:
                del sources["noise_std"]
            losses = self.losses(sources, self._loss_groups(logits.shape[0], batch))
        if self.capacity is not None:
            keep = self._within_capacity(asked, weight, noisy, batch, keep)
        if self._renormalizes():
            weight = weight if keep is None else weight * keep
            weight = weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).eps)
        weight = weight if self.scale == 1.0 else weight * self.scale
        return self._routing(scores, expert, weight, keep, losses=losses, probs=probs, asked=asked_for)

    def _routing(self, scores: Tensor, expert: Tensor, weight: Tensor, keep: Tensor | None, **told: Any) -> Routing:
        """The decision, from choices [T, K] with their weights and which of them are kept; scores: all experts'."""
        return Routing.from_choices(expert, weight, self.num_experts, keep=keep, **told)

    def _with_noise(self, logits: Tensor, std: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits with noise, and its width; the logits themselves and None where there is none."""
        if not self.training or self.noise is None or (std is None and not self.noise_std):
            return logits, None
        std = logits.new_full((), self.noise_std) if std is None else std.reshape_as(logits)
        return logits + torch.randn_like(logits) * std, std

    def _probs(self, logits: Tensor) -> Tensor:
        """The scores as a distribution over experts, [T, E]."""
        if self.score in OF_EACH:
            return shares(OF_EACH[self.score](logits), self.normalize_eps)
        return logits.softmax(-1)

    def _scores(self, logits: Tensor) -> Tensor:
        """What the combine weights are taken from, [T, E]."""
        if self.score == "softmax":
            return logits.softmax(-1)
        return OF_EACH[self.score](logits) if self.score in OF_EACH else logits

    def _preference(self, logits: Tensor, mask: Tensor | None) -> Tensor | None:
        """What experts are chosen by, [T, E], where that is not the scores."""
        return None

    def _wanted(self, expert: Tensor, weight: Tensor) -> Tensor | None:
        """Which of the k choices [T, K] a token makes use of, None for all."""
        return None

    def _renormalizes(self) -> bool:
        """Whether the weights that are left are divided by their sum."""
        return self.capacity is not None and self.capacity.renormalize

    def _choose(self, scores: Tensor, preference: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k experts of every token, best first, and their combine weights: [T, K] each."""
        if preference is None and self.selection_bias is None and self.num_groups == 1:
            weight, expert = top_k(scores, self.k)
        else:
            choice = scores.detach() if preference is None else preference
            if self.selection_bias is not None:
                choice = choice + self.selection_bias
            if self.num_groups > 1:
                groups = (self.num_groups, self.group_topk, self.group_score, self.group_fill)
                choice = inside_best_groups(choice, *groups)
            expert = top_k(choice, self.k)[1]
            weight = scores.gather(-1, expert)
        return expert, self._weights(weight)

    def _weights(self, chosen: Tensor) -> Tensor:
        """The combine weights [T, K] of chosen scores."""
        if self.score == "softmax_topk":
            chosen = chosen.softmax(-1)
        return shares(chosen, self.normalize_eps) if self.normalize else chosen

    def _count_load(self, asked: Tensor) -> None:
        """Remember how often each expert was asked for, for the loss-free bias; a recomputation does not count."""
        if self.selection_bias is None or not self.training or is_recomputation():
            return
        self.load_since_update = added(self.load_since_update, count_experts(asked, self.num_experts))

    def _within_capacity(
        self, asked: Tensor, weight: Tensor, logits: Tensor, batch: int | None, keep: Tensor | None
    ) -> Tensor | None:
        """Which of the choices that keep has, all where it is None, find a place: [T, K] bool, or None for all."""
        assert self.capacity is not None
        size = self._group_tokens(asked.shape[0], batch)
        places = self.capacity.places(size, self.k, self.num_experts, self.training)
        if places >= size:  # a token asks an expert for one place at most
            return keep
        if self.capacity.drop in ("priority", "priority_sum") and (self.normalize or self.score == "softmax_topk"):
            # Weights that sum to one a token do not tell tokens apart; the router's confidence does.
            scores = self._scores(logits) if self.score in OF_EACH else logits.softmax(-1)
            weight = scores.gather(-1, asked.clamp(max=self.num_experts - 1))
        return self.capacity.keep_in_groups(asked, weight, self.num_experts, places, size)

    def _group_tokens(self, tokens: int, batch: int | None) -> int:
        """Tokens that share capacity."""
        return group_tokens(type(self).__name__, self.group_size, self.group_sequences, tokens, batch)

    def _loss_groups(self, tokens: int, batch: int | None) -> dict[str, tuple[int, int] | None]:
        """How many groups of how many tokens each scope of a loss makes; None where that is unknown."""
        sequences = None if batch is None else (batch, tokens // max(batch, 1))
        if self.group_size == "sequence" and batch is None:
            return {"sequence": None, "group": None}
        size = self._group_tokens(tokens, batch)
        return {"sequence": sequences, "group": (-(-tokens // size), size) if size else (1, 0)}

    def extra_repr(self) -> str:
        """Sizes and options for `print(model)`."""
        return f"{self.dim}, num_experts={self.num_experts}, k={self.k}, score={self.score!r}"
