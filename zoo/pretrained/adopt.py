"""transformers' causal language model of a family, with its sparse blocks replaced by `zoo.moe.MoE`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..moe import MLP, DepthRouter, Experts, MoE, Router, ShortcutMoE
from ..moe.capacity import as_capacity
from ..moe.routers import TopKRouter
from ..nearest import unknown
from .context import pass_context
from .decoders import put_attention, put_depth, put_shortcuts
from .language import ALSO, TABLES, Family, activation_of, resolve_dtype
from .stand_in import stand_in

RouterFactory = Callable[[], Router]


def family_of(model_type: str, where: str = "") -> Family:
    """The family of a configuration's model_type; raises ValueError naming the nearest ones and `where` it was read."""
    model_type = ALSO.get(model_type, model_type)
    if model_type not in TABLES:
        raise unknown(f"language family{where}", str(model_type), TABLES)
    return TABLES[model_type]


def gate_arguments(losses: Mapping[str, Any] | None, capacity: Any) -> dict[str, Any]:
    """Gate arguments for the losses and capacity of `create_model`; capacity is one, its arguments, or its factor."""
    given: dict[str, Any] = {}
    if losses is not None:
        given["losses"] = losses
    if capacity is not None:
        given["capacity"] = as_capacity(capacity)
    return given


def build(
    config: Any,
    *,
    router: RouterFactory | None = None,
    router_args: dict[str, Any] | None = None,
    experts: Callable[[], Any] | None = None,
    attention: tuple[Iterable[int], Callable[[], nn.Module]] | None = None,
    depth: tuple[Iterable[int], Callable[[], DepthRouter]] | None = None,
    shortcut: tuple[Iterable[int], int | None] | None = None,
    dense: bool = False,
    backend: str = "auto",
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    attn_implementation: str | None = None,
    initialize: bool = True,
) -> Any:
    """The model that a transformers configuration describes, on our layers.

    `router` makes the gate of one layer (the family's own by default, with `router_args` on top), `experts` its experts
    (gated MLPs by default); attention and depth say which layers have attention experts or a mixture of depths, and
    what makes one; shortcut which layers add the experts of the layer before, and the width of dense MLPs there.
    `dense` puts one dense MLP of the same active width in place of router and experts. Without `initialize` weights are
    left unset, for a loader to fill. On the meta device nothing is allocated. Raises ValueError for an unknown family
    or activation, and for a shortcut where no experts are.
    """
    family = family_of(config.model_type)
    config = copy.deepcopy(config)
    dtype = resolve_dtype(dtype) or torch.get_default_dtype()
    device = torch.device(device) if device is not None else torch.get_default_device()
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with torch.device("meta"):
        model = family.classes()[1]._from_config(config, dtype=dtype, **options)
    ends = () if shortcut is None else tuple(shortcut[0])
    if shortcut is not None:
        _make_room(model, ends, shortcut[1] or config.intermediate_size, dtype)
    blocks = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    for layer in model.model.layers:
        if layer.mlp in blocks:
            layer.mlp = _dense(config, family, dtype) if dense else _shared(layer.mlp, family)
    if device.type != "meta":
        materialize(model, device, initialize)
    if not dense:
        own = {**family.router(config), **(router_args or {})}
        make = router or (lambda: TopKRouter(config.hidden_size, getattr(config, family.num_experts), **own))
        for i, layer in enumerate(model.model.layers):
            if isinstance(layer.mlp, _Shared) or i + 1 in ends:
                beside, kind = (layer.mlp, ShortcutMoE) if i + 1 in ends else (layer.mlp.shared, MoE)
                layer.mlp = _moe(config, family, make, beside, backend, dtype, device, initialize, experts, kind)
        if attention is not None:
            put_attention(model, *attention)
        pass_context(model)
        if depth is not None:
            put_depth(model, *depth)
        if ends:
            put_shortcuts(model, ends)
        stand_in(model)
    return model.eval() if not initialize else model


class _Shared(nn.Module):
    """Keeps the place of a sparse block, and its shared expert, until the model has memory."""

    def __init__(self, shared: nn.Module | None) -> None:
        super().__init__()
        self.shared = shared


def _shared(block: nn.Module, family: Family) -> nn.Module:
    return _Shared(getattr(block, family.shared) if family.shared else None)


def _make_room(model: Any, ends: tuple[int, ...], hidden_dim: int, dtype: torch.dtype) -> None:
    """Give both layers of each shortcut a dense MLP, on the meta device; ValueError where there would be no experts."""
    layers = model.model.layers
    for i in ends:
        if not hasattr(layers[i].mlp, "experts"):
            raise ValueError(f"shortcut: layer {i} of {model.config.model_type} has no experts that it could add")
        for layer in (layers[i - 1], layers[i]):
            with torch.device("meta"):
                layer.mlp = MLP(model.config.hidden_size, hidden_dim, activation_of(model.config)).to(dtype)


def shared_width(config: Any) -> int:
    """Hidden width of a family's shared experts together, zero without any."""
    if config.model_type == "qwen2_moe":
        return config.shared_expert_intermediate_size
    return config.moe_intermediate_size * config.n_shared_experts if family_of(config.model_type).shared else 0


def _dense(config: Any, family: Family, dtype: torch.dtype) -> MLP:
    width = config.num_experts_per_tok * getattr(config, family.hidden) + shared_width(config)
    with torch.device("meta"):
        return MLP(config.hidden_size, width, activation_of(config)).to(dtype)


@torch.no_grad()
def materialize(model: Any, device: torch.device, initialize: bool) -> None:
    """Give a model on the meta device memory, and let transformers fill it.

    Rotary tables, positions and what else no checkpoint holds are computed in any case.
    """
    model.to_empty(device=device)
    model.tie_weights()
    if initialize:
        for module in model.modules():
            model._init_weights(module)
        return
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True  # transformers' own mark of what it leaves alone
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()


@torch.no_grad()
def _moe(
    config: Any,
    family: Family,
    make: RouterFactory,
    shared: nn.Module | None,
    backend: str,
    dtype: torch.dtype,
    device: torch.device,
    initialize: bool,
    make_experts: Callable[[], Any] | None,
    kind: type[MoE] = MoE,
) -> MoE:
    num_experts, dim = getattr(config, family.num_experts), config.hidden_size
    if make_experts is not None:
        with device:
            experts = make_experts().to(dtype)
    else:
        with torch.device("meta"):
            experts = Experts(num_experts, dim, getattr(config, family.hidden), activation_of(config), backend=backend)
            experts.to(dtype)
    with device:
        router = make()
        if kind is ShortcutMoE:
            moe: MoE = ShortcutMoE(router, experts, shared)  # type: ignore[arg-type]
        else:
            moe = MoE(router, experts, shared=shared, shared_gate=family.shared_gate is not None)
    # Buffers keep their type: the selection bias is float32 in every checkpoint.
    for parameter in (*router.parameters(), *(moe.shared_gate.parameters() if moe.shared_gate else ())):
        parameter.data = parameter.data.to(dtype)
    if device.type == "meta":
        return moe
    if make_experts is None:
        experts.to_empty(device=device)
    if initialize:
        std = config.initializer_range
        weights: list[torch.Tensor] = list(experts.parameters()) if make_experts is None else []
        own_start = getattr(type(router), "reset_parameters", None) is not TopKRouter.reset_parameters
        if isinstance(router, TopKRouter) and not own_start and router.noise != "learned":
            weights.append(router.weight)
        if moe.shared_gate is not None:
            weights.append(moe.shared_gate.weight)
        for weight in weights:
            weight.normal_(0.0, std)
    return moe
