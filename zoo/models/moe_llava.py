"""MoE-LLaVA (2401.15947): a LLaVA whose language model gets experts, copies of its MLPs, in every other layer.

    dense = zoo.from_pretrained("a LLaVA's folder")
    model = sparse(dense)              # 4 experts, 2 a token, in layers 0, 2, 4, ...
    stage(model, 3)                    # what the third stage of training trains

Stages I and II train the dense model, the projector alone and then all but the vision tower; stage III the experts.
"""

from __future__ import annotations

from collections.abc import Mapping
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
