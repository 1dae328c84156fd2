"""Mixtures of parameter-efficient experts beside the frozen weights of a trained model."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
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
    QuantisedExperts,
    ScaledLinear,
)
from ..pretrained.sparse_blocks import in_pair, stand_alike
from ..pretrained.stand_in import stand_in
from . import adapter_prefix
from .adapter_build import Place, before_tokens, beside_linears, beside_mlps
from .adapter_context import tell
from .adapter_kinds import UNUSED, kind_of
from .adapter_prompts import attach
from .adapter_unipelt import unipelt
from .arguments import whole, whole_each
from .upcycling import language_model

AROUND = (
    AdaMix,
    AdaptedLinear,
    FollowedLinear,
    GatedPrefix,
    LoRALinear,
    LoRAOfExperts,
    PromptMixture,
    ScaledLinear,
)


def adapt(
    model: nn.Module,
    kind: str | None = None,
    *,
    targets: str | Sequence[str] | None = None,
    num_experts: int | Sequence[int] | None = None,
    rank: int | Mapping[str, int] | None = None,
    alpha: float | None = None,
    router: Any = None,
    losses: Mapping[str, Any] | None = None,
    contrastive: float | Mapping[str, Any] | None = None,
    dropout: float | None = None,
    shared: str | None = None,
    layers: str | int | Iterable[int] = "all",
    within: str = "",
    dtype: torch.dtype | str | None = None,
    source: str | os.PathLike[str] | None = None,
    share: bool = False,
    unfreeze: str | Sequence[str] = (),
) -> nn.Module:
    """A copy of a model whose weights are frozen, with parameter-efficient experts beside them: all that is trained.

    With `share` frozen weights are not copied: both models hold the same tensors, quantised experts too, so that a
    second one, or a tenth, costs what its adapters do. Who then trains these weights, in either, changes both; what
    `adapt` itself does, such as freezing, changes the new one alone.

    kind is a row of `zoo.convert.adapter_kinds.KINDS`, which says what each paper takes by default:
        LoRA                      one, without a gate
        MoLoRA, LoRAMoE           beside linear layers, all experts by a dense gate
        MoELoRA, MoLA, SiRA       the same, a few experts a token
        Omni-SMoLA                mixtures of a sequence's tokens, one an expert (Soft MoE); not for causal models. A
                                  set for one modality is a call of its own: router={"only": 1}, and "modality" is told
        MOELoRA, MoCLE            by a label: model(..., moe_context={"task": ..}), or "cluster"
        MoR1E                     pairs of rank one, by the token and by how near an instruction is to clusters: it is
                                  told "intuition"; rank is how many rows, num_experts of rows times columns
        MoV                       IA3's vectors, mixed by a dense gate
        MixLoRA                   experts that share an MLP; adapt attention with a second call
        LLaVA-MoLE                beside whole MLPs or mixtures of experts, one a token
        AdaMix                    an adapter after each of these, a random one each step, their mean afterwards
        UniPELT                   LoRA beside queries and values, prefixes in transformers' attention, adapters behind
                                  MLPs, each with a gate a sequence; not for causal models. rank may be of each, as
                                  {"lora": 8, "prefix": 10, "adapter": 48}, zero for none
        SMoP                      one of a few soft prompts before a language model's tokens; rank is their length
        MeteoRA, MoLE             trained LoRAs, which stay as they are, and gates: `zoo.compose_adapters`

    Works on timm's and transformers' models, beside every `nn.Linear` and Conv1D, quantised ones too. In a sparse model
    they stand beside its attention, LLaVA-MoLE and AdaMix beside its `MoE`s, and LoRA with the targets gate, up and
    down inside them, a pair for each expert (`LoRAOfExperts`); whatever numbers its experts are in: as QLoRA does,
    `zoo.from_pretrained(folder, quantise="mxfp4")` reads it in few bits. Gates of the model itself stay as they are,
    their selection biases too. At first the model computes what it did, but with prompts and prefixes. targets are
    parts of a block (query, key, value, output, gate, up, down) or names as "q_proj"; a fused projection has experts
    for each part, or, named by itself, for the whole. num_experts may be several numbers, for equal stretches of the
    blocks from the first to the last (MoLA). alpha / rank scales what experts of `rank` add. router is as in
    `create_model`; a mapping without "name" changes options of the kind's own gate: {"k": 1}, {"num_tasks": 8}. losses
    go to the gates, contrastive to `AdaptedLinear`, shared to `AdaMix`; `zoo.moe.record` collects them. dropout acts on
    what experts read. layers are those of `moe_layers`, counted over the blocks that have a target, of the submodule
    `within` or of the language model in a vision-language model. New parameters take the weights' device and, without
    dtype, their type: give dtype="float32" for adapters that learn beside bfloat16.

    `unfreeze` names modules or parameters of the model that are trained too, as "head" for classes of another kind;
    they are never shared. What an adapted model trains already stays trained when it is adapted again.

    With `source`, a folder that `zoo.save_pretrained` wrote of an adapted model, or a LoRA in peft's layout
    (`zoo.convert.adapter_peft.read`), its adapters are read and nothing else is given; as
    `zoo.from_pretrained(source, base=model)`, but in the model's training mode.

    Raises ValueError naming what does not fit: an unknown kind, no such target, an option that the kind does not use.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    given = {
        "targets": targets,
        "num_experts": num_experts,
        "rank": rank,
        "alpha": alpha,
        "router": router,
        "losses": losses,
        "contrastive": contrastive,
        "dropout": dropout,
        "shared": shared,
        "dtype": dtype,
    }
    if source is not None:
        from .adapter_folder import read_onto

        if kind is not None or unfreeze or any(value is not None for value in given.values()):
            raise ValueError("adapt: a source says all itself; give nothing beside it")
        return read_onto(model, source, share=share)
    if kind is None:
        raise ValueError("adapt: give a kind, such as 'MixLoRA', or a source")
    row = kind_of(kind)
    for name in UNUSED[row.level]:
        if given[name] is not None:
            raise ValueError(f"adapt: {kind} has no use for {name}, got {given[name]!r}")
    for name, check in (("num_experts", whole_each), ("rank", whole)):
        if given[name] is not None and not (row.level == "unipelt" and isinstance(given[name], Mapping)):
            check(f"adapt: {name}", given[name])
    how = {"kind": kind, **given, "layers": layers, "within": within or language_model(model)}
    if unfreeze:
        how["unfreeze"] = [unfreeze] if isinstance(unfreeze, str) else list(unfreeze)
    make = {
        "mlp": beside_mlps,
        "beside": beside_mlps,
        "adapter": beside_mlps,
        "prompts": before_tokens,
        "unipelt": unipelt,
    }
    places = make.get(row.level, beside_linears)(model, row, how)
    return _place(model, places, how, share)


