"""How many experts layers have, said anew where a model's configuration or arguments say it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from ..moe import MoE
from .dense_mlps import blocks_with_mlps
from .timm_layers import NOTES
from .trimming import Dropped

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CHOICES = ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token")


def say_numbers(model: Any) -> None:
    """Let a model that lost experts say how many its layers have, and how many a token meets, where all agree."""
    routers: list[Any] = [module.router for module in model.modules() if isinstance(module, MoE)]
    experts = {router.num_experts for router in routers}
    choices = {router.k for router in routers if hasattr(router, "k")}
    if hasattr(model, "config") and hasattr(model, "get_decoder"):
        # An encoder and a decoder have copies of their own.
        configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
        for fields, found in ((EXPERTS, experts), (CHOICES, choices)):
            for config, field in itertools.product(configs.values(), fields if len(found) == 1 else ()):
                if isinstance(getattr(config, field, None), int):
                    setattr(config, field, next(iter(found)))
        if experts and all(getattr(router, "num_groups", 1) == 1 for router in routers):
            for config in configs.values():
                if getattr(config, "n_group", None) in experts:  # one expert was left in each: there are no groups now
                    config.n_group = config.topk_group = 1
        # By which transformers' load balancing loss goes.
        for field, found in (("num_experts", experts), ("num_experts_per_tok", choices)):
            if len(found) == 1 and isinstance(getattr(model, field, None), int):
                setattr(model, field, next(iter(found)))
    elif hasattr(model, "pretrained_cfg"):
        say_timm(model, experts, choices)


def say_timm(model: Any, experts: set[int], choices: set[int]) -> None:
    """The same of a timm model's arguments, and of what `zoo.upcycle` and `zoo.split` noted."""
    arguments = dict(getattr(model, "_model_args", None) or {})
    if hasattr(model, "moe_layers"):
        if len(experts) == 1:
            arguments["num_experts"] = next(iter(experts))
        if len(choices) == 1:
            arguments |= {"router": _with_k(arguments.get("router"), k := next(iter(choices))), "k": k}
            arguments = {name: value for name, value in arguments.items() if name != "router" or value is not None}
        model._model_args = arguments
    if any(isinstance(module, Dropped) for module in model.modules()):
        return  # its blocks are counted otherwise now, and no layout has it
    for note in NOTES:
        if hasattr(model, note):
            setattr(model, note, [part for how in getattr(model, note) for part in _by_number(model, how)])


def _by_number(model: Any, how: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What one conversion noted, once for each number of experts and of choices that its layers have now."""
    found: list[Any] = [module for _, module in blocks_with_mlps(model, how.get("within", ""))]
    groups: dict[tuple[int, int, int], list[int]] = {}
    for i in how["layers"]:
        moe = found[i]
        key = moe.router.num_experts, getattr(moe.router, "k", how["k"]), moe.experts.hidden_dim
        groups.setdefault(key, []).append(i)
    granularity = how.get("granularity", 1)
    for (number, k, width), layers in groups.items():
        made = {
            **how,
            "layers": layers,
            "num_experts": max(number // granularity, 1),
            "router": _with_k(how["router"], k),
        }
        if "expert_dim" in how and number != how["num_experts"]:
            made["expert_dim"] = width  # fewer or more than what an MLP was cut into
        yield {**made, "k": max(k // granularity, 1)}


def _with_k(router: Any, k: int) -> Any:
    """What a user said of a gate, with another k where it says one."""
    if not isinstance(router, Mapping):
        return router
    if "class_path" in router:
        inside = dict(router.get("init_args") or {})
        return {**router, "init_args": {**inside, "k": k}} if "k" in inside else router
    return {**router, "k": k} if "k" in router else router
