"""How many experts layers have, said anew where a model's configuration or arguments say it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..moe import MoE
from .context import decoder_of
from .dense_mlps import blocks_with_mlps

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CHOICES = ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token")


def say_numbers(model: Any, before: Any) -> None:
    """Let a model that has fewer experts than the one it comes from say how many, where all its layers agree.

    before is that model, whose numbers are looked for among the fields; or its numbers, as `numbers` gives them.
    """
    old, new = before if isinstance(before, tuple) else numbers(before), numbers(model)
    if hasattr(model, "config") and hasattr(model, "get_decoder"):
        config = decoder_of(model).config
        for fields, was, now in ((EXPERTS, old[0], new[0]), (CHOICES, old[1], new[1])):
            if len(was) == 1 and len(now) == 1:
                for field in fields:
                    if getattr(config, field, None) == next(iter(was)):
                        setattr(config, field, next(iter(now)))
    elif hasattr(model, "pretrained_cfg"):
        _say_timm(model, old, new)


def numbers(model: nn.Module) -> tuple[set[int], set[int]]:
    """How many experts the layers of a model have, and how many a token meets, where gates have a k."""
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    routers: list[Any] = [moe.router for moe in layers]
    return {router.num_experts for router in routers}, {router.k for router in routers if hasattr(router, "k")}


def _say_timm(model: Any, old: tuple[set[int], set[int]], new: tuple[set[int], set[int]]) -> None:
    arguments = dict(getattr(model, "_model_args", None) or {})
    if "moe_layers" in arguments and len(new[0]) == 1:
        arguments["num_experts"] = next(iter(new[0]))
        if new[1] != old[1] and len(new[1]) == 1:
            router, k = arguments.get("router"), next(iter(new[1]))
            if isinstance(router, Mapping) and "k" in router:
                arguments["router"] = {**router, "k": k}
            else:
                arguments["k"] = k
        model._model_args = arguments
    notes = []
    for how in getattr(model, "upcycled", []):
        found = [module for _, module in blocks_with_mlps(model, how.get("within", ""))]
        groups: dict[tuple[int, int], list[int]] = {}
        for i in how["layers"]:
            moe: Any = found[i]
            k = getattr(moe.router, "k", how["k"]) if isinstance(moe, MoE) else how["k"]
            experts = moe.router.num_experts if isinstance(moe, MoE) else how["num_experts"]
            groups.setdefault((experts, k), []).append(i)
        granularity = how.get("granularity", 1)
        notes += [
            {**how, "layers": layers, "num_experts": experts // granularity, "k": max(k // granularity, 1)}
            for (experts, k), layers in groups.items()
        ]
    if notes:
        model.upcycled = notes
