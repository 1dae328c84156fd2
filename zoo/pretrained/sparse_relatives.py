"""Dense language models with experts in the published layout of their sparse relatives.

Mixtral is Mistral with experts, and Llama too where Llama has no biases; Qwen3-MoE is Qwen3 with experts, in any of its
layers. So what `zoo.upcycle` and `zoo.split` make of these is written as those, and loads anywhere.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from ..moe import Experts, GrownExperts, MoE, NeuronExperts, QuantisedExperts, ResidualExperts, ShortcutMoE
from ..moe.grown import joined_state
from ..moe.residual import folded_state
from . import adopt, few_bits
from .decoders import DecoderAttention, DecoderDepth
from .language import RELATIVES, TABLES, check_experts, check_router

OWN = ("model_type", "architectures", "transformers_version", "layer_types", "max_window_layers")


def published_config(model: Any) -> Any:
    """The configuration under which a model of ours is published: its own, or that of a sparse relative.

    Raises TypeError for a model without such a layout, and ValueError for one that it cannot express, naming why.
    """
    config: Any = getattr(model, "config", None)
    few_bits.check(model)
    for name, module in model.named_modules():
        other = isinstance(module, (DecoderAttention, DecoderDepth))
        part: Any = module.experts if isinstance(module, MoE) else None
        if isinstance(part, (Experts, GrownExperts, QuantisedExperts, ResidualExperts)) and not isinstance(
            part, NeuronExperts
        ):
            part = None
        if isinstance(module, ShortcutMoE):
            part = module
        if other or part is not None:
            what = type(part if part is not None else next(iter(module.children()))).__name__
            raise TypeError(f"save_pretrained: no published layout has a place for {name}, {what}; keep its state_dict")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
    model_type = getattr(config, "model_type", None)
    reshaped = getattr(model, "reshaped", False)
    label = f"save_pretrained: the {model_type} that to_dense or prune made"
    if not layers and model_type in TABLES and (reshaped or _says_dense(config)):
        check_tensors(model, config, label)
        return config  # every layer is dense, and the configuration says so
    if not layers or model_type not in TABLES.keys() | RELATIVES.keys():
        raise TypeError(
            f"save_pretrained: {type(model).__name__} has no published layout; expected a model of "
            f"{', '.join(TABLES)} from zoo.create_model or zoo.from_pretrained, one with experts of "
            f"{', '.join(RELATIVES)}, or a vision model"
        )
    if model_type in RELATIVES:
        config = _relative(model, config, layers)
    if reshaped:  # layers may differ from each other
        check_tensors(model, config, label)
    for name, layer in layers.items():
        family = adopt.family_of(config.model_type)
        check_router(f"{name}.router", layer.router, family, config)
        check_experts(f"{name}.experts", layer.experts, family, config)
    return config


def _says_dense(config: Any) -> bool:
    """Whether a sparse family's configuration makes every layer dense."""
    return (getattr(config, "first_k_dense_replace", None) or 0) >= config.num_hidden_layers


def _relative(model: Any, config: Any, layers: dict[str, MoE]) -> Any:
    family_name = RELATIVES[config.model_type]
    family = TABLES[family_name]
    label = f"save_pretrained: a {config.model_type} with experts in the {family.prefix} layout"
    blocks = model.model.layers
    dense = [i for i in range(len(blocks)) if f"model.layers.{i}.mlp" not in layers]
    kinds = {(m.experts.num_experts, m.experts.hidden_dim, getattr(m.router, "k", 1)) for m in layers.values()}
    if len(kinds) > 1:
        raise ValueError(f"{label}: all layers need the same experts and k, found (E, F, k) = {sorted(kinds, key=str)}")
    if dense and family_name == "mixtral":
        raise ValueError(f'{label}: every layer must have experts, {dense} have none; give layers="all"')
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        raise ValueError(f"{label}: layers with a sliding window beside others cannot be expressed")
    ((num_experts, hidden, k),) = kinds
    kind = family.classes()[0]
    known = kind().to_dict().keys() | {"head_dim"}
    fields = {name: value for name, value in config.to_dict().items() if name in known and name not in OWN}
    fields |= {family.num_experts: num_experts, family.hidden: hidden, "num_experts_per_tok": k}
    if family_name == "qwen3_moe":
        router = next(iter(layers.values())).router
        fields |= {
            "mlp_only_layers": dense,
            "decoder_sparse_step": 1,
            "norm_topk_prob": bool(getattr(router, "normalize", False)),
        }
    found = kind(**copy.deepcopy(fields))
    check_tensors(model, found, label)
    return found


def check_tensors(model: Any, config: Any, label: str) -> None:
    """Raise ValueError unless the relative has the same tensors: no biases, say, where it has none."""
    with torch.device("meta"):
        twin = adopt.build(config)
    ours, theirs = (
        few_bits.plain_shapes({name: tuple(t.shape) for name, t in joined_state(m, folded_state(m)).items()})
        for m in (model, twin)
    )
    if other := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
        shown = ", ".join(f"{n} {ours.get(n, 'missing here')}/{theirs.get(n, 'missing there')}" for n in other[:3])
        raise ValueError(f"{label}: {len(other)} tensors differ ({shown})")
