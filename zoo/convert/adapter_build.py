"""From a row of `adapter_kinds` to the adapters of a model, each for its place."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..gates import gate_factory
from ..moe import (
    AdaMix,
    AdaptedLinear,
    ComposedLinear,
    LoRAExperts,
    LoRALinear,
    LoRAOfExperts,
    MixLoRAExperts,
    MoE,
    PromptMixture,
    RankOneExperts,
    Router,
    ScaledLinear,
)
from ..moe.adapted import features
from ..pretrained.language import resolve_dtype
from ..pretrained.placement import moe_layers
from .adapter_kinds import ATTENTION, Kind, experts_in, gate_of, is_own
from .adapter_prompts import decoder_name
from .adapter_targets import MLP, Site, block_of, find
from .dense_mlps import DenseMLP, blocks_with_mlps, recognise


@dataclass
class Place:
    """An adapter for the module of that name, which it is to have under `base`; in the block of that name."""

    name: str
    block: str
    base: str
    adapter: nn.Module


def beside_linears(model: nn.Module, kind: Kind, how: dict[str, Any]) -> list[Place]:
    """Adapters for single linear layers; writes the layers that were chosen into `how`."""
    targets = how["targets"]
    targets = [targets] if isinstance(targets, str) else list(kind.targets if targets is None else targets)
    if not targets:
        raise ValueError(f"adapt: {how['kind']} has no targets of its own; give some")
    try:
        sites = find(model, targets, how["within"], experts=kind.level == "one")
    except ValueError:
        if how["targets"] is not None or set(targets) & set(ATTENTION):
            raise
        sites = find(model, ATTENTION, how["within"])  # a sparse model has no MLPs to stand beside
    blocks = list(dict.fromkeys(site.block for site in sites))
    how["layers"] = list(moe_layers(how["layers"], len(blocks)))
    places = []
    for site in sites:
        at = blocks.index(site.block)
        if at in how["layers"]:
            count = experts_in(_number(kind, how), at, len(blocks))
            adapter = _inside_experts(model, site, kind, how) if site.experts else _beside(site, kind, how, count)
            places.append(Place(site.name, site.block, "base", adapter))
    return places


def _inside_experts(model: nn.Module, site: Site, kind: Kind, how: dict[str, Any]) -> nn.Module:
    experts: Any = site.linear
    # Experts in few bits have no parameters.
    like: Any = next(itertools.chain(experts.parameters(), model.get_submodule(site.block).parameters()))
    maker = Maker(kind, how, like)
    options = (maker.rank, maker.alpha, site.parts, maker.dropout)
    return maker.place(lambda: LoRAOfExperts(experts, *options), ("lora",))


def _beside(site: Site, kind: Kind, how: dict[str, Any], count: int) -> nn.Module:
    dim, out = features(site.linear)
    out = out if site.columns is None else site.columns[1] - site.columns[0]
    weight: Any = site.linear.weight
    maker = Maker(kind, how, weight)
    if kind.level == "vectors":
        if len(site.parts) > 1:
            raise ValueError(
                f"adapt: {site.name} holds {', '.join(site.parts)} in no known order; {how['kind']} scales single parts"
            )
        scale = "input" if site.parts == ("down",) else "output"
        router = maker.gate(dim if scale == "input" else out, count)
        return maker.place(lambda: ScaledLinear(site.linear, router, scale, site.columns), ("vectors",))
    lora = maker.lora(count, dim, out).requires_grad_(not kind.frozen)
    if kind.level == "one":
        return LoRALinear(site.linear, lora, site.columns)
    contrastive = kind.contrastive if how["contrastive"] is None else how["contrastive"]
    layer = ComposedLinear if kind.level == "outputs" else AdaptedLinear
    return layer(site.linear, maker.gate(layer.gate_dim(lora), count), lora, site.columns, contrastive)


def beside_mlps(model: nn.Module, kind: Kind, how: dict[str, Any]) -> list[Place]:
    """Adapters for whole MLPs; writes the layers that were chosen into `how`."""
    blocks = list(blocks_with_mlps(model, how["within"]))
    if not blocks:
        raise ValueError(f"adapt: {type(model).__name__} has no blocks with an MLP of known linear layers")
    how["layers"] = list(moe_layers(how["layers"], len(blocks)))
    places, rates = [], set()
    for at in how["layers"]:
        name, module = blocks[at]
        block, count = block_of(model, name) or name, experts_in(_number(kind, how), at, len(blocks))
        if isinstance(module, MoE) and kind.level in ("adapter", "beside"):
            like: Any = next(model.get_submodule(block).parameters())  # experts in few bits have none
            places.append(
                Place(name, block, *_around(module, module.router.dim, kind, how, Maker(kind, how, like), count))
            )
            continue
        if isinstance(module, MoE) or hasattr(module, "experts"):
            raise ValueError(
                f"adapt: {name} is a mixture of experts already, and {how['kind']} needs a dense MLP; choose other "
                "layers, or a kind that stands beside attention"
            )
        mlp = _recognise(name, module, kind.level == "mlp")
        maker = Maker(kind, how, mlp.down.weight)
        if kind.level == "mlp":
            places.append(Place(name, block, "experts.base", _inside(mlp, kind, how, maker, count)))
            rates |= {rate for rate in mlp.dropout_rates if rate}
        else:
            places.append(Place(name, block, *_around(mlp.module, mlp.sizes[0], kind, how, maker, count)))
    if rates:
        shown = ", ".join(f"{rate:g}" for rate in sorted(rates))
        warnings.warn(f"adapt: dropout inside the MLPs ({shown}) is left out", stacklevel=3)
    return places


def _around(
    module: nn.Module, dim: int, kind: Kind, how: dict[str, Any], maker: Maker, count: int
) -> tuple[str, nn.Module]:
    """Where an adapter will have an MLP or a `MoE` as a whole, and the adapter."""
    if kind.level == "adapter":
        rank, shared = maker.rank, how["shared"]
        names = ("down", "down_bias", "up", "up_bias")
        return "base", maker.place(lambda: AdaMix(module, count, dim, rank, shared), names)
    lora: Any = maker.lora(count, dim, dim)
    return "shared", MoE(maker.gate(dim, count), lora, shared=module)


def _inside(mlp: DenseMLP, kind: Kind, how: dict[str, Any], maker: Maker, count: int) -> MoE:
    """Experts that share an MLP."""
    targets = how["targets"]
    named = [targets] if isinstance(targets, str) else list(kind.targets if targets is None else targets)
    parts = dict(zip(MLP, mlp.layout))
    parts["gate"] = parts["gate"] or mlp.layout[1]  # one matrix has both
    chosen = tuple(name for name in mlp.layout if name and {name, *(p for p in MLP if parts[p] == name)} & set(named))
    if unknown := [name for name in named if name not in MLP and name not in mlp.layout]:
        there = ", ".join(filter(None, mlp.layout))
        raise ValueError(f"adapt: no linear layer {unknown[0]!r} in {mlp.name}; it has {there}")
    options = (maker.rank, maker.alpha, maker.dropout, mlp.gate_last, chosen)
    experts: Any = maker.place(
        lambda: MixLoRAExperts(mlp.module, mlp.layout, mlp.activation, count, *options), ("lora",)
    )
    return MoE(maker.gate(mlp.sizes[0], count), experts)


def before_tokens(model: nn.Module, kind: Kind, how: dict[str, Any]) -> list[Place]:
    """Soft prompts for a language model's decoder."""
    number = _number(kind, how)
    if not isinstance(number, int):
        raise ValueError(f"adapt: {how['kind']} has one number of prompts, got num_experts={number}")
    name = decoder_name(model)
    weight: Any = model.get_input_embeddings().weight  # type: ignore[operator]
    maker = Maker(kind, how, weight)
    with torch.device(maker.device):
        prompts = PromptMixture(maker.gate(weight.shape[1], number), maker.rank).to(maker.dtype)
    return [Place(name, name, "", prompts)]


