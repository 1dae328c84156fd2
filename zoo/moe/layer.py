"""The mixture-of-experts layer: router, experts, and what runs beside them."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .decision import Decision
from .experts import Experts
from .routers.base import Router, is_recomputation


class Recorded(nn.Module):
    """A module with a router whose decisions `record` keeps."""

    router: Router
    _recording: tuple[_Calls, ...] = ()

    def _keep(self, decision: Decision) -> None:
        # A recomputation for activation checkpointing is the same step again.
        if self._recording and not is_recomputation():
            for calls in self._recording:
                calls.newest = decision, calls.newest

    def _parallel(self) -> Any:
        """What brings tokens to experts of other processes, None where all are here."""
        return None

    def _decide(self, x: Tensor, context: dict[str, Any]) -> Decision:
        """The gate's decision on tokens x [..., D]."""
        # What wraps a router, such as peft's adapters of a parameter, need not say its width.
        _check(type(self).__name__, x, getattr(self.router, "dim", x.shape[-1]), context.get("mask"))
        if (parallel := self._parallel()) is not None:
            context["parallel"] = parallel  # a loss may ask how far away experts are
        tokens = x.flatten(1, -2) if x.dim() > 2 else x.reshape(-1, x.shape[-1])
        decision = self.router(tokens, **context)
        _check_decision(self.router, decision, tokens)
        self._keep(decision)
        return decision

    def __getstate__(self) -> dict[str, Any]:
        # A copy made while `record` runs is no part of what is recorded.
        return {name: value for name, value in self.__dict__.items() if name != "_recording"}


class MoE(Recorded):
    """Route tokens to experts, combine what comes back, and add what every token gets.

    y = sum_e g_e(x) f_e(x) + shared(x). `shared` is any module [.., D] -> [.., D]: a shared expert (DeepSeekMoE), or
    the dense MLP of a residual MoE (DeepSpeed, Arctic). `shared_gate=True` scales it by sigmoid(w . x) (Qwen2-MoE);
    `mix_gate=True` weighs both sides by softmax(W x) instead (DeepSpeed's residual form).

    Raises ValueError when the router and the experts disagree on the number of experts or the width, or when a gate is
    asked for without a shared expert.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        shared: nn.Module | None = None,
        shared_gate: bool = False,
        mix_gate: bool = False,
    ) -> None:
        super().__init__()
        if router.num_experts != experts.num_experts or router.dim != experts.dim:
            raise ValueError(
                f"MoE: the router routes {router.num_experts} experts of width {router.dim}, "
                f"but there are {experts.num_experts} of width {experts.dim}"
            )
        if shared is None and (shared_gate or mix_gate):
            raise ValueError("MoE: shared_gate and mix_gate need a shared expert")
        if shared_gate and mix_gate:
            raise ValueError("MoE: shared_gate and mix_gate exclude each other")
        self.router, self.experts, self.shared = router, experts, shared
        self.shared_gate = nn.Linear(experts.dim, 1, bias=False) if shared_gate else None
        self.mix_gate = nn.Linear(experts.dim, 2) if mix_gate else None

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply to tokens x [..., D]; keywords go to the router (see `Router`).

        Raises ValueError for tokens of another width, for a mask that is not one a token, and where the router did not
        decide for every token; TypeError where it returned no decision.
        """
        parallel = self._parallel()
        routing = self._decide(x, context)
        tokens = x.reshape(-1, x.shape[-1])
        found: list[Tensor] = []
        if self.shared is not None and parallel is not None:
            # While tokens travel to experts of other processes.
            shared = self.shared
            parallel.meanwhile = lambda: found.append(shared(x))
        y = routing.apply(tokens, self.experts).view(x.shape)
        if self.shared is None:
            return y
        beside = found[0] if found else self.shared(x)
        if self.mix_gate is not None:
            mix = self.mix_gate(x).softmax(-1)
            return y * mix[..., :1] + beside * mix[..., 1:]
        if self.shared_gate is not None:
            beside = torch.sigmoid(self.shared_gate(x)) * beside
        return y + beside

    def _parallel(self) -> Any:
        """What brings tokens to experts of other processes, None where all are here."""
        return getattr(getattr(self.experts, "mlp", self.experts), "parallel", None)


