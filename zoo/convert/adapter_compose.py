"""Trained LoRAs, which stay as they are, as the experts of learnt gates."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..moe import AdaptedLinear, LoRALinear, LoRAOfExperts
from ..moe.adapted import Columns
from ..nearest import unknown
from . import adapter_peft
from .adapter_folder import is_adapted, read_onto
from .adapter_kinds import KINDS
from .adapter_targets import plain_name
from .adapting import adapt

# A linear layer and the outputs meant, to A [r, D] and alpha / r * B [O, r].
LoRA = dict[tuple[str, Columns | None], tuple[Tensor, Tensor]]


@torch.no_grad()
def compose_adapters(
    model: nn.Module,
    sources: Sequence[str | os.PathLike[str]],
    kind: str = "MeteoRA",
    *,
    router: Any = None,
    losses: Mapping[str, Any] | None = None,
    share: bool = False,
) -> nn.Module:
    """A copy of a model with trained LoRAs as the experts of a gate for each linear layer, which alone learns.

    sources are folders of LoRAs trained beside this model: ours of kind LoRA, or peft's (adapter_config.json and
    adapter_model.safetensors; linear layers alone, alpha / r or alpha / sqrt(r)). Expert e is source e, with rank and
    alpha of its own; where it has no LoRA for a layer that another has, it adds nothing. kind is
        MeteoRA (2405.13053)  the top 2 of a softmax of the token, renormalised; the gate starts from N(0, 1), as in the
                              authors' code
        MoLE (2404.13628)     all, by what they make of the token: `zoo.moe.routers.MoLERouter`, with the paper's loss
    router, losses and share as in `adapt`.

    Raises ValueError for another kind, a folder that is neither, a peft option that changes more than linear layers,
    and a layer that the model does not have.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    if kind not in KINDS or not KINDS[kind].frozen:
        raise unknown("kind of compose_adapters", kind, [name for name, row in KINDS.items() if row.frozen])
    if not sources:
        raise ValueError("compose_adapters: expected at least one folder of a LoRA")
    read, targets = [], []
    for source in sources:
        lora, named = _read(model, Path(source).expanduser())
        read.append(lora)
        targets.append(named)
    keys = list(dict.fromkeys(key for lora in read for key in lora))
    if all(columns is None for _, columns in keys):
        chosen: Any = [name for name, _ in keys]
    elif any(named != targets[0] for named in targets):
        raise ValueError(f"compose_adapters: parts of fused layers must be the same in all sources, got {targets}")
    else:
        chosen = targets[0]
    rank = max(a.shape[0] for lora in read for a, _ in lora.values())
    options: Any = {"rank": rank, "alpha": rank, "router": router, "losses": losses, "share": share}
    made: Any = adapt(model, kind, targets=chosen, num_experts=len(read), **options)
    for name, module in made.named_modules():
        if not isinstance(module, AdaptedLinear):
            continue
        key = (plain_name(name), module.columns)
        module.lora.a.zero_()
        for e, lora in enumerate(read):
            if key in lora:
                a, b = lora[key]  # of a lower rank: rows and columns of zeros change nothing
                module.lora.a[e].copy_(F.pad(a, (0, 0, 0, rank - a.shape[0])))
                module.lora.b[e].copy_(F.pad(b, (0, rank - b.shape[1])))
    return made


def _read(model: nn.Module, folder: Path) -> tuple[LoRA, list[str] | None]:
    """A folder's LoRA, and the targets it was made with where it is ours."""
    if not is_adapted(folder):
        raise ValueError(f"compose_adapters: {folder} has neither {adapter_peft.CONFIG} nor adapters of ours")
    if adapter_peft.is_peft(folder):
        pairs, saved = adapter_peft.read(model, folder)
        if saved:
            raise ValueError(
                f"compose_adapters: {folder} has more than LoRAs, {next(iter(saved))}; expected them alone"
            )
        if inside := next((name for name, part, _ in pairs if part), None):
            raise ValueError(f"compose_adapters: {folder} has LoRAs inside experts, {inside}; expected linear layers")
        return {(name, None): pair for (name, _, _), pair in pairs.items()}, None
    made: Any = read_onto(model, folder, share=True)
    if [how["kind"] for how in made.adapted] != ["LoRA"]:
        raise ValueError(f"compose_adapters: {folder} holds {made.adapted[0]['kind']}, expected one LoRA")
    found = {}
    for name, module in made.named_modules():
        if isinstance(module, LoRAOfExperts):
            raise ValueError(f"compose_adapters: {folder} has LoRAs inside experts, {name}; expected linear layers")
        if isinstance(module, LoRALinear):
            scale = module.lora.alpha / module.lora.rank
            found[plain_name(name), module.columns] = module.lora.a[0].detach(), scale * module.lora.b[0].detach()
    return found, list(made.adapted[0]["targets"] or KINDS["LoRA"].targets)
