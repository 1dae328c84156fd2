"""Sparse upcycling (2212.05055): a trained dense model as a mixture of experts whose experts are copies of its MLPs."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..gates import gate_factory
from ..moe import Experts, MoE, ResidualExperts, Router
from ..pretrained.adopt import gate_arguments
from ..pretrained.context import decoder_of, pass_context
from ..pretrained.placement import moe_layers
from ..pretrained.sparse_blocks import stand_alike
from ..pretrained.stand_in import stand_in
from .arguments import whole, whole_each
from .dense_mlps import (
    DenseMLP,
    activation_attribute,
    blocks_with_mlps,
    expert_parameter,
    is_mlp,
    places,
    put_part,
    recognise,
)
from .origin import made_by


def upcycle(
    model: nn.Module,
    layers: str | int | Iterable[int] = "every-2",
    num_experts: int | Sequence[int] = 8,
    router: Any = "TopKRouter",
    *,
    k: int | None = None,
    normalize: bool = True,
    capacity: Any = None,
    losses: Mapping[str, Any] | None = None,
    noise: float = 0.0,
    router_std: float = 0.02,
    granularity: int = 1,
    residual: bool = False,
    within: str = "",
    backend: str = "auto",
) -> nn.Module:
    """A copy of a dense model with the MLPs of some layers replaced by `MoE`s of copies of them (2212.05055).

    Works on any backbone whose MLPs `zoo.convert.dense_mlps` knows: timm's ViT, Swin, ConvNeXt and their like,
    transformers' Llama, Mistral, Qwen, Phi, GPT-2, GPT-J, OPT, BERT, T5, SigLIP and their like. The given model stays
    as it is.

    layers are those of `moe_layers`, counted over the blocks that have an MLP: those of a submodule where `within`
    names one ("model.vision_tower"), of the language model in a vision-language model, or of all. router is a name,
    class, function or mapping as in `create_model`; k (two by default), normalize, capacity (a `Capacity`, its
    arguments or its factor) and losses are for gates that have such arguments. num_experts may be one number for each
    of the chosen layers, such as more in deeper ones (the pyramid of PR-MoE, 2201.05596).
    With combine weights normalised and no drops (top-k without capacity, the default) the model gives the dense model's
    outputs. The paper normalises in vision, with router="ExpertChoiceRouter" and capacity=2, and not in language.
    The router starts from N(0, router_std^2); experts are copies, plus N(0, (noise * s)^2) where s is the standard
    deviation of the weights they copy. With granularity G (2410.07524) each copy is cut into G experts of width F/G,
    num_experts counting copies and k copies a token: pieces of a copy share their router row, so that they start chosen
    together, and `scale` G makes up for the weight they share. With residual=True experts are what is added to one copy
    that all share (`ResidualExperts`, RMoE 2204.09636), at first nothing but the noise.

    Dropout outside the MLP stays, and that of hidden units and outputs alike (timm); that of only one of them is left
    out with a warning (GPT-2, T5). New parameters take dtype, device, training mode and requires_grad of those they
    replace. `zoo.save_pretrained` writes upcycled timm models and LIMoEs, Llama, Mistral and Qwen3 in the layouts of
    Mixtral and Qwen3-MoE, and an upcycled LLaVA in MoE-LLaVA's, where these can express the gates.

    Raises ValueError naming what does not fit: no MLP, a layer that is sparse already, an activation that the experts
    do not have, an MLP that computes something else, sizes that do not divide.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    num_experts = whole_each("upcycle: num_experts", num_experts)
    granularity = whole("upcycle: granularity", granularity)
    numbers = [num_experts] if isinstance(num_experts, int) else list(num_experts)
    if min(numbers, default=0) < 1 or granularity < 1:
        raise ValueError(f"upcycle: num_experts={num_experts} and granularity={granularity} must be at least 1")
    if residual and granularity > 1:
        raise ValueError(f"upcycle: residual experts share a whole copy, which granularity={granularity} would cut")
    within = within or language_model(model)
    blocks = list(blocks_with_mlps(model, within))
    if not blocks:
        place = f" under {within!r}" if within else ""
        raise ValueError(f"upcycle: {type(model).__name__} has no blocks with an MLP of known linear layers{place}")
    chosen = [blocks[i] for i in moe_layers(layers, len(blocks))]
    for name, module in chosen:
        if isinstance(module, MoE) or hasattr(module, "experts"):
            raise ValueError(f"upcycle: {name} is a mixture of experts already")
    if isinstance(num_experts, int):
        numbers *= len(chosen)
    if len(numbers) != len(chosen):
        raise ValueError(f"upcycle: num_experts has {len(numbers)} numbers for {len(chosen)} layers")
    k = min(2, *numbers) if k is None else whole("upcycle: k", k)
    given = gate_arguments(losses, capacity)
    found = {}
    for number, mlp in zip(numbers, [recognise(name, module) for name, module in chosen]):
        mlp.check()
        defaults = {"normalize": normalize, **({"scale": float(granularity)} if granularity > 1 else {})}
        make = gate_factory(router, mlp.sizes[0], number * granularity, k * granularity, defaults, **given)
        found[mlp] = _moe(mlp, make, granularity, noise, router_std, backend, residual)
    warn_of_dropout(list(found))
    # Modules with a replacement are not copied: memory for the dense ones twice is not needed.
    sparse: Any = copy.deepcopy(model, {id(mlp.module): moe for mlp, moe in found.items() if not mlp.inline})
    for mlp, moe in found.items():
        if mlp.inline:
            put_inline(sparse.get_submodule(mlp.name), mlp, moe)
    how = {"layers": list(moe_layers(layers, len(blocks))), "num_experts": num_experts, "router": router, "k": k}
    how |= {"normalize": normalize, "capacity": capacity, "losses": losses, "granularity": granularity}
    how |= {"residual": True} if residual else {}
    sparse.upcycled = [*getattr(model, "upcycled", []), {**how, "within": within, "backend": backend}]
    made_by("upcycle", sparse)
    finish_transformers(sparse)
    return sparse


