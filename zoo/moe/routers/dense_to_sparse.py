"""Gates that go from many experts to few, or from few to many, while they train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..routing import Routing
from ..schedule import Scheduled
from .linear import LinearRouter, one_hot
from .topk import TopKRouter


class DenseToSparseRouter(Scheduled, LinearRouter):
    """EvoMoE's DTS gate (2112.14397): all experts at first, fewer as a temperature falls, at last one.

    In training g = softmax((x W^T + z) / tau) with z ~ Gumbel(0, 1), and a token goes to the experts with g above
    `threshold`; from step hard_steps on to the one of largest g alone. Combine weights are, as by default in the
    authors' code, softmax(x W^T) of those experts, not divided by their sum; weights="gumbel" takes g itself, as the
    paper's equation has it. Outside training the best expert of softmax(x W^T) alone, weighted by it; with "gumbel" the
    code samples there too. tau goes from max_temperature to min_temperature in decay_steps, "linear" or "exponential",
    and stays there; defaults are those of the authors' translation scripts. The steps are counted by
    `zoo.moe.schedule.advance`, and are part of the state. No loss is needed; the code's (weight 0 in its scripts) is
    {"load_balance": {"weight": w, "probs": "gates", "normalization": "tokens"}}.

    Context: mask. Raises ValueError for an unknown option.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        max_temperature: float = 2.0,
        min_temperature: float = 0.5,
        decay_steps: int = 5000,
        decay: Literal["linear", "exponential"] = "linear",
        hard_steps: int = 6000,
        threshold: float = 1e-3,
        weights: Literal["softmax", "gumbel"] = "softmax",
        losses: Mapping[str, float | Mapping[str, Any]] | None = None,
        dtype: torch.dtype | None = torch.float32,
    ) -> None:
        super().__init__(dim, num_experts, losses=losses, dtype=dtype)
        for name, value, known in (
            ("decay", decay, ("linear", "exponential")),
            ("weights", weights, ("softmax", "gumbel")),
        ):
            if value not in known:
                raise ValueError(f"DenseToSparseRouter: {name} must be one of {known}, got {value!r}")
        if not 0 < min_temperature <= max_temperature or decay_steps < 1:
            raise ValueError(
                "DenseToSparseRouter: expected 0 < min_temperature <= max_temperature and decay_steps >= 1, got "
                f"{min_temperature}, {max_temperature} and {decay_steps}"
            )
        self.max_temperature, self.min_temperature = max_temperature, min_temperature
        self.decay_steps, self.decay, self.hard_steps = decay_steps, decay, hard_steps
        self.threshold, self.weights = threshold, weights
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W uniformly within 1/sqrt(dim), and go back to the first step."""
        super().reset_parameters()
        if hasattr(self, "step"):  # not yet, when the parent class is made
            self.step.zero_()

    def temperature(self) -> Tensor:
        """tau at the present step, []."""
        done = self.step / self.decay_steps
        if self.decay == "linear":
            tau = self.max_temperature - done * (self.max_temperature - self.min_temperature)
        else:
            tau = self.max_temperature * (self.min_temperature / self.max_temperature) ** done
        return tau.clamp(min=self.min_temperature)

    def route(self, logits: Tensor, mask: Tensor | None = None, **context: Any) -> Routing:
        """Decide from logits [T, E] or [B, S, E]."""
        logits, mask, split = self._flat(logits, mask)
        probs = noisy = logits.softmax(-1)
        if self.training or self.weights == "gumbel":
            gumbel = -torch.empty_like(logits).exponential_().log()
            noisy = ((logits + gumbel) / self.temperature().to(logits.dtype)).softmax(-1)
        kept = one_hot(noisy.argmax(-1), noisy).bool()
        if self.training:
            # Not a branch on the step: reading it would make the host wait for the device.
            kept = torch.where(self.step < self.hard_steps, noisy > self.threshold, kept)
        if mask is not None:
            kept = kept & mask[:, None]
        weight = noisy if self.weights == "gumbel" else probs
        losses = self._losses(logits, weight, kept, mask, split, context)
        return Routing.from_matrix(weight, kept, losses=losses, probs=probs, asked=kept.sum(-1))

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        temperatures = f"{self.max_temperature}..{self.min_temperature}"
        return f"{super().extra_repr()}, temperature={temperatures}, weights={self.weights!r}"


class SMoEDropoutRouter(Scheduled, TopKRouter):
    """SMoE-Dropout (2303.01610): a random router that never learns, and k that grows as training goes on.

    Weights are the softmax over the k largest of x W^T, W fixed at N(0, 0.02^2) as in the authors' code. After step s
    k = round((k_max - k_min) s / steps) + k_min, at most k_max (the code's linear increase; k_max is E in the paper).
    Outside training k is that of the moment, or eval_k: any number of experts will do ("self-slimmable"). The steps
    are counted by `zoo.moe.schedule.advance`, and are part of the state. Other options as in `TopKRouter`.

    Context: mask. Raises ValueError unless 1 <= k_min <= k_max <= E and steps >= 1.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        steps: int,
        k_min: int = 2,
        k_max: int | None = None,
        eval_k: int | None = None,
        **options: Any,
    ) -> None:
        if "k" in options:
            raise ValueError(f"SMoEDropoutRouter: k grows from k_min to k_max; give these, not k={options['k']!r}")
        k_max = num_experts if k_max is None else k_max
        if not 1 <= k_min <= k_max <= num_experts or not 1 <= (eval_k or 1) <= num_experts or steps < 1:
            raise ValueError(
                f"SMoEDropoutRouter: expected 1 <= k_min <= k_max <= {num_experts} experts, eval_k among them and "
                f"steps >= 1, got k_min={k_min}, k_max={k_max}, eval_k={eval_k}, steps={steps}"
            )
        self.steps, self.k_min, self.k_max, self.eval_k = steps, k_min, k_max, eval_k
        super().__init__(dim, num_experts, k_min, **{"score": "softmax_topk", **options})
        self.weight.requires_grad_(False)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @property
    def k(self) -> int:
        """How many experts a token meets at present."""
        return self._k if self.training or self.eval_k is None else self.eval_k

    @k.setter
    def k(self, value: int) -> None:
        self._k = value

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W from N(0, 0.02^2), and go back to the first step."""
        super().reset_parameters()
        nn.init.normal_(self.weight, std=0.02)
        if hasattr(self, "step"):  # not yet, when the parent class is made
            self.step.zero_()
            self.k = self.k_min

    def advance(self) -> None:
        """Count one optimizer step, and take the k that belongs to it."""
        super().advance()
        self._follow()

    def _follow(self) -> None:
        # A number of Python's: topk needs one, and reading the buffer in each forward would make the host wait.
        grown = round((self.k_max - self.k_min) * int(self.step) / self.steps) + self.k_min
        self.k = min(grown, self.k_max)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.step.is_meta:
            self._follow()
