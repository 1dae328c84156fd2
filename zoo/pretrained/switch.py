"""Switch Transformers (2101.03961): transformers' own encoder and decoder with their sparse MLPs on our layers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..gates import gate_factory
from ..moe import Capacity, Experts, MoE
from ..moe.grown import joined_state
from ..moe.routers import TopKRouter
from ..nearest import unknown
from . import adopt, image_text, shards
from .language import check_same
from .peek import peek
from .staging import staged
from .stand_in import stand_in

MODEL_TYPE = "switch_transformers"
ACTIVATIONS = ("relu", "gelu", "silu")


def is_switch(folder: Path) -> bool:
    """Whether a folder's config.json is that of a Switch Transformer."""
    return peek(folder).get("model_type") == MODEL_TYPE


def class_of(model_type: str, where: str = "") -> Any:
    """transformers' class; there is one."""
    from transformers import SwitchTransformersForConditionalGeneration

    return SwitchTransformersForConditionalGeneration


def from_pretrained(folder: Path, *, mesh: Any = None, **options: Any) -> Any:
    """A published checkpoint as transformers' model, its sparse MLPs as `MoE` with a top-1 `TopKRouter`.

    Options are those of `zoo.pretrained.folder.from_pretrained` but mesh; the gate's capacity, in every sequence and in
    evaluation too, is the configuration's expert_capacity unless another is given. transformers drops hidden units of
    experts at its dropout_rate in training; here they are not dropped.
    """
    if mesh is not None:
        raise ValueError(f"{MODEL_TYPE} cannot be read in parts: read it without mesh")
    return image_text.from_pretrained(folder, find=class_of, put=put_layers, **options)


def put_layers(
    model: Any,
    *,
    backend: str = "auto",
    router: Any = None,
    losses: Mapping[str, Any] | None = None,
    capacity: Any = None,
) -> Any:
    """The model with its sparse MLPs on our layers, changed in place; options as in `from_pretrained`."""
    config, given = model.config, adopt.gate_arguments(losses, capacity)
    if config.dense_act_fn not in ACTIVATIONS:
        raise unknown(f"expert activation (dense_act_fn of {MODEL_TYPE})", config.dense_act_fn, ACTIVATIONS)
    own = {
        "k": 1,
        "jitter": config.router_jitter_noise,
        "bias": config.router_bias,
        "capacity": Capacity(tokens=config.expert_capacity),
        "group_size": "sequence",
        "dtype": getattr(torch, config.router_dtype),
    }
    for parent in list(model.modules()):
        if not hasattr(getattr(parent, "mlp", None), "router"):
            continue
        dim, number = config.d_model, config.num_experts
        classifier = parent.mlp.router.classifier
        with classifier.weight.device:
            if router is None:
                gate: Any = TopKRouter(dim, number, **{**own, **given})
            else:
                gate = gate_factory(router, dim, number, k=1, **given)()
        parent.mlp = _moe(parent.mlp, gate, config.dense_act_fn, backend)
    stand_in(model)
    return model


@torch.no_grad()
def _moe(block: Any, gate: Any, activation: str, backend: str) -> MoE:
    experts, classifier = list(block.experts.values()), block.router.classifier
    wi, wo = (torch.stack([getattr(expert, name).weight for expert in experts]) for name in ("wi", "wo"))
    for name in ("weight", "bias"):
        ours, theirs = getattr(gate, name, None), getattr(classifier, name, None)
        if isinstance(ours, nn.Parameter) and theirs is not None and ours.shape == theirs.shape:
            setattr(gate, name, theirs)
    with torch.device("meta"):
        stacked = Experts(len(wi), wi.shape[2], wi.shape[1], activation, backend=backend)
    stacked.up_proj, stacked.down_proj = nn.Parameter(wi), nn.Parameter(wo)
    return MoE(gate, stacked).train(block.training)


def tensors_of_transformers(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all that transformers' own model would hold, views of a model's state."""
    for name, tensor in state.items():
        stem, _, last = name.rpartition(".")
        if stem.endswith(".mlp.experts") and last in ("up_proj", "down_proj"):
            for number, expert in enumerate(tensor):
                yield f"{stem}.expert_{number}.{'wi' if last == 'up_proj' else 'wo'}.weight", expert
        elif stem.endswith(".mlp.router"):
            if last not in ("weight", "bias"):
                raise ValueError(f"{name}: the layout of {MODEL_TYPE} has no place for it")
            yield f"{stem}.classifier.{last}", tensor
        else:
            yield name, tensor


def save(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model in the published layout, so that plain transformers loads it; see `zoo.save_pretrained`.

    Raises ValueError for gates that the layout cannot express, and for layers that differ in their experts.
    """
    image_text.check_reshaped(model, put_layers)
    for name, layer in model.named_modules():
        if not isinstance(layer, MoE):
            continue
        router: Any = layer.router
        if not isinstance(router, TopKRouter):
            raise ValueError(f"{name}.router: {type(router).__name__} cannot be expressed in {MODEL_TYPE}")
        with torch.device("meta"):
            means = TopKRouter(router.dim, router.num_experts, 1, bias=model.config.router_bias)
        check_same(f"{name}.router", router, means, MODEL_TYPE)
    limit = shards.bytes_of(max_shard_size)
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    state = image_text._own(joined_state(model, state_dict), tied)
    state = dict(tensors_of_transformers(state))
    with staged(folder, overwrite) as staging:
        type(model).save_pretrained(model, staging, state_dict=state, max_shard_size=limit)