def _check(layer: str, x: Tensor, dim: int, mask: Tensor | None) -> None:
    if x.shape[-1] != dim:
        raise ValueError(f"{layer}: expected tokens [..., {dim}], got {list(x.shape)}")
    if mask is None:
        return
    tokens = x.shape[:-1]
    # Sequences transposed, or of another length, would be read as a mask of other tokens.
    apart = len(tokens) > 1 and mask.dim() > 1 and mask.shape[0] != tokens[0]
    if mask.numel() != math.prod(tokens) or apart:  # Size.numel would fix sizes that torch.export leaves open
        raise ValueError(f"{layer}: expected a mask {list(tokens)}, one a token, got {list(mask.shape)}")


def _check_decision(router: nn.Module, decision: Decision, x: Tensor) -> None:
    kind = type(router).__name__
    if not hasattr(decision, "apply"):
        raise TypeError(f"{kind} returned a {type(decision).__name__}, expected a zoo.moe.Routing, Slots or Blend")
    if torch.compiler.is_compiling():
        return  # the number of tokens is to stay open
    tokens = x.shape[:-1].numel()
    if (found := getattr(decision, "num_tokens", tokens)) != tokens:
        raise ValueError(
            f"{kind} decided for {found} tokens, but got {list(x.shape)}; expected {tokens}, those of a sequence after "
            "those of the one before"
        )


class _Calls:
    """Routings of one layer during a step as a chain, newest first: torch.compile recompiles for a list's length."""

    def __init__(self) -> None:
        self.newest: tuple[Decision, Any] | None = None

    def in_order(self) -> list[Decision]:
        found: list[Decision] = []
        link = self.newest
        while link is not None:
            routing, link = link
            found.append(routing)
        return found[::-1]


class Step:
    """What the MoE layers of a model decided during one step."""

    def __init__(self, layers: dict[str, Recorded]) -> None:
        self._layers = layers
        self._calls = {name: _Calls() for name in layers}

    @property
    def routings(self) -> dict[str, list[Decision]]:
        """The decisions of every layer by its name in the model, in call order."""
        return {name: calls.in_order() for name, calls in self._calls.items()}

    def losses(self) -> dict[str, Tensor]:
        """Each auxiliary loss summed over layers and calls; the values are weighted and ready to add.

        Those of gates that are judged together (`Router.together`) are of all layers at once. Raises RuntimeError when
        a layer in training ran without gradients: reentrant checkpointing does that.
        """
        total: dict[str, Tensor] = {}
        judged: dict[type, tuple[Router, list[Decision]]] = {}
        for layer, calls in self.routings.items():
            router = self._layers[layer].router
            joint = router.training and getattr(type(router), "together", None) not in (None, Router.together)
            if joint and calls:
                judged.setdefault(type(router), (router, []))[1].extend(calls)
            for routing in calls:
                if (joint or routing.losses) and not routing.weight.requires_grad and torch.is_grad_enabled():
                    self._check_trainable(layer)
                for name, value in routing.losses.items():
                    total[name] = total[name] + value if name in total else value
        for router, decisions in judged.values():
            total |= router.together(decisions)
        return total

    def _check_trainable(self, layer: str) -> None:
        router = self._layers[layer].router
        if router.training and any(p.requires_grad for p in router.parameters()):
            raise RuntimeError(
                f"auxiliary losses of layer {layer!r} have no gradient: its forward ran without one. Activation "
                f"checkpointing needs use_reentrant=False; for values alone call losses() under torch.no_grad()"
            )


@contextmanager
def record(model: nn.Module) -> Iterator[Step]:
    """Collect decisions and losses of every layer with a router in `model` while the block runs: `MoE` and its kin.

    Nothing is kept outside such a block, so a model that nobody records costs nothing. Blocks may nest; each sees every
    call made inside it. A call counts once: recomputation by (non-reentrant) activation checkpointing does not add to
    it, whether backward runs inside the block or after, in eager mode or in a compiled model. Where checkpointing is
    outermost and what it repeats is compiled, run backward inside the block: after it the compiled code is another.
    """
    step = Step({name: m for name, m in model.named_modules() if isinstance(m, Recorded)})
    for name, layer in step._layers.items():
        layer._recording = (*layer._recording, step._calls[name])
    try:
        with _traceable_under_checkpoint():
            yield step
    finally:
        for name, layer in step._layers.items():
            layer._recording = tuple(calls for calls in layer._recording if calls is not step._calls[name])


def _traceable_under_checkpoint() -> AbstractContextManager[None]:
    """Let torch.compile record inside a checkpointed block: by default it refuses, and runs the model uncompiled."""
    dynamo = sys.modules.get("torch._dynamo")
    option = "skip_fwd_side_effects_in_bwd_under_checkpoint"
    if dynamo is None or not hasattr(dynamo.config, option):
        return nullcontext()
    return dynamo.config.patch(**{option: True})
