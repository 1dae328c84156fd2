"""Language models: transformers' causal language models on our MoE layers, by name.

Families of `zoo.pretrained.language` take any option; the others are transformers' models whose sparse blocks change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..nearest import unknown
from .language_sizes import MODELS

if TYPE_CHECKING:
    import torch
    from torch import nn


def build(
    name: str,
    *,
    router: Any = None,
    losses: Mapping[str, Any] | None = None,
    capacity: Any = None,
    experts: Any = None,
    attention: Any = None,
    mixture_of_depths: Any = None,
    shortcut: Any = None,
    backend: str = "auto",
    dense: bool = False,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    **fields: Any,
) -> nn.Module:
    """The model called `name`, initialised as its family is (normal, config.initializer_range).

    router: any gate, for every MoE layer: a class or function taking (dim, num_experts), or its name or class path
    with arguments, {"name": "TopKRouter", "k": 1} or {"class_path": "my.Router", "init_args": {...}}; dim and
    num_experts are filled in, and k too where the gate has one and none is given; or a list of these for the first
    layers, its last for all the rest. losses and capacity (a `Capacity`, its arguments, or the factor alone) go to
    that gate, or to the family's own. What a gate goes by besides tokens, such as a task, the model is told as
    model(..., moe_context={"task": 1}). In the same form, each starting as its class says:
        experts    other experts than gated MLPs: {"name": "ZeroComputationExperts", "constant": 1}, "NeuronExperts",
                   "ResidualExperts", {"name": "HyperExperts", "adapter_dim": 64},
                   {"name": "LatentExperts", "latent_dim": 256}
        attention  heads as experts: {"name": "MoH", "num_shared_heads": 1, "k": 2}, "SwitchHead", "MoA" with its gate
                   {"name": "MoA", "num_experts": 8, "router": {"name": "TopKRouter", "k": 2}}; "layers" says where
        mixture_of_depths  {"capacity": 0.125, "sampling": "predictor", "layers": "every-2"}
        shortcut   true or {"layers": "every-2", "hidden_dim": 256}: in pairs of layers the experts read the first and
                   are added in the second, each of them with a dense MLP (ScMoE, see `ShortcutMoE`) of that width,
                   config.intermediate_size if not said, in place of the family's shared experts
    (see `zoo.layers`). Such a model has no published layout. These four are for the families of
    `zoo.pretrained.language` alone. backend is that of `moe_mlp`. dense makes the dense twin instead (see
    `dense_twin`). All other keywords are fields of the family's configuration.
    Raises ValueError naming the nearest fields or gates for an unknown one.
    """
    from ..gates import gate_factory, layer_gates
    from ..layers import attention_factory, depth_factory, experts_factory, shortcut_layers
    from ..pretrained import adopt, causal
    from ..pretrained.language import TABLES, activation_of

    if dense:
        return dense_twin(name, dtype=dtype, attn_implementation=attn_implementation, **fields)
    config = configuration(name, **fields)
    if config.model_type not in TABLES:
        others = {"experts": experts, "attention": attention, "mixture_of_depths": mixture_of_depths}
        for option, value in {**others, "shortcut": shortcut}.items():
            if value is not None and value is not False:
                raise ValueError(f"{option}: not for {config.model_type}; expected a model of {', '.join(TABLES)}")
        return causal.build(
            config,
            router=router,
            losses=losses,
            capacity=capacity,
            backend=backend,
            dtype=dtype,
            attn_implementation=attn_implementation,
        )
    for option, value in {"attention": attention, "mixture_of_depths": mixture_of_depths}.items():
        if value is not None and config.model_type == "deepseek_v2":
            raise ValueError(f"{option}: not for deepseek_v2, whose rotary positions are complex numbers")
    layers = config.num_hidden_layers
    family = adopt.family_of(config.model_type)
    given = adopt.gate_arguments(losses, capacity)
    make = None
    if router is not None:
        sizes = (config.hidden_size, getattr(config, family.num_experts))
        several = isinstance(router, (list, tuple))
        factory = layer_gates if several else gate_factory
        make = factory(router, *sizes, k=config.num_experts_per_tok, **given)
    parts: dict[str, Any] = {}
    if experts is not None:
        number, hidden = getattr(config, family.num_experts), getattr(config, family.hidden)
        act = activation_of(config)
        parts["experts"] = experts_factory(experts, number, config.hidden_size, hidden, act, backend=backend)
    if attention is not None:
        heads = config.num_attention_heads
        # DeepSeek's head_dim is that of its rotary part alone.
        head_dim = max(getattr(config, "head_dim", None) or 0, config.hidden_size // heads)
        parts["attention"] = attention_factory(attention, layers, config.hidden_size, heads, head_dim, causal=True)
    if mixture_of_depths is not None:
        parts["depth"] = depth_factory(mixture_of_depths, layers, config.hidden_size)
    if shortcut is not None and shortcut is not False:
        if mixture_of_depths is not None:
            raise ValueError(
                "shortcut: experts of one layer's tokens cannot be added in a layer that skips some of them"
            )
        parts["shortcut"] = shortcut_layers(shortcut, layers)
    return adopt.build(
        config,
        router=make,
        router_args=given,
        backend=backend,
        dtype=dtype,
        attn_implementation=attn_implementation,
        **parts,
    )


def configuration(name: str, **fields: Any) -> Any:
    """transformers' configuration of the model called `name`, with `fields` changed; ValueError for unknown ones."""
    from ..pretrained.causal import class_of

    if name not in MODELS:
        raise unknown("language model", name, MODELS)
    model_type, preset = MODELS[name]
    config_class = class_of(model_type).config_class
    _check_fields(config_class, fields)
    aliases = config_class.attribute_map
    merged = {aliases.get(field, field): value for field, value in preset.items()}
    merged.update({aliases.get(field, field): value for field, value in fields.items()})
    config = config_class(**merged)
    _check_sizes(config)
    return config


