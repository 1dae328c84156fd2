"""Putting experts in place of MLPs in a timm model that is being built."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from timm.layers import Mlp, trunc_normal_tf_
from torch import Tensor, nn

from ..convert.dense_mlps import DenseMLP, blocks_with_mlps, expert_parameter, recognise
from ..layers import experts_factory
from ..moe import Experts, MoE, Router, ZeroComputationExperts
from ..moe.routers import ExpertChoiceRouter
from ..pretrained.placement import moe_layers as placed
from .vision_gates import vision_gate


def put_experts(
    model: nn.Module,
    *,
    moe_layers: str | int | Iterable[int] | None = "last-2",
    num_experts: int = 8,
    k: int | None = None,
    router: Any = "TopKRouter",
    capacity: Any = None,
    losses: Mapping[str, Any] | None = None,
    group_images: int | None = None,
    experts: Any = "Experts",
    expert_dropout: float | None = None,
    shared_init: bool = True,
    dense: bool = False,
    backend: str = "auto",
    tokens: int = 0,
) -> tuple[int, ...]:
    """Replace the MLPs of some of the model's blocks by mixtures of experts, in place; returns which blocks.

    moe_layers are those of `zoo.pretrained.placement.moe_layers`, over the blocks of all stages, "none" for none;
    router and what follows it those of `vision_gate`, tokens how many an image has (for slots by capacity). experts may
    be of another kind (`zoo.layers.experts_factory`): "NeuronExperts", {"name": "ZeroComputationExperts", "zero": 2}.
    Those that are MLPs start as copies of the MLP, or with shared_init=False each drawn with the spread of its weights;
    others as their class says. expert_dropout is by default that of the MLP. dense=True makes the dense twin instead:
    an MLP as wide as the experts that a token meets together (one for Soft MoE, where slots are fewer than tokens).

    Raises ValueError for blocks that do not exist, and where an MLP is one that experts cannot be: with convolutions
    or norms inside, or an activation that they do not have.
    """
    if moe_layers is None or moe_layers == "none":
        return ()
    blocks = list(blocks_with_mlps(model))
    if not blocks:
        raise ValueError(
            f"{type(model).__name__}: no block has an MLP of linear layers, whose place experts could take"
        )
    chosen = placed(moe_layers, len(blocks))
    makers: dict[Any, Callable[[], Any]] = {}
    for i in chosen:
        mlp = recognise(*blocks[i])
        weight = mlp.linears[-1].weight
        gate = vision_gate(
            router,
            mlp.sizes[0],
            num_experts,
            tokens=tokens,
            k=k,
            capacity=capacity,
            losses=losses,
            group_images=group_images,
        )
        if dense:
            layer = _widened(mlp, gate)
        else:
            dropout = (
                getattr(getattr(mlp.module, "drop1", None), "p", 0.0) if expert_dropout is None else expert_dropout
            )
            with torch.device(weight.device):
                options: dict[str, Any] = {"bias": mlp.has_bias, "backend": backend, "dropout": dropout}
                kind = (*mlp.sizes, mlp.activation, *options.values())
                if kind not in makers:  # one for all layers, which may share something
                    makers[kind] = experts_factory(experts, num_experts, *mlp.sizes, mlp.activation, **options)
                made = makers[kind]()
                layer = MoE(gate(), made).to(weight.dtype)
            if (mlps := stacked_mlps(made)) is not None and mlps.hidden_dim == mlp.sizes[1]:
                _draw(mlps, mlp, shared_init)
        parent, _, name = mlp.name.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
    return chosen


def stacked_mlps(experts: nn.Module) -> Experts | None:
    """The stacked MLPs among experts, if any: all, or those beside the ones that compute nothing."""
    if isinstance(experts, ZeroComputationExperts):
        return experts.mlp
    return experts if type(experts) is Experts else None


@torch.no_grad()
def _widened(mlp: DenseMLP, gate: Callable[[], Router]) -> nn.Module:
    """An MLP like the given one, as many times as wide as a gate's tokens meet experts."""
    with torch.device("meta"):
        router: Any = gate()
    times = getattr(router, "k", 1)
    if isinstance(router, ExpertChoiceRouter):
        times = max(1, round(router.capacity.factor))
    old, weight = mlp.module, mlp.linears[-1].weight
    if not isinstance(old, Mlp):
        raise ValueError(f"{mlp.name}: a dense twin needs timm's Mlp, found {type(old).__name__}")
    place = {"device": weight.device, "dtype": weight.dtype}
    wide = Mlp(
        mlp.sizes[0], mlp.sizes[1] * times, act_layer=type(old.act), bias=mlp.has_bias, drop=old.drop1.p, **place
    )
    for linear, source in ((wide.fc1, old.fc1), (wide.fc2, old.fc2)):
        trunc_normal_tf_(linear.weight, std=_spread(source.weight))
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
    return wide


@torch.no_grad()
def _draw(experts: Experts, mlp: DenseMLP, shared: bool) -> None:
    for name, value in mlp.weights().items():
        parameter = expert_parameter(experts, name)
        if shared or name.startswith("b_"):
            parameter.copy_(value.expand_as(parameter))
        else:
            trunc_normal_tf_(parameter, std=_spread(value))


def _spread(weight: Tensor) -> float:
    """The standard deviation of a weight that has a value."""
    return 1.0 if weight.is_meta else float(weight.std())


def undecayed(model: nn.Module) -> set[str]:
    """Names of the parameters of routers and experts that are no matrices: they have no weight decay in V-MoE."""
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            prefix = f"{name}." if name else ""
            for inner, parameter in module.named_parameters():
                if inner.endswith("_bias") or (inner == "router.weight" and parameter.dim() == 3):
                    found.add(prefix + inner)
    return found