def _place(model: nn.Module, places: list[Place], how: dict[str, Any], share: bool) -> nn.Module:
    """A frozen copy of the model with adapters in their places."""
    learns = _learns(model, how.get("unfreeze", ()))
    made: Any = copy.deepcopy(model, _shared(model, learns) if share else None)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(name in learns)
    for module in made.modules():  # its own gates are frozen too
        if base_of(module) is None and hasattr(getattr(module, "router", None), "bias_update_rate"):
            module.router.bias_update_rate = 0.0
    told: dict[str, list[nn.Module]] = {}
    for place in places:
        parent, _, leaf = place.name.rpartition(".")
        base = made.get_submodule(place.name)
        if isinstance(place.adapter, PromptMixture):
            attach(base, place.adapter.train(base.training))
            continue
        if isinstance(place.adapter, GatedPrefix):
            adapter_prefix.attach(base, place.adapter.train(base.training))
            told.setdefault(place.block, []).append(place.adapter)
            continue
        owner, _, attribute = place.base.rpartition(".")
        setattr(place.adapter.get_submodule(owner), attribute, base)
        setattr(made.get_submodule(parent), leaf, place.adapter)
        stand_alike(base, place.adapter)
        for key, hook in list(base._forward_hooks.items()):
            if hook is in_pair:  # the block gets what the adapter makes of one result
                del base._forward_hooks[key]
        inside = set(base.modules())
        for module in place.adapter.modules():
            if module not in inside:  # parts of the model may be in modes of their own
                module.training = base.training
        if hasattr(place.adapter, "router"):
            told.setdefault(place.block, []).append(place.adapter)
    tell(made, told)
    made.adapted = [*getattr(model, "adapted", []), how]
    if hasattr(made, "config") and hasattr(made, "save_pretrained") and "save_pretrained" not in vars(made):
        stand_in(made)
        made._saves_adapters = True
    return made


def _learns(model: nn.Module, unfreeze: Sequence[str]) -> set[str]:
    """Names of the parameters that are trained beside new adapters; raises ValueError for one that is not there."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    learns = {n for n, p in model.named_parameters() if p.requires_grad and getattr(model, "adapted", None)}
    for wanted in unfreeze:
        # Tied parameters have several names.
        every = model.named_parameters(remove_duplicate=False)
        found = {names[id(p)] for n, p in every if f"{n}.".startswith(f"{wanted}.") and p.is_floating_point()}
        if not found:
            there = ", ".join(name for name, _ in model.named_children())
            raise ValueError(f"adapt: unfreeze: {type(model).__name__} has no parameters in {wanted!r}; it has {there}")
        learns |= found
    return learns


def _shared(model: nn.Module, learns: set[str]) -> dict[int, Any]:
    """What a deep copy takes for weights that do not learn: parameters of its own, on the same memory.

    Buffers that training may change, such as running statistics, are not among them.
    """
    own = learns | adapter_state(model).keys()
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for n, p in model.named_parameters() if n not in own
    }
    for module in model.modules():
        if isinstance(module, QuantisedExperts):
            memo.update({id(buffer): buffer.detach() for buffer in module.buffers()})
    return memo


def base_of(module: nn.Module) -> str | None:
    """Where an adapter has what it stands beside, None for a module that is no adapter."""
    if isinstance(module, AROUND):
        return "base"  # prompts and prefixes have none
    if isinstance(module, MoE) and isinstance(module.experts, MixLoRAExperts):
        return "experts.base"
    if isinstance(module, MoE) and isinstance(module.experts, LoRAExperts) and module.shared is not None:
        return "shared"
    return None


def adapter_state(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of a model's adapters by their names in the model; those of `state` where it is given."""
    state = model.state_dict() if state is None else state
    found = {}
    for name, module in model.named_modules():
        if (base := base_of(module)) is not None:
            own, beside = f"{name}." if name else "", f"{name}.{base}." if name else f"{base}."
            found.update({k: v for k, v in state.items() if k.startswith(own) and not k.startswith(beside)})
    return found


def base_state(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors that adapters stand beside, by the names they have without; those of `state` where it is given."""
    state = model.state_dict() if state is None else state
    adapters, found = adapter_state(model, state), {}
    renamed = [(f"{n}.{b}.", f"{n}.") for n, m in model.named_modules() if (b := base_of(m)) is not None]
    for name, tensor in state.items():
        if name not in adapters:
            for long, short in reversed(renamed):  # innermost first
                name = name.replace(long, short, 1) if name.startswith(long) else name
            found[name] = tensor
    return found