@torch.no_grad()
def upcycle_optimizer(old: Optimizer, dense: nn.Module, new: Optimizer, sparse: nn.Module) -> None:
    """Give the optimizer of an upcycled model the state that the dense model's had (2212.05055, section 3).

    `sparse` is `upcycle(dense, ...)` and `new` an optimizer of the same kind over its parameters, in any groups. State
    of kept parameters is copied, that of an MLP to each of its experts, or to their core; routers start without. Rates
    and other options stay those of `new`. Raises ValueError where the models do not belong together, and for state that
    is not shaped as its parameter is.
    """
    made: list[tuple[MoE, DenseMLP]] = []
    for name, moe in [(n, m) for n, m in sparse.named_modules() if isinstance(m, MoE)]:
        module_name, module = _counterpart(name, dense)
        if isinstance(module, MoE):
            continue
        if not isinstance(moe.experts, (Experts, ResidualExperts)):
            raise ValueError(f"upcycle_optimizer: {name} has {type(moe.experts).__name__}, which upcycle does not make")
        made.append((moe, recognise(module_name, module)))
    before = dict(dense.named_parameters())
    known = {parameter for group in new.param_groups for parameter in group["params"]}
    for name, parameter in sparse.named_parameters():
        if name in before and parameter in known and before[name] in old.state:
            if before[name].shape != parameter.shape:
                raise ValueError(f"upcycle_optimizer: {name} has another shape in the upcycled model")
            new.state[parameter] = copy.deepcopy(old.state[before[name]])
    for moe, mlp in made:
        for part, state in _expert_state(mlp, moe, old).items():
            parameter = expert_parameter(moe.experts, part)
            if parameter in known:
                new.state[parameter] = state


def _expert_state(mlp: DenseMLP, moe: MoE, old: Optimizer) -> dict[str, dict[str, Any]]:
    """State of each stacked parameter by name and key; empty where the MLP was not trained."""
    states: dict[str, dict[str, Any]] = {part: {} for part in mlp.weights()}
    trained = [parameter for parameter in mlp.parameters if parameter in old.state]
    if not trained:
        return {}
    for key, value in old.state[trained[0]].items():
        if not isinstance(value, Tensor) or not value.dim():
            for state in states.values():
                state[key] = copy.deepcopy(value)
            continue
        moments = {p: torch.zeros_like(p) for p in mlp.parameters} | {p: old.state[p][key] for p in trained}
        if wrong := [moment.shape for p, moment in moments.items() if moment.shape != p.shape]:
            raise ValueError(f"upcycle_optimizer: {mlp.name}: state {key!r} of shape {list(wrong[0])} is no weight's")
        for part, stacked in _stack(mlp.weights(moments.__getitem__), mlp, moe.experts).items():
            states[part][key] = stacked
    return states


def _counterpart(name: str, dense: nn.Module) -> tuple[str, nn.Module]:
    """The dense MLP that became the `MoE` of that name: there, or the layer around it where the MLP was inline."""
    for candidate in places(name):
        try:
            module = dense.get_submodule(candidate)
        except AttributeError:
            continue
        if isinstance(module, MoE) or is_mlp(module):
            return candidate, module
    raise ValueError(f"upcycle_optimizer: the dense model has no MLP where {name} is")


def language_model(model: Any) -> str:
    """The name of the language model inside a vision-language one, else an empty string."""
    if not hasattr(model, "get_decoder") or not hasattr(getattr(model, "config", None), "vision_config"):
        return ""
    decoder = decoder_of(model)
    return next(name for name, module in model.named_modules() if module is decoder)