def _check_sizes(config: Any) -> None:
    """Raise ValueError for sizes with which a model could be made, or nearly, but not run."""
    named = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None)
    groups = heads if groups is None else groups
    for name, value in {**named, "num_attention_heads": heads, "num_key_value_heads": groups}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if heads % groups:
        raise ValueError(f"num_attention_heads must be a multiple of num_key_value_heads, got {heads} and {groups}")
    head = getattr(config, "head_dim", None)
    if head is None and config.hidden_size < heads:
        raise ValueError(f"hidden_size must be at least num_attention_heads, got {config.hidden_size} and {heads}")
    if (size := head or config.hidden_size // heads) % 2:
        raise ValueError(
            f"rotary positions need heads of an even size, got {size}: head_dim, or hidden_size {config.hidden_size} "
            f"over {heads} heads"
        )


def _check_fields(config_class: Any, fields: Mapping[str, Any]) -> None:
    import dataclasses

    # head_dim is read by every family, but is a field of some only.
    known = {f.name for f in dataclasses.fields(config_class)} | set(config_class.attribute_map) | {"head_dim"}
    shortcuts = {
        "router",
        "losses",
        "capacity",
        "experts",
        "attention",
        "mixture_of_depths",
        "shortcut",
        "backend",
        "dense",
        "dtype",
        "attn_implementation",
    }
    for field in fields:
        if field not in known:
            raise unknown(f"override of {config_class.model_type}", field, known | shortcuts)


def dense_twin(model: str | nn.Module, **overrides: Any) -> nn.Module:
    """The same backbone with one dense gated MLP in place of router and experts, as wide as a token's experts together.

    Its width is k*F, plus that of the shared experts: equal active parameters, but for the router's. `model` is a name
    ("language/mixtral_tiny") or a model built here; weights are fresh. overrides are those of `build`; what concerns
    the gate or the experts' backend has no meaning here and is ignored, so that both models may share them.
    """
    import copy

    from ..pretrained import adopt, causal
    from ..pretrained.language import TABLES

    dtype = overrides.pop("dtype", None)
    attention = overrides.pop("attn_implementation", None)
    for name in ("router", "losses", "capacity", "experts", "attention", "mixture_of_depths", "shortcut", "backend"):
        overrides.pop(name, None)
    config: Any
    if isinstance(model, str):
        config = configuration(model.removeprefix("language/"), **overrides)
    else:
        config = copy.deepcopy(model.config)
        _check_fields(type(config), overrides)
        config.num_experts_per_tok = _choices(model) or config.num_experts_per_tok
        for name, value in overrides.items():
            setattr(config, name, value)
        dtype = dtype or next(model.parameters()).dtype
    if config.model_type not in TABLES:
        return causal.build(config, dense=True, dtype=dtype, attn_implementation=attention)
    return adopt.build(config, dense=True, dtype=dtype, attn_implementation=attention)


def _choices(model: nn.Module) -> int | None:
    """How many experts a token meets, where the gates of a model say so."""
    from ..moe import MoE

    chosen = [getattr(module.router, "k", None) for module in model.modules() if isinstance(module, MoE)]
    return next((k for k in chosen if isinstance(k, int)), None)