class Maker:
    """Makes gates and experts of one kind, in the type and on the device of the weight `like`."""

    def __init__(self, kind: Kind, how: Mapping[str, Any], like: Tensor) -> None:
        self.kind, self.how = kind, how
        self.rank = kind.rank if how["rank"] is None else how["rank"]
        self.alpha = kind.alpha if how["alpha"] is None else how["alpha"]
        self.dropout = how["dropout"] or 0.0
        wanted = resolve_dtype(how["dtype"])
        self.dtype = wanted or (like.dtype if like.is_floating_point() else torch.float32)
        self.device = like.device

    def gate(self, dim: int, count: int) -> Router:
        """The kind's gate, or the one that was asked for, of `count` experts."""
        how, kind = self.how, self.kind
        spec = gate_of(kind, how["kind"], how["router"], count)
        given = {} if how["losses"] is None else {"losses": how["losses"]}
        defaults = {"losses": kind.losses} if is_own(how["router"]) else {}  # another gate may have no use for them
        with torch.device(self.device):
            router = gate_factory(spec, dim, count, defaults=defaults, **given)()
        weight = getattr(router, "weight", None)
        if kind.router_std is not None and is_own(how["router"]) and isinstance(weight, Tensor):
            nn.init.normal_(weight, 0.0, kind.router_std)
        return router.to(self.dtype)

    def lora(self, count: int, dim: int, out: int) -> LoRAExperts:
        """Experts of low rank."""
        with torch.device(self.device):
            if self.kind.level == "pairs":
                return RankOneExperts(count, dim, self.rank, out, self.dropout).to(self.dtype)
            made = LoRAExperts(count, dim, self.rank, self.alpha, out, self.dropout, self.kind.init_std)
        return made.to(self.dtype)

    def place(self, make: Any, own: tuple[str, ...]) -> nn.Module:
        """What `make` makes around a module that is there already: only its `own` parts change their type."""
        with torch.device(self.device):
            made = make()
        for name in own:
            part = getattr(made, name)
            if isinstance(part, nn.Parameter):
                setattr(made, name, nn.Parameter(part.detach().to(self.dtype)))
            else:
                part.to(self.dtype)
        return made


def _number(kind: Kind, how: Mapping[str, Any]) -> Any:
    return kind.num_experts if how["num_experts"] is None else how["num_experts"]


def _recognise(name: str, module: nn.Module, exactly: bool) -> DenseMLP:
    mlp = recognise(name, module)
    if exactly:
        mlp.check()
    if mlp.inline:
        raise ValueError(
            f"adapt: the MLP of {name} is part of the layer itself; stand beside its linear layers with another kind"
        )
    return mlp
