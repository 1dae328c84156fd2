"""MoE-LLaVA (2401.15947): a LLaVA whose language model gets experts, copies of its MLPs, in every other layer.

    dense = zoo.from_pretrained("a LLaVA's folder")
    model = sparse(dense)              # 4 experts, 2 a token, in layers 0, 2, 4, ...
    stage(model, 3)                    # what the third stage of training trains

Stages I and II train the dense model, the projector alone and then all but the vision tower; stage III the experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..nearest import unknown

if TYPE_CHECKING:
    from torch import nn

# What the authors' configuration says under "moe" where nothing else is asked for. Capacity 1.5 is that of their
# scripts, 2 in evaluation; every other layer, the first among them, is their "sparse".
MOE: dict[str, Any] = {
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_mode": "sparse",
    "capacity_factor": 1.5,
    "eval_capacity_factor": 2.0,
    "min_capacity": 0,
    "router_aux_loss_coef": 0.01,
}


def layers_of(mode: str, depth: int) -> list[int]:
    """Which of `depth` layers have experts in one of the authors' modes; raises ValueError for another."""
    chosen = {
        "sparse": range(0, depth, 2),
        "dense": range(depth),
        "first_half": range(depth // 2),
        "second_half": range(depth // 2, depth),
    }
    if mode not in chosen:
        raise unknown("moe_mode of MoE-LLaVA", mode, chosen)
    return list(chosen[mode])


def sparse(
    model: nn.Module,
    *,
    router: Any = None,
    losses: Mapping[str, Any] | None = None,
    capacity: Any = None,
    backend: str = "auto",
    **moe: Any,
) -> nn.Module:
    """A copy of a dense vision-language model with experts in its language model; `moe` changes what `MOE` says.

    moe_layers_idx gives layers in place of a mode. Experts being copies of the MLP, the model computes what it did, but
    for tokens that capacity drops. router, losses and capacity, as in `zoo.upcycle`, take the place of DeepSpeed's
    gate. Raises ValueError for an unknown option, and as `zoo.upcycle`.
    """
    from ..convert import upcycle
    from ..pretrained.context import decoder_of
    from ..pretrained.moe_llava import deepspeed_gate

    for option in moe:
        if option not in {*MOE, "moe_layers_idx"}:
            raise unknown("option of MoE-LLaVA", option, {*MOE, "moe_layers_idx"})
    given = {**MOE, **moe}
    layers = given.get("moe_layers_idx") or layers_of(given["moe_mode"], len(decoder_of(model).layers))
    k = given["top_k_experts"]
    own = {name: value for name, value in (("losses", losses), ("capacity", capacity)) if value is not None}
    spec = router if router is not None else {**deepspeed_gate(k, given), **own}
    extra: dict[str, Any] = own if router is not None else {}
    return upcycle(model, layers, given["num_experts"], spec, k=k, backend=backend, **extra)


def with_lora_experts(
    model: nn.Module,
    layers: str | int | Iterable[int] = "all",
    num_experts: int = 3,
    rank: int = 32,
    alpha: float = 64.0,
    losses: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A copy with LLaVA-MoLE's experts (2401.16160) beside MLPs of the language model: LoRAs, of which a token has one.

    Only experts and gates of these layers are trained, everything else is frozen; at first the model computes what it
    did. `layers` are those of `zoo.pretrained.placement.moe_layers`; the default loss is the paper's, Switch's with
    weight 0.01. Raises ValueError for a model without MLPs, and for layers that are sparse already.
    """
    import copy

    import torch

    from ..convert.dense_mlps import blocks_with_mlps
    from ..moe import LoRAExperts, MoE
    from ..moe.routers import TopKRouter
    from ..pretrained.context import decoder_of, pass_context
    from ..pretrained.placement import moe_layers

    made = copy.deepcopy(model).requires_grad_(False)
    decoder = decoder_of(made)
    blocks = list(blocks_with_mlps(decoder))
    if not blocks:
        raise ValueError(f"with_lora_experts: {type(decoder).__name__} has no MLPs that are known")
    for name, mlp in (blocks[i] for i in moe_layers(layers, len(blocks))):
        if isinstance(mlp, MoE) or hasattr(mlp, "experts"):
            raise ValueError(f"with_lora_experts: {name} is a mixture of experts already")
        like = next(mlp.parameters())
        dim = decoder.config.hidden_size
        with torch.device(like.device):
            router = TopKRouter(dim, num_experts, 1, normalize=True, losses=losses or {"switch": 0.01})
            experts: Any = LoRAExperts(num_experts, dim, rank, alpha).to(like.dtype)
            moe = MoE(router, experts, shared=mlp)
        parent, _, place = name.rpartition(".")
        setattr(decoder.get_submodule(parent), place, moe.train(mlp.training))
    pass_context(made)
    return made


def stage(model: nn.Module, number: int) -> nn.Module:
    """Turn on the gradients of exactly what a stage of MoE-LLaVA's training trains (2401.15947, section 3.3).

    1: the projector. 2: all but the vision tower. 3: the MLPs of the language model and the gates, experts and the
    dense MLPs between them alike, as the authors' `--train_modules` says. Returns the model.
    Raises ValueError for another stage, for the third of a model without experts, and for a model without a projector
    or a vision tower.
    """
    from ..convert.dense_mlps import blocks_with_mlps
    from ..moe import MoE
    from ..pretrained.context import decoder_of

    if number not in (1, 2, 3):
        raise ValueError(f"MoE-LLaVA has the training stages 1, 2 and 3, got {number!r}")
    decoder = decoder_of(model)
    projector, tower = (_part(model, names) for names in (("projector", "connector"), ("vision_tower", "vision_model")))
    model.requires_grad_(number == 2)
    if number == 1:
        projector.requires_grad_(True)
    elif number == 2:
        tower.requires_grad_(False)
    else:
        blocks = [module for _, module in blocks_with_mlps(decoder)]
        if not any(isinstance(block, MoE) for block in blocks):
            raise ValueError("MoE-LLaVA: stage 3 trains experts, and the model has none; make it `sparse` first")
        for block in blocks:
            block.requires_grad_(True)
    return model


def _part(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    for path, module in model.named_modules():
        if any(path.rpartition(".")[2].endswith(name) for name in names):
            return module
    raise ValueError(f"MoE-LLaVA: {type(model).__name__} has no module called {' or '.join(names)}")
