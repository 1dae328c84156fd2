"""Expert capacity: how many tokens an expert takes, and who gives way when more come.

N tokens in a routing group, K choices a token, E experts, C places an expert has for a group.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from .kernels.portable import sort_stably

Drop = Literal["choice", "position", "probability", "priority", "priority_sum", "random", "unordered"]
ROUNDING: dict[str, Callable[[float], int]] = {"ceil": math.ceil, "floor": math.floor, "round": round}


@dataclass(frozen=True)
class Capacity:
    """Places per expert and group, and the order in which choices claim them.

    C = rounding(factor * N * K / E), at least `minimum`, rounded up to `multiple_of`; `tokens` sets C outright, and
    `eval_factor` (or `eval_tokens`) replaces it outside training; a factor of infinity drops nothing.
    `count_choices=False` leaves K out, as mesh-tensorflow, lingvo and flaxformer do; Megatron, DeepSpeed and V-MoE keep
    it. A capacity that is a fraction f of the tokens (torchscale's evaluation) is factor = f * E without K.

    `drop` is the order of claims:
        choice        every first choice before any second, each in token order (GShard, Switch, V-MoE)
        position      earliest tokens first, whichever of their choices it is (Megatron, DeepSpeed's top-k gate)
        probability   by score within each expert, highest first (Megatron's and DeepSpeed's `probs`)
        priority      batch priority routing: tokens by their largest score, first choices first (V-MoE)
        priority_sum  the same with tokens ordered by the sum of their K scores (the paper's variant); sums are equal
                      where only rounding tells them apart
        random        tokens in random order, first choices first (random token selection, Z-code M3)
        unordered     whichever C of an expert's tokens torch.topk finds in a column of equal ones: as many, not the
                      earliest (DeepSpeed's top-1 gate without random token selection; Megatron's `position` as it
                      runs on a CPU, and its `probs` where all weights are 1)
    Equals go in token order, `random` and `unordered` aside.
    `renormalize` divides what is left of a token's weights by their sum (DeepSpeed's GShard; not V-MoE, not Switch).

    How many choices are kept is known only when they are: torch.compile breaks the graph there, once a layer, unless
    torch._dynamo.config.capture_scalar_outputs is set.

    Raises ValueError when an option is unknown or a capacity would be below one.
    """

    factor: float = 1.25
    eval_factor: float | None = None
    tokens: int | None = None
    eval_tokens: int | None = None
    rounding: Literal["ceil", "floor", "round"] = "ceil"
    minimum: int = 0
    multiple_of: int = 1
    count_choices: bool = True
    drop: Drop = "choice"
    renormalize: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (("rounding", self.rounding, tuple(ROUNDING)), ("drop", self.drop, get_args(Drop))):
            if value not in known:
                raise ValueError(f"Capacity: unknown {name} {value!r}; known: {', '.join(known)}")
        for name in ("factor", "eval_factor"):
            if math.isnan(getattr(self, name) or 0):
                raise ValueError(f"Capacity: {name} must be a number, got nan")
        if self.multiple_of < 1:
            raise ValueError(f"Capacity: multiple_of must be at least 1, got {self.multiple_of}")

    def places(self, tokens: int, k: int, num_experts: int, training: bool) -> int:
        """C for a group of `tokens` tokens; raises ValueError when that is below 1."""
        factor, absolute = self.factor, self.tokens
        if not training and (self.eval_factor is not None or self.eval_tokens is not None):
            factor, absolute = self.eval_factor or 0.0, self.eval_tokens
        if absolute is None and factor == math.inf:
            absolute = tokens  # asked of the factor: of a product with a symbolic size torch.compile does not know it
        elif absolute is None:
            if isinstance(tokens, torch.SymInt) and torch.compiler.is_exporting() and not _is_known(tokens):
                raise ValueError(
                    "Capacity: a graph for any number of tokens has no share of them; make groups of a fixed size "
                    "(group_images=1 of a vision model), or set tokens, or an infinite factor"
                )
            # Rounded to nine digits first, so that an error in the last bit does not add a place.
            share = round(tokens * (k if self.count_choices else 1) * factor / num_experts, 9) if tokens else 0.0
            absolute = int(ROUNDING[self.rounding](share))
        places = max(absolute, self.minimum)
        places += -places % self.multiple_of
        if tokens and places < 1:
            raise ValueError(
                f"Capacity: {tokens} tokens, k={k} and {num_experts} experts with factor={factor} leave "
                f"{places} places an expert; expected at least 1. Raise the factor or set minimum"
            )
        return places

    def keep(self, expert: Tensor, weight: Tensor, num_experts: int, places: int) -> Tensor:
        """Which choices find a place, bool like `expert`.

        expert [G, N, K] int64, with num_experts for a choice that asks for no place; weight [G, N, K], what the order
        of claims goes by, larger is better.
        """
        groups, tokens, k = expert.shape
        if self.drop == "unordered":
            asks = weight.new_zeros(groups, tokens, num_experts + 1, dtype=torch.int64).scatter_(2, expert, 1)
            first = asks.topk(min(places, tokens), dim=1).indices
            kept = torch.zeros_like(asks, dtype=torch.bool).scatter_(1, first, True)
            return kept.gather(2, expert) & (expert < num_experts)
        order = self._claim_order(weight.detach())
        group = torch.arange(groups, device=expert.device).view(-1, 1, 1)
        bucket = (expert + group * (num_experts + 1)).view(groups, -1).gather(1, order).view(-1)
        # Stable, so that within a bucket claims stay in order; a claim's rank is its distance to the bucket's first.
        sorted_bucket, by_bucket = sort_stably(bucket)
        position = torch.arange(bucket.numel(), device=expert.device)
        claims = position.new_zeros(groups * (num_experts + 1)).scatter_add(0, bucket, torch.ones_like(bucket))
        rank = position - (claims.cumsum(0) - claims).index_select(0, sorted_bucket)
        rank = torch.empty_like(position).scatter(0, by_bucket, rank)
        kept = torch.empty(groups, tokens * k, dtype=torch.bool, device=expert.device)
        kept = kept.scatter(1, order, (rank < places).view(groups, -1))
        return kept.view_as(expert) & (expert < num_experts)

    def keep_in_groups(self, expert: Tensor, weight: Tensor, num_experts: int, places: int, size: int) -> Tensor:
        """`keep` for choices [T, K] in groups of `size` consecutive tokens, the last one perhaps shorter: [T, K]."""
        tokens, k = expert.shape
        missing = -tokens % size if size else 0
        if missing:  # a last short group is filled with tokens that ask for nothing
            expert = F.pad(expert, (0, 0, 0, missing), value=num_experts)
            weight = F.pad(weight, (0, 0, 0, missing))
        grouped = (-1, size, k) if size else (1, 0, k)
        return self.keep(expert.view(grouped), weight.reshape(grouped), num_experts, places).view(-1, k)[:tokens]

    def _claim_order(self, weight: Tensor) -> Tensor:
        """Flat choice numbers [G, N*K] in the order in which they claim places."""
        groups, tokens, k = weight.shape
        flat = torch.arange(tokens * k, device=weight.device).view(1, tokens, k).expand(groups, -1, -1)
        if self.drop == "position":
            return flat.reshape(groups, -1)
        if self.drop == "probability":
            return sort_stably(weight.reshape(groups, -1), 1, descending=True)[1]
        if self.drop == "random":
            by_token = torch.rand(groups, tokens, device=weight.device).argsort(dim=1)
        elif self.drop == "priority":
            by_token = sort_stably(weight.amax(-1), 1, descending=True)[1]
        elif self.drop == "priority_sum":
            by_token = sort_stably(_sum_without_noise(weight), 1, descending=True)[1]
        else:
            return flat.transpose(1, 2).reshape(groups, -1)
        ordered = flat.gather(1, by_token.unsqueeze(-1).expand(-1, -1, k))
        return ordered.transpose(1, 2).reshape(groups, -1)


def _is_known(size: Any) -> bool:
    """Whether a symbolic size is the same whatever the others are, such as B * N // B."""
    from torch.fx.experimental.symbolic_shapes import is_concrete_int

    return is_concrete_int(size)


def _sum_without_noise(weight: Tensor) -> Tensor:
    """Sums [G, N] of weights [G, N, K], without the last bits, in which those of distributions over k = E differ."""
    bits = round(-math.log2(torch.finfo(weight.dtype).eps))
    bits -= 4 if bits > 16 else 0  # a softmax is off by up to eight times the last bit; one in half precision by half
    mantissa, exponent = torch.frexp(weight.double().sum(-1))
    return torch.ldexp((mantissa * 2.0**bits).round(), exponent)


def as_capacity(said: Any, **defaults: Any) -> Capacity:
    """A capacity from one, from its arguments over those given as defaults, or from its factor.

    Arguments may come as {"class_path": "zoo.moe.Capacity", "init_args": {...}} too, the class a full path or ours.

    Raises ValueError for anything else, and as `Capacity`.
    """
    if isinstance(said, Capacity):
        return said
    if isinstance(said, Mapping):
        made, given = _class_and_arguments(said)
        known = [field.name for field in fields(made) if field.init]
        for name in given:
            if name not in known:
                raise ValueError(f"{made.__name__}: unknown argument {name!r}; known: {', '.join(known)}")
        return made(**{**defaults, **given})
    if isinstance(said, bool) or not isinstance(said, Real):
        raise ValueError(f"capacity must be a factor, arguments of a Capacity, or one itself, got {said!r}")
    return Capacity(**{**defaults, "factor": float(said)})


def _class_and_arguments(said: Mapping[str, Any]) -> tuple[type[Capacity], Mapping[str, Any]]:
    if "class_path" not in said:
        return Capacity, said
    path, beside = said["class_path"], set(said) - {"class_path", "init_args"}
    if beside:
        raise ValueError(f"capacity: {', '.join(sorted(beside))} beside class_path; arguments belong in init_args")
    module, _, name = str(path).rpartition(".")
    try:
        made = getattr(importlib.import_module(module), name) if module else globals()[name]
    except (ImportError, AttributeError, KeyError):
        made = None
    if not (isinstance(made, type) and issubclass(made, Capacity)):
        raise ValueError(f"capacity: class_path {path!r} is no zoo.moe.Capacity")
    return made, said.get("init_args") or {}
