"""How much the experts of a model are used, read off its gates' decisions while a caller runs batches through it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..moe import MoE, Routing, record
from ..moe.decision import Decision
from ..parallel.parts import is_spread
from .arguments import Calibrate, losses_of


@dataclass
class Usage:
    """Sums over all tokens of one layer, each [E] float64: assignments, combine weights, and the gate's probabilities.

    probs is None for a gate that has no distribution; tokens is how many there were.
    """

    counts: Tensor
    weight: Tensor
    probs: Tensor | None
    tokens: int

    def __iadd__(self, other: Usage) -> Usage:
        probs = None if self.probs is None or other.probs is None else self.probs + other.probs
        return Usage(self.counts + other.counts, self.weight + other.weight, probs, self.tokens + other.tokens)


def layers_of(what: str, model: nn.Module) -> dict[str, MoE]:
    """Every `MoE` of a model by name; raises ValueError for a model spread over processes, and for one without any."""
    if is_spread(model) or any(getattr(m, "parallel", None) is not None for m in model.modules()):
        raise ValueError(f"{what}: {type(model).__name__} is spread over processes; expected a model in one process")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
    if not layers:
        raise ValueError(f"{what}: {type(model).__name__} has no mixture of experts (zoo.moe.MoE)")
    return layers


def is_meta(model: nn.Module) -> bool:
    """Whether a model has no memory, so that nothing can be run."""
    return next(model.parameters()).is_meta


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; every module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def measure(what: str, model: nn.Module, calibrate: Calibrate | None, names: Collection[str]) -> dict[str, Usage]:
    """Usage of the layers called `names` over the batches that calibrate runs, in evaluation mode.

    Raises ValueError without calibrate, for one that runs nothing, and for a layer that was never called.
    """
    if calibrate is None:
        raise ValueError(
            f"{what}: how much experts are used shows on data: give calibrate, a function that runs the model over "
            "batches and yields the loss of each"
        )
    found: dict[str, Usage] = {}
    with evaluating(model):
        batches: Iterator[Tensor] | None = None
        going, done = True, object()
        while going:
            with record(model) as step:
                # It may run all of them at once.
                batches = losses_of(what, calibrate, model) if batches is None else batches
                going = next(batches, done) is not done
            for name, calls in step.routings.items():
                for decision in calls if name in names else ():
                    usage = usage_of(decision)
                    if name in found:
                        found[name] += usage
                    else:
                        found[name] = usage
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{what}: calibrate ran no batch through {missing[0]}")
    return found


def usage_of(decision: Decision) -> Usage:
    """Of one decision."""
    if not isinstance(decision, Routing):
        matrix = decision.dense().detach().double()
        return Usage((matrix != 0).sum(0).double(), matrix.sum(0), None, len(matrix))
    weight = torch.zeros(decision.num_experts, dtype=torch.float64, device=decision.weight.device)
    weight.index_add_(0, decision.expert_index, decision.weight.detach().double())
    probs, asked, tokens = decision.probs, decision.asked, decision.num_tokens
    if isinstance(asked, Tensor):  # tokens that were masked asked for nothing
        real = asked > 0
        probs, tokens = None if probs is None else probs[real], int(real.sum())
    return Usage(decision.counts.double(), weight, None if probs is None else probs.detach().double().sum(0), tokens)
