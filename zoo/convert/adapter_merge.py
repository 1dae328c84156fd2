"""Adapters merged into the weights they stand beside, where that changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..moe import (
    AdaMix,
    AdaptedLinear,
    FollowedLinear,
    GatedPrefix,
    LoRAExperts,
    LoRALinear,
    LoRAOfExperts,
    MixLoRAExperts,
    MoE,
    PromptMixture,
    Router,
    ScaledLinear,
)
from ..moe.adapted import Columns
from ..moe.routers import DenseRouter, LabelRouter, MoCLERouter, MoLERouter, TaskMixtureRouter, TaskRouter, TopKRouter
from .adapting import base_of
from .origin import made_by


@torch.no_grad()
def merge_adapters(model: nn.Module, **context: Any) -> nn.Module:
    """A copy of an adapted model that needs no adapters, or fewer: it computes what the model does outside training.

    One expert is added to the weights it stands beside; so are all whose gate reads a label alone, for one label: the
    task of MOELoRA's in `merge_adapters(model, task=3)`, cluster for MoCLE. AdaMix becomes one adapter, the mean of its
    adapters, which is what inference has; it is no linear map and stays beside the MLP. Pairs inside experts are added
    to the weights of each. Everything stays frozen.

    Raises ValueError naming the layer whose gate looks at tokens, or whose weights are quantised, and for a model
    without adapters.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    made: Any = copy.deepcopy(model)
    names = [name for name, module in made.named_modules() if base_of(module) is not None]
    if not names:
        raise ValueError(f"merge_adapters: {type(made).__name__} has no adapters")
    for name in reversed(names):  # innermost first
        parent, _, leaf = name.rpartition(".")
        setattr(made.get_submodule(parent), leaf, _merged(name, made.get_submodule(name), context))
    before: Any = getattr(made, "adapted", [])
    kept = [how for how in before if how["kind"] == "AdaMix"]
    made.adapted = [{**how, "num_experts": 1, "shared": None} for how in kept]
    if len(kept) < len(before):
        made_by("merge_adapters", made)
    if not kept:
        del made.adapted
        if made.__dict__.pop("_saves_adapters", False):
            del made.save_pretrained  # transformers' own again
    return made


def _merged(name: str, adapter: Any, context: dict[str, Any]) -> nn.Module:
    if isinstance(adapter, AdaMix):
        return adapter.merged()
    if isinstance(adapter, LoRALinear):
        return _added(name, adapter.base, adapter.lora, torch.ones(1), adapter.columns)
    if isinstance(adapter, LoRAOfExperts):
        try:
            return adapter.merged()
        except ValueError as error:
            raise ValueError(f"merge_adapters: {name}: {error}") from None
    if isinstance(adapter, (PromptMixture, GatedPrefix)):
        raise ValueError(f"merge_adapters: {name} are prompts, which are no weights")
    if isinstance(adapter, FollowedLinear):
        raise ValueError(f"merge_adapters: {name} has an adapter behind it, which is no linear map")
    if isinstance(adapter, MoE) and not isinstance(adapter.experts, MixLoRAExperts):
        raise ValueError(f"merge_adapters: {name} stands beside a whole MLP, which is no linear map")
    weight = _weights(name, adapter.router, context)
    if isinstance(adapter, AdaptedLinear):
        return _added(name, adapter.base, adapter.lora, weight, adapter.columns)
    if isinstance(adapter, ScaledLinear):
        return _scaled(name, adapter, weight)
    if not torch.equal(weight, torch.ones(1)):
        raise ValueError(f"merge_adapters: {name} mixes MLPs, which is no linear map; only one expert can be merged")
    for layer, lora in adapter.experts.lora.items():
        _added(f"{name}.{layer}", getattr(adapter.experts.base, layer), lora, weight, None)
    return adapter.experts.base


def _weights(name: str, router: Router, context: dict[str, Any]) -> Tensor:
    """The weights of experts [E] of a gate that does not look at tokens."""
    by_label = isinstance(router, (LabelRouter, TaskRouter, TaskMixtureRouter, MoCLERouter))
    softmax = isinstance(router, (DenseRouter, MoLERouter, TopKRouter))
    softmax = softmax and getattr(router, "score", "softmax") in ("softmax", "softmax_topk")
    if router.merges or not (by_label or (softmax and router.num_experts == 1)):
        raise ValueError(
            f"merge_adapters: the gate of {name}, a {type(router).__name__}, weighs {router.num_experts} experts by "
            "the token; only one expert, or a gate that reads a label alone, can be merged"
        )
    token = torch.zeros(1, 1, router.dim, device=next(iter(router.parameters()), torch.zeros(())).device)
    return router.eval()(token, **context).dense()[0].cpu()


def _added(name: str, linear: Any, lora: LoRAExperts, weight: Tensor, columns: Columns | None) -> nn.Module:
    product = lora.product(weight.to(lora.b.device))
    start, stop = columns or (0, product.shape[0])
    _rows(name, linear)[start:stop].add_(product.to(linear.weight.dtype))
    return linear


def _scaled(name: str, adapter: ScaledLinear, weight: Tensor) -> nn.Module:
    linear: Any = adapter.base
    rows, factor = _rows(name, linear), 1 + weight.to(adapter.vectors) @ (adapter.vectors - 1)
    if adapter.scale == "input":
        rows.mul_(factor.to(rows.dtype))
        return linear
    start, stop = adapter.columns or (0, rows.shape[0])
    rows[start:stop].mul_(factor.to(rows.dtype)[:, None])
    if linear.bias is not None:
        linear.bias[start:stop].mul_(factor.to(rows.dtype))
    return linear


def _rows(name: str, linear: Any) -> Tensor:
    """The weight as [out, in], to be changed in place."""
    if not linear.weight.is_floating_point():
        raise ValueError(f"merge_adapters: {name} has quantised weights ({linear.weight.dtype})")
    return linear.weight if isinstance(linear, nn.Linear) else linear.weight.T