@torch.no_grad()
def _moe(
    mlp: DenseMLP,
    make: Callable[[], Router],
    granularity: int,
    noise: float,
    router_std: float,
    backend: str,
    residual: bool = False,
) -> MoE:
    dim, hidden = mlp.sizes
    if hidden % granularity:
        raise ValueError(f"upcycle: {mlp.name} has {hidden} hidden units, which granularity={granularity} does not cut")
    like = mlp.down.weight
    with torch.device(like.device):
        router = make()
    weight = getattr(router, "weight", None)
    if isinstance(weight, Tensor) and weight.shape == (router.num_experts, dim):
        # The pieces of one copy share a row: their logits tie, and top-k takes all of them or none.
        copies = torch.empty(router.num_experts // granularity, dim, device=like.device).normal_(std=router_std)
        weight.copy_(copies.repeat_interleave(granularity, 0))
    for parameter in router.parameters():
        parameter.data = parameter.data.to(like.dtype)
    sizes = (router.num_experts, dim, hidden // granularity)
    experts: Any
    if residual and mlp.dropout:
        raise ValueError(f"upcycle: {mlp.name} drops {mlp.dropout:g} of its units, which residual experts cannot")
    with torch.device("meta"):
        if residual:
            experts = ResidualExperts(*sizes, mlp.activation, mlp.has_bias, backend)
        else:
            experts = Experts(*sizes, mlp.activation, mlp.has_bias, backend, mlp.dropout)
    experts.to(like.dtype).to_empty(device=like.device)
    if residual:
        for parameter in experts.parameters():
            parameter.zero_()
    weights = mlp.weights()
    if "b_out" in weights:
        weights["b_out"] = weights["b_out"] / granularity  # each piece of a copy adds its share
    for part, stacked in _stack(weights, mlp, experts).items():
        parameter = expert_parameter(experts, part)
        parameter.copy_(stacked)
        if noise and part.startswith("w"):
            own = experts.residual(parameter) if isinstance(experts, ResidualExperts) else parameter
            own.add_(torch.randn_like(own), alpha=noise * float(weights[part].float().std()))
    experts.requires_grad_(like.requires_grad)
    moe = MoE(router, experts).train(mlp.module.training)
    stand_alike(mlp.module, moe)
    return moe


def _stack(weights: dict[str, Tensor], mlp: DenseMLP, experts: Any) -> dict[str, Tensor]:
    """One expert's tensors as those of all: cut into G pieces along the hidden units, and the pieces repeated."""
    if isinstance(experts, ResidualExperts):
        return weights  # of the core
    pieces = mlp.sizes[1] // experts.hidden_dim
    found = {}
    for part, tensor in weights.items():
        if part == "b_out":
            cut = tensor.expand(pieces, -1)
        elif part == "w_out":
            cut = tensor.unflatten(1, (pieces, -1)).transpose(0, 1)
        else:
            sides = tensor.chunk(2) if experts.gated else (tensor,)
            cut = torch.cat([side.unflatten(0, (pieces, -1)) for side in sides], dim=1)
        found[part] = cut.repeat(experts.num_experts // pieces, *[1] * (cut.dim() - 1))
    return found


def put_inline(layer: nn.Module, mlp: DenseMLP, moe: MoE) -> None:
    """Let a transformer layer that owns its linear layers call the experts in place of the first."""
    _, up, down = mlp.layout
    put_part(layer, up, moe)
    put_part(layer, down, nn.Identity())
    put_part(layer, activation_attribute(layer), nn.Identity())


def warn_of_dropout(mlps: list[DenseMLP], conversion: str = "upcycle", stacklevel: int = 3) -> None:
    """Say which dropout a conversion leaves out: that of only some of the units inside the MLPs."""
    rates = {rate for mlp in mlps if not mlp.dropout for rate in mlp.dropout_rates if rate}
    if rates:
        shown = ", ".join(f"{rate:g}" for rate in sorted(rates))
        told = f"{conversion}: dropout of only some units inside the MLPs ({shown}) is left out"
        warnings.warn(told, stacklevel=stacklevel)


def finish_transformers(model: Any) -> None:
    """Tell the routers of a decoder about padding, and keep transformers from writing our tensors under its names."""
    if not hasattr(model, "config") or not hasattr(model, "save_pretrained"):
        return
    stand_in(model)
    decoder = decoder_of(model)
    layers = getattr(decoder, "layers", None)
    if isinstance(layers, nn.ModuleList) and all(hasattr(m, "self_attn") and hasattr(m, "mlp") for m in layers):
        parameters = [inspect.signature(m.forward).parameters.values() for m in (decoder, *layers)]
        if all(any(p.kind is p.VAR_KEYWORD for p in found) for found in parameters):
            pass_context(model)
