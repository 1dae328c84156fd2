"""Dense to sparse by cutting: the MLPs of a trained model in experts that together are what they were."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..gates import gate_factory
from ..moe import Experts, GrownExperts, LoRAExperts, LoRAOfExperts, MixLoRAExperts, MoE, OffloadedExperts, Router
from ..moe.routers import EMoERouter, LLaMAMoERouter, MoEficationRouter, TopKRouter
from ..pretrained.adopt import gate_arguments
from ..pretrained.placement import moe_layers
from ..pretrained.sparse_blocks import stand_alike
from .again import made_again_by
from .arguments import Calibrate, whole
from .dense_mlps import DenseMLP, blocks_with_mlps, expert_parameter, recognise
from .origin import made_by
from .split_groups import Cut, Method, any_groups, cut
from .split_predictor import fit_predictor
from .upcycling import finish_transformers, language_model, put_inline, warn_of_dropout


def _again(model: nn.Module, decided: Mapping[str, Any], **arguments: Any) -> nn.Module:
    """What `split` makes, with other values: data decide nothing but these."""
    bound = inspect.signature(split).bind(model, **arguments)
    bound.apply_defaults()
    how = {name: value for name, value in bound.arguments.items() if name not in ("model", "calibrate")}
    return split_again(model, **how)


@made_again_by(_again)
def split(
    model: nn.Module,
    layers: str | int | Iterable[int] = "all",
    num_experts: int = 16,
    k: int | None = None,
    method: Method = "cluster",
    router: Any = "EMoERouter",
    *,
    shared: int = 0,
    expert_dim: int | None = None,
    scale: float | None = None,
    capacity: Any = None,
    losses: Mapping[str, Any] | None = None,
    calibrate: Calibrate | None = None,
    tokens: int = 4096,
    within: str = "",
    backend: str = "auto",
) -> nn.Module:
    """A copy of a dense model with the hidden units of some layers' MLPs shared out among the experts of `MoE`s.

    Experts that are all chosen with weight one give the dense model's outputs; k of E of them (a quarter by default)
    compute k/E of the MLP. Works on the models that `zoo.upcycle` works on; layers and within are the same, and the
    given model stays as it is. method says which units become one expert, E of F/E units each:

    "random": no unit in two experts (LLaMA-MoE, 2406.16554, whose best); "cluster": those with rows of W_in, of length
    one, of like direction, by balanced k-means (MoEfication, 2110.01786; EMoE, 2310.10908), of a gated MLP the rows of
    its gate, as these do; "coactivation": those that are active together on the data, by balanced k-means on each
    unit's activations (positive ones; of gated MLPs without their sign) over tokens, scaled to length one: MoEfication
    cuts a graph of co-activation counts with METIS, here it is one of cosines; "importance": MoEBERT's (2204.07675):
    the `shared` units of largest |w dL/dw| in every expert, the others dealt out in turn, until each has expert_dim
    (by default all; the authors' are 512 and 768 of 3072, E = 4, k = 1).

    router is a name, class, function or mapping as in `create_model`; k, capacity (a `Capacity`, its arguments or its
    factor) and losses are for gates that have such arguments, and token choice normalises its weights unless told
    otherwise. Made for this are `EMoERouter`, which needs no training (its keys are read from the experts),
    `MoEficationRouter`, trained here on the data, `LLaMAMoERouter`, and `MoEBERTRouter` or `HashRouter`;
    `SMoEDropoutRouter` is SMoE-Dropout (2303.01610).
    What experts give is multiplied by scale, which goes into their output weights so that published layouts hold it: by
    default E/k with `LLaMAMoERouter`, as in its paper, and 1 with others. Output biases, and shared units, are in every
    expert as the part that adds up to the whole over the experts of a token: a k-th where these count with weight one
    (EMoE's code), all where weights sum to one. `set_k` changes k, and that part with it.

    calibrate runs the model it is given over some batches and yields the loss of each, as in
    `lambda m: (m(input_ids=x, labels=x).loss for x in batches)`; coactivation, importance and `MoEficationRouter` need
    it, the first and the last looking at the first `tokens` tokens. It runs in eval mode, padding counts like any
    token. On the meta device it is not called. Draws follow torch.manual_seed.

    Dropout is treated, and dtype, device, training mode and requires_grad are kept, as in `zoo.upcycle`.
    `zoo.save_pretrained` writes split timm models, and split Llama, Mistral and Qwen3 in the layouts of Mixtral and
    Qwen3-MoE where these can express the gates: token choice with weights that sum to one (for Qwen3 others too), such
    as `LLaMAMoERouter` with network="linear" and noise=None.

    Raises ValueError naming what does not fit: no MLP, a layer that is sparse already, an activation that the experts
    do not have, an MLP that computes something else, sizes that do not divide, data that is needed and not given.
    """
    how = {"layers": layers, "num_experts": num_experts, "k": k, "method": method, "router": router, "shared": shared}
    how |= {"expert_dim": expert_dim, "tokens": tokens}
    for name in ("num_experts", "k", "shared", "expert_dim", "tokens"):
        how[name] = None if how[name] is None and name in ("k", "expert_dim") else whole(f"split: {name}", how[name])
    how |= {"scale": scale, "capacity": capacity, "losses": losses}
    return _split(model, calibrate, {**how, "within": within, "backend": backend})


def split_again(model: nn.Module, **how: Any) -> nn.Module:
    """A model with the tensors of one that `split` made, as an entry of its `split_how` says; their values are others.

    For readers of checkpoints, which have no data to decide by and fill all tensors.
    """
    return _split(model, None, how, decide=False)


@torch.no_grad()
def set_k(model: nn.Module, k: int) -> None:
    """Let each token of a split model meet k experts, in place: where they count with weight one biases stay whole.

    With all E the sum of the experts is the MLP, biases too: what can be put together to a dense one again (EMoE).
    Raises ValueError for gates that are no token choice, more experts than there are, and experts that share units.
    """
    every = [(name, module) for name, module in model.named_modules() if isinstance(module, MoE)]
    layers = [(name, moe) for name, moe in every if not isinstance(moe.experts, (LoRAExperts, MixLoRAExperts))]
    entries = getattr(model, "split_how", [])
    for name, moe in layers:
        if not isinstance(moe.router, TopKRouter) or not 1 <= k <= moe.router.num_experts:
            found = f"{type(moe.router).__name__} of {moe.router.num_experts} experts"
            raise ValueError(f"set_k: expected token choice that can choose {k} experts, {name} has a {found}")
    if any(how["shared"] for how in entries):
        raise ValueError("set_k: experts that share units have them in parts; split the model anew")
    biases: dict[int, tuple[Tensor, float]] = {}  # layers may share theirs
    for name, moe in layers:
        router: Any = moe.router
        for bias in _output_biases(name, moe) if router.unit_weights else ():
            biases[id(bias)] = bias, router.k / k
    for bias, factor in biases.values():
        bias.mul_(factor)
    for _, moe in layers:
        router = moe.router
        router.k = k
    for how in entries:
        how["k"], how["router"] = k, _with_k(how["router"], k)


def _output_biases(name: str, moe: MoE) -> list[Tensor]:
    """What the experts of a layer add to what they give, [E, D], in as many tensors as hold it."""
    experts: Any = moe.experts.base if isinstance(moe.experts, LoRAOfExperts) else moe.experts
    parts = (experts.old, experts.new) if isinstance(experts, GrownExperts) else (experts,)
    held = [part.held if isinstance(part, OffloadedExperts) else part for part in parts]
    found = [bias for part in held if (bias := part.down_proj_bias) is not None]
    if found and isinstance(experts, OffloadedExperts):
        raise ValueError(f"set_k: {name} has offloaded experts, whose biases stay where they are; set k before")
    return found


def _with_k(spec: Any, k: int) -> Any:
    """A gate's description with another k, where it names one."""
    if not isinstance(spec, Mapping):
        return spec
    spec = {name: _with_k(value, k) if name == "init_args" else value for name, value in spec.items()}
    return {**spec, "k": k} if "k" in spec else spec


def _split(model: Any, calibrate: Calibrate | None, how: dict[str, Any], decide: bool = True) -> nn.Module:
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    num_experts, method, shared = how["num_experts"], how["method"], how["shared"]
    if num_experts < 1 or how["tokens"] < 1:
        raise ValueError(f"split: num_experts={num_experts} and tokens={how['tokens']} must be at least 1")
    if method not in get_args(Method):
        raise ValueError(f"split: method must be one of {', '.join(get_args(Method))}, got {method!r}")
    if decide and method != "importance" and (shared or how["expert_dim"] is not None):
        raise ValueError(f'split: shared and expert_dim are for method="importance", got {method!r}')
    k = max(1, num_experts // 4) if how["k"] is None else how["k"]
    within = how["within"] or language_model(model)
    mlps, indices = _chosen(model, how["layers"], within)
    sizes = {mlp: _sizes(mlp, num_experts, shared, how["expert_dim"], decide) for mlp in mlps}
    given = gate_arguments(how["losses"], how["capacity"])
    routers = {}
    for mlp in mlps:
        make = gate_factory(how["router"], mlp.sizes[0], num_experts, k, {"normalize": True}, **given)
        routers[mlp] = _router(mlp, make)
    if not decide or mlps[0].down.weight.is_meta:
        cuts = {mlp: Cut(any_groups(mlp.sizes[1], num_experts, sizes[mlp])) for mlp in mlps}
    else:
        predicts = any(isinstance(router, MoEficationRouter) for router in routers.values())
        cuts = cut(model, sizes, num_experts, method, shared, predicts, calibrate, how["tokens"])
    found = {}
    for mlp in mlps:
        neurons, x = cuts.pop(mlp)
        found[mlp] = _moe(mlp, routers[mlp], neurons, shared, how["scale"], how["backend"])
        if x is not None and isinstance(router := routers[mlp], MoEficationRouter):
            fit_predictor(router, found[mlp].experts, x)
    warn_of_dropout(mlps, "split", stacklevel=4)
    # Modules with a replacement are not copied: memory for the dense ones twice is not needed.
    sparse: Any = copy.deepcopy(model, {id(mlp.module): moe for mlp, moe in found.items() if not mlp.inline})
    for mlp, moe in found.items():
        if mlp.inline:
            put_inline(sparse.get_submodule(mlp.name), mlp, moe)
    told = {**how, "layers": indices, "k": k, "within": within}
    sparse.split_how = [*getattr(sparse, "split_how", []), told]
    made_by("split", sparse)
    finish_transformers(sparse)
    return sparse


def _chosen(model: nn.Module, layers: Any, within: str) -> tuple[list[DenseMLP], list[int]]:
    """The MLPs to cut, and their numbers among the blocks."""
    blocks = list(blocks_with_mlps(model, within))
    if not blocks:
        place = f" under {within!r}" if within else ""
        raise ValueError(f"split: {type(model).__name__} has no blocks with an MLP of known linear layers{place}")
    indices = list(moe_layers(layers, len(blocks)))
    for name, module in (blocks[i] for i in indices):
        if isinstance(module, MoE) or hasattr(module, "experts"):
            raise ValueError(f"split: {name} is a mixture of experts already")
    mlps = [recognise(*blocks[i]) for i in indices]
    for mlp in mlps:
        mlp.check()
    return mlps, indices


def _sizes(mlp: DenseMLP, num_experts: int, shared: int, expert_dim: int | None, decide: bool) -> int:
    """Hidden units an expert."""
    if expert_dim is not None and not decide:
        return expert_dim  # of experts that were pruned or grown since
    hidden = mlp.sizes[1]
    if not 0 <= shared < hidden:
        raise ValueError(
            f"split: {mlp.name} has {hidden} hidden units, shared={shared} must be fewer, and not negative"
        )
    rest = hidden - shared
    if expert_dim is None:
        if rest % num_experts:
            told = f" besides the shared={shared}" if shared else ""
            raise ValueError(
                f"split: {mlp.name} has {rest} hidden units{told}, which num_experts={num_experts} do not cut"
            )
        return shared + rest // num_experts
    if not shared < expert_dim <= shared + rest // num_experts:
        most = shared + rest // num_experts
        raise ValueError(f"split: {mlp.name}: expert_dim={expert_dim} must be above shared={shared} and at most {most}")
    return expert_dim


def _router(mlp: DenseMLP, make: Callable[[], Router]) -> Router:
    like = mlp.down.weight
    with torch.device(like.device):
        router = make()
    for parameter in router.parameters():
        parameter.data = parameter.data.to(like.dtype)
    return router


@torch.no_grad()
def _moe(mlp: DenseMLP, router: Any, neurons: Tensor, shared: int, scale: float | None, backend: str) -> MoE:
    """Experts of the given hidden units [E, n], of which the first `shared` are in every expert."""
    num_experts, width = neurons.shape
    if scale is None:
        scale = num_experts / router.k if isinstance(router, LLaMAMoERouter) else 1.0
    like = mlp.down.weight
    with torch.device("meta"):
        sizes = (num_experts, mlp.sizes[0], width)
        experts = Experts(*sizes, mlp.activation, mlp.has_bias, backend, mlp.dropout)
    experts.to(like.dtype).to_empty(device=like.device)
    # What every expert has adds up to the whole over those that a token meets.
    part = 1 / getattr(router, "k", 1) if router.unit_weights else 1.0
    factor = torch.full((width,), scale, dtype=torch.float32, device=like.device)
    factor[:shared] = part
    neurons = neurons.to(like.device)
    for name, tensor in mlp.weights().items():
        if name == "b_out":
            value = (tensor * part).expand(num_experts, -1)
        elif name == "w_out":
            value = tensor.T[neurons].transpose(1, 2)
            if scale != 1 or shared:
                value = value * factor  # in float32 at least
        else:
            sides = tensor.chunk(2) if experts.gated else (tensor,)
            value = torch.cat([side[neurons] for side in sides], dim=1)
        parameter = expert_parameter(experts, name)
        parameter.copy_(value)
        parameter.requires_grad_(like.requires_grad)
    if isinstance(router, EMoERouter):
        router.follow(experts)
    moe = MoE(router, experts).train(mlp.module.training)
    stand_alike(mlp.module, moe)
    return moe
