"""How large a model is, and how much of it one token uses."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..moe import Router
    from ..moe.layer import Recorded


def count_parameters(model: nn.Module, learning: bool = False) -> tuple[int, int]:
    """Parameters in all, and active for one token (all but those of the experts it does not meet).

    Where modalities have experts of their own, the token is one of text. Where experts choose, a token meets as many as
    the capacity factor says on average; in Soft MoE it meets them all. Attention experts count likewise; with a mixture
    of depths it is a token that goes through every layer. Of layers that share experts it meets the same ones in all.
    With `learning` only those that gradients reach are counted. Works on the meta device. Raises ValueError where it is
    not fixed how many parameters that is: for a gate that does not say, as attribute k, how many experts a token meets,
    and for experts of unequal size.
    """
    from ..moe import (
        Experts,
        GrownExperts,
        IsolatedMoE,
        LatentExperts,
        LoRAExperts,
        LoRAOfExperts,
        MixLoRAExperts,
        MoE,
        OffloadedExperts,
        QuantisedExperts,
        ResidualExperts,
    )
    from ..moe.layer import Recorded

    total = _numbers(model, learning)
    elsewhere = (OffloadedExperts, QuantisedExperts)  # that are no parameters, and do not learn
    if not learning:
        total += sum(m.numbers for m in model.modules() if isinstance(m, elsewhere))
    active = float(total)
    counted: set[int] = set()
    alike = (Experts, GrownExperts, LatentExperts, LoRAExperts, LoRAOfExperts, MixLoRAExperts, ResidualExperts)
    for name, layer in model.named_modules():
        if isinstance(layer, IsolatedMoE):
            # What the other parts would have active: the experts that no token of theirs meets are out already.
            active -= sum(count_parameters(part, learning)[1] for part in list(layer.parts)[1:])
        if not isinstance(layer, Recorded):
            continue
        if isinstance(layer, MoE) and not isinstance(layer.experts, alike + elsewhere):
            raise ValueError(f"{name}: {type(layer.experts).__name__} are not all of one size")
        stacked = _stacked(layer, counted, learning)
        if stacked:
            met = _experts_met(layer.router)
            if met is None:
                raise ValueError(f"{name}: {type(layer.router).__name__} has no fixed number of experts k a token")
            active -= stacked // layer.router.num_experts * (layer.router.num_experts - met)
    return total, round(active)


def _numbers(module: nn.Module, learning: bool) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not learning)


def _stacked(layer: Recorded, counted: set[int], learning: bool) -> int:
    """How many parameters the experts of a layer have together, those of stacks that were counted left out."""
    from ..moe import AdaptedLinear, HeadExperts, LatentExperts, LoRAOfExperts, MoA, MoE, MoH, ScaledLinear

    if isinstance(layer, AdaptedLinear):
        return _numbers(layer.lora, learning)
    if isinstance(layer, MoE):
        stacked, experts = 0, layer.experts
        if isinstance(experts, LatentExperts):
            experts = experts.mlp  # every token goes the way in and out
        for stack in [experts.base, experts.lora] if isinstance(experts, LoRAOfExperts) else [experts]:
            held = id(next(itertools.chain(stack.parameters(), stack.buffers()), stack))
            if held not in counted:
                counted.add(held)
                own = getattr(stack, "numbers", None)
                stacked += _numbers(stack, learning) if own is None else 0 if learning else own
        return stacked
    weights: list[Tensor] = []
    if isinstance(layer, ScaledLinear):
        weights = [layer.vectors]
    elif isinstance(layer, MoA):
        weights = [layer.q_proj, layer.o_proj]
    elif isinstance(layer, MoH):
        weights = [heads[layer.num_shared_heads :] for heads in (layer.q_proj, layer.o_proj)]
    elif isinstance(layer, HeadExperts):
        weights = [layer.weight]
    return sum(weight.numel() for weight in weights if weight.requires_grad or not learning)


def _experts_met(router: Router) -> float | None:
    from ..moe.routers import ExpertChoiceRouter, SoftRouter

    if isinstance(router, SoftRouter):
        return router.num_experts
    if isinstance(router, ExpertChoiceRouter) and router.capacity.tokens is None:
        return min(router.capacity.factor, router.num_experts)
    return getattr(router, "k", None)
