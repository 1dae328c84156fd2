"""From sparse to dense: every mixture of experts as one MLP (OneS, 2201.10890; EWA, 2308.06093; EMoE, 2310.10908)."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..moe import MLP, Experts, IsolatedMoE, MoE, ShortcutMoE
from ..moe.grown import no_stack
from ..pretrained.adopt import materialize
from ..pretrained.placement import moe_layers
from ..pretrained.sparse_blocks import stand_alike
from .again import made_again_by
from .arguments import Calibrate, whole
from .dense_mlps import DenseMLP, activation_attribute, is_mlp, part_of, put_part, recognise
from .dense_relatives import mlp_at, partly_dense, plain_twin
from .gathering import METHODS, concatenate, method_of, one, scaled, side_by_side, stack_of
from .origin import made_by
from .timm_layers import dense_blocks
from .usage import Usage, is_meta, layers_of, measure


def _again(
    model: nn.Module,
    decided: Mapping[str, Any],
    *,
    method: Any = "average",
    weights: Any = None,
    scale: Any = 1.0,
    **arguments: Any,
) -> Any:
    """What `to_dense` makes, with other values: usage decides nothing but these."""
    if isinstance(method, Mapping) and method.get("expert") == "used":
        method = {"expert": 0}
    weights, scale = (None if weights == "usage" else weights), (1.0 if scale == "usage" else scale)
    return to_dense(model, method=method, weights=weights, scale=scale, **arguments)


@made_again_by(_again)
def to_dense(
    model: nn.Module,
    layers: str | int | Iterable[int] = "all",
    method: str | Mapping[str, Any] = "average",
    *,
    weights: str | Sequence[float] | Mapping[str, Sequence[float]] | None = None,
    scale: float | str = 1.0,
    shared: float | None = None,
    width: int | None = None,
    calibrate: Calibrate | None = None,
) -> Any:
    """A copy of a sparse model in which every chosen `MoE` is one dense MLP. The given model stays as it is.

    layers are those of `moe_layers`, counted over the layers that have an `MoE`. method says what the MLP is made of,
    the a_e being weights [E]:
        average      sum_e a_e W_e / sum_e a_e, even by default (OneS; what EWA ends with)
        sum          sum_e a_e W_e, a = 1 by default (OneS)
        topk         of every expert the neurons whose weights are largest in norm, F in all, in shares a (OneS: Top-KG)
        svd          sum_e a_e [W_e]_r of the best approximations of rank full/E, a = 1 by default (OneS: SVD-KG)
        concatenate  the neurons of all experts side by side, width E F: it computes sum_e a_e f_e(x), a = 1 by default,
                     which is exact where a gate gives every expert the weight a_e (EMoE's recomposition)
        {"expert": e}    the e-th expert; {"expert": "used"} the one met most often, by calibrate
    OneS's four are named so in the paper's abstract; of its equations, which could not be read, this is a reading: that
    a neuron's norm is taken over the weights on both its sides, and that SVD-KG adds the approximations, are ours.

    weights may be "usage": the mean combine weight of each expert over the tokens that calibrate runs; a sequence for
    all layers, or one a layer by the name of its `MoE`. scale multiplies what routed experts give: a gate whose weights
    sum to s (DeepSeek's routed_scaling_factor) asks for scale=s; "usage" is the mean sum over calibrate's tokens.
    A shared expert's neurons are joined side by side, which is exact. One behind a gate of its own (Qwen2-MoE) is
    refused unless `shared` gives the factor that takes the gate's place; shared=0 leaves shared experts out. Neurons of
    zeros fill an MLP up to `width`: a family with one width for all its dense layers (DeepSeek) can say so then.

    A transformers model that has no experts left is returned as the plain model of the dense family where there is one
    (Mixtral: Mistral, Qwen2-MoE: Qwen2, Qwen3-MoE: Qwen3, DeepSeek-V3 and its kin: all layers dense, upcycled ones:
    what they were), and so `save_pretrained` writes what transformers reads; OLMoE has none (OLMo 2 norms elsewhere).
    Otherwise the copy is of the same class, and can be saved where its family can say which layers are dense. timm's
    models stay timm's. dtype, device, mode and requires_grad are those of the experts. On the meta device calibrate is
    not called.

    Raises ValueError naming what does not fit: experts that are no MLPs, or read weighed inputs; a gate between experts
    and a shared one; weights of another number; a model spread over processes; usage asked for without calibrate.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    every = layers_of("to_dense", model)
    names = list(every)
    chosen = {names[i]: every[names[i]] for i in moe_layers(layers, len(names))}
    gather = method_of(method)
    width = None if width is None else whole("to_dense: width", width)
    weighed = gather is METHODS["concatenate"] and weights is not None
    for name, moe in chosen.items():
        _check(model, name, moe, shared, weighed or scale != 1)
    usage = _usage(model, chosen, calibrate, gather, weights, scale)
    makers: dict[str, Callable[[], dict[str, Tensor]]] = {}
    widths: dict[str, int] = {}
    for name, moe in chosen.items():
        own, beside = _own_weights(name, moe, weights, usage), _shared_mlp(name, moe, shared)
        if not callable(gather):
            number = gather if isinstance(gather, int) else int(usage[name].counts.argmax()) if usage else 0
            if not -moe.experts.num_experts <= number < moe.experts.num_experts:
                raise ValueError(f"to_dense: {name} has {moe.experts.num_experts} experts, none with number {number}")
            how: Callable[..., dict[str, Tensor]] = functools.partial(one, number)
        else:
            how = gather
        factor = float(usage[name].weight.sum()) / max(usage[name].tokens, 1) if usage and scale == "usage" else scale
        factor = 1.0 if isinstance(factor, str) else float(factor)
        times = moe.experts.num_experts if gather is concatenate else 1
        least = moe.experts.hidden_dim * times + (beside.sizes[1] if beside else 0)
        if width is not None and width < least:
            raise ValueError(f"to_dense: the MLP of {name} has {least} neurons, more than width={width}")
        widths[name] = least if width is None else width
        put = (1.0 if shared is None else shared, widths[name])
        makers[name] = functools.partial(_mlp_weights, moe, how, own, factor, beside, *put)
    if hasattr(model, "config") and hasattr(model, "get_decoder"):
        twin = plain_twin(model, widths) if len(chosen) == len(every) else None
        if twin is not None:
            dense: Any = _fill(twin, model, makers)
            made_by("to_dense", dense)
            return dense
        config, twin = partly_dense(model, widths)
        dense = _replaced(model, makers, twin)
        # In place: all modules of a copied model hold the one configuration.
        vars(dense.config.get_text_config()).update(vars(config.get_text_config()))
    elif hasattr(model, "pretrained_cfg"):
        twin, note = dense_blocks(model, widths)
        dense = _replaced(model, makers, twin)
        note(dense)
    else:
        dense = _replaced(model, makers, None)
    dense.reshaped = True
    made_by("to_dense", dense)
    return dense


def _check(model: nn.Module, name: str, moe: MoE, shared: float | None, weighed: bool) -> None:
    """Raise ValueError for a layer that is no sum of MLPs."""
    around = model.get_submodule(name.rpartition(".")[0])
    outer = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
    if isinstance(moe, ShortcutMoE) or isinstance(outer, IsolatedMoE) or isinstance(around, IsolatedMoE):
        kind = type(moe).__name__ if isinstance(moe, ShortcutMoE) else "IsolatedMoE"
        raise ValueError(f"to_dense: {name} is a {kind}; expected a MoE that stands alone")
    if type(moe.experts) is not Experts:
        raise ValueError(f"to_dense: {no_stack(name, moe.experts)}")
    if moe.experts.weigh_input and weighed:
        raise ValueError(f"to_dense: {name} weighs what its experts read: no weights or scale of what they give")
    if moe.mix_gate is not None:
        raise ValueError(f"to_dense: {name} has a gate between experts and a dense MLP (mix_gate), which no MLP has")
    if moe.shared_gate is not None and shared is None:
        raise ValueError(
            f"to_dense: the shared expert of {name} has a gate of its own, which no MLP has; give shared=factor to put "
            "a number in its place, or shared=0 to leave the expert out"
        )


def _usage(
    model: nn.Module, chosen: Mapping[str, MoE], calibrate: Calibrate | None, gather: Any, weights: Any, scale: Any
) -> dict[str, Usage]:
    for what, value in (("weights", weights), ("scale", scale)):
        if isinstance(value, str) and value != "usage":
            raise ValueError(f'to_dense: {what} is a word only as "usage"; got {value!r}')
    asked = gather == "used" or any(isinstance(value, str) for value in (weights, scale))
    if is_meta(model) or not asked:
        return {}
    return measure("to_dense", model, calibrate, chosen.keys())


def _own_weights(name: str, moe: MoE, weights: Any, usage: Mapping[str, Usage]) -> list[float] | None:
    """The a_e of one layer; None for the method's default."""
    if weights is None or (weights == "usage" and not usage):
        return None
    if weights == "usage":
        return (usage[name].weight / max(usage[name].tokens, 1)).tolist()
    if isinstance(weights, Mapping):
        if name not in weights:
            raise ValueError(f"to_dense: weights has no entry for {name}; it has {', '.join(weights)}")
        weights = weights[name]
    own = [float(weight) for weight in weights]
    if len(own) != moe.experts.num_experts:
        raise ValueError(f"to_dense: {name} has {moe.experts.num_experts} experts, weights has {len(own)} numbers")
    return own


def _shared_mlp(name: str, moe: MoE, shared: float | None) -> DenseMLP | None:
    if moe.shared is None or shared == 0:
        return None
    if not is_mlp(moe.shared):
        raise ValueError(f"to_dense: the shared expert of {name} is a {type(moe.shared).__name__}, not known as an MLP")
    found = recognise(f"{name}.shared", moe.shared)
    if found.activation != moe.experts.activation:
        raise ValueError(
            f"to_dense: {found.name} has the activation {found.activation}, the experts beside it "
            f"{moe.experts.activation}; one MLP has one"
        )
    return found


@torch.no_grad()
def _mlp_weights(
    moe: MoE,
    how: Callable[..., dict[str, Tensor]],
    own: Any,
    scale: float,
    beside: DenseMLP | None,
    factor: float,
    width: int,
) -> dict[str, Tensor]:
    """What the dense MLP of one layer holds."""
    gated = moe.experts.gated
    parts = [scaled(how(stack_of(moe.experts), own, gated=gated), scale)]
    if beside is not None:
        parts.append(scaled(beside.weights(), factor))
    if missing := width - sum(part["w_out"].shape[1] for part in parts):
        into, out = parts[0]["w_in"], parts[0]["w_out"]
        rows = missing * (2 if gated else 1)
        parts.append({"w_in": into.new_zeros(rows, into.shape[1]), "w_out": out.new_zeros(len(out), missing)})
    return side_by_side(parts, gated) if len(parts) > 1 else parts[0]


@torch.no_grad()
def _fill(twin: Any, model: Any, makers: Mapping[str, Callable[[], dict[str, Tensor]]]) -> Any:
    """A plain transformers model that has no memory yet, with another's weights and the MLPs that makers make."""
    state = model.state_dict(keep_vars=True)
    for name, tensor in twin.state_dict(keep_vars=True).items():
        if name in state and tensor.dtype != state[name].dtype:
            tensor.data = tensor.data.to(state[name].dtype)
    if not is_meta(model):
        materialize(twin, next(model.parameters()).device, initialize=False)
    for name, tensor in twin.state_dict(keep_vars=True).items():
        if name in state:
            tensor.copy_(state[name])
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(state[name].requires_grad)
    first: dict[int, str] = {}
    names = {name for name, _ in twin.named_parameters(remove_duplicate=False)}
    for name, parameter in model.named_parameters(remove_duplicate=False):  # blocks may share weights (share_depth)
        if name in names and (kept := first.setdefault(id(parameter), name)) != name:
            owner, _, leaf = name.rpartition(".")
            setattr(twin.get_submodule(owner), leaf, twin.get_parameter(kept))
    for name, make in makers.items():
        mlp = mlp_at(twin, name)
        assert mlp is not None
        _write(mlp, make(), model.get_submodule(name).experts.down_proj.requires_grad)
    if getattr(model, "generation_config", None) is not None:
        twin.generation_config = copy.deepcopy(model.generation_config)
    twin.name_or_path = model.name_or_path
    return twin.train(model.training)


def _replaced(model: nn.Module, makers: Mapping[str, Callable[[], dict[str, Tensor]]], twin: nn.Module | None) -> Any:
    """A copy of a model with MLPs in place of some `MoE`s, of the kind that a dense model without memory has there."""
    memo: dict[int, Any] = {}
    inline = {}
    for name, make in makers.items():
        moe: Any = model.get_submodule(name)
        like = mlp_at(twin, name)
        if like is not None and like.activation != moe.experts.activation:
            like = None
        parts = make()
        if like is None:
            with torch.device("meta"):
                sizes = (moe.experts.dim, parts["w_out"].shape[1], moe.experts.activation, "b_out" in parts)
                like = recognise(name, MLP(*sizes))
        _write(like, parts, moe.experts.down_proj.requires_grad)
        like.module.train(moe.training)
        stand_alike(moe, like.module)
        if like.inline:
            inline[like.name] = like
            memo[id(moe)] = nn.Identity()
        else:
            memo[id(moe)] = like.module
    dense = copy.deepcopy(model, memo)
    for name, mlp in inline.items():
        layer = dense.get_submodule(name)
        for part in (*(part for part in mlp.layout if part), activation_attribute(mlp.module)):
            put_part(layer, part, part_of(mlp.module, part))
    return dense


@torch.no_grad()
def _write(mlp: DenseMLP, weights: dict[str, Tensor], requires_grad: bool) -> None:
    """Give an MLP these weights, of any width; raises ValueError for a bias that it has no place for."""
    *into, down = mlp.linears
    if mlp.gate_last:
        weights = {n: torch.cat(t.chunk(2)[::-1]) if n.endswith("in") else t for n, t in weights.items()}
    rows = weights["w_in"].chunk(len(into))
    biases = weights["b_in"].chunk(len(into)) if "b_in" in weights else [None] * len(into)
    for linear, weight, bias in zip((*into, down), (*rows, weights["w_out"]), (*biases, weights.get("b_out"))):
        plain = isinstance(linear, nn.Linear)
        linear.weight = nn.Parameter((weight if plain else weight.T).contiguous().clone(), requires_grad)
        sizes = ("out_features", "in_features") if plain else ("nf", "nx")
        for attribute, size in zip(sizes, weight.shape):
            setattr(linear, attribute, size)
        if linear.bias is not None:
            values = weight.new_zeros(len(weight)) if bias is None else bias.clone()
            linear.bias = nn.Parameter(values.to(weight.dtype), requires_grad)
        elif bias is not None and not bias.is_meta and bool(bias.any()):
            raise ValueError(f"to_dense: {mlp.name} has no bias where the experts have one that is not zero")
