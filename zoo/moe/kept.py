"""Some of a layer's experts: which tensors have a row an expert, and what else depends on how many there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .experts import Experts
from .grown import no_stack
from .layer import MoE
from .routers import GShardRouter, PrototypeRouter, Router

ROWS = (
    "weight",
    "bias",
    "noise_weight",
    "selection_bias",
    "expert_scale",
)  # what gates call a tensor with a row an expert
COUNTS = ("k", "k_min", "k_max", "eval_k")


def rows_of(name: str, moe: MoE) -> dict[str, Tensor]:
    """Parameters and buffers of a layer with a row an expert, [E, ...], by their names in it.

    Raises ValueError naming the layer for experts or a gate that one cannot take rows of: a hash table, a network.
    """
    if type(moe.experts) is not Experts:
        raise ValueError(no_stack(name, moe.experts))
    router: nn.Module = moe.router
    found: dict[str, Tensor] = {f"experts.{n}": parameter for n, parameter in moe.experts.named_parameters()}
    tensors = [*router.named_parameters(), *router.named_buffers()]
    for inner, tensor in tensors:
        if inner in ROWS and tensor.shape[:1] == (moe.router.num_experts,):
            found[f"router.{inner}"] = tensor
        elif tensor.numel() > 1 and inner not in moe.router.of_tokens:
            what = f"{inner} {list(tensor.shape)}"
            raise ValueError(f"{name}: experts of a {type(router).__name__} cannot be dropped, its {what} mixes them")
    if isinstance(router, PrototypeRouter):
        raise ValueError(
            f"{name}: experts of a PrototypeRouter cannot be dropped, every group of them makes one choice"
        )
    return found


def check_kept(name: str, moe: MoE, kept: Sequence[int]) -> None:
    """Raise ValueError unless a layer can be left with these experts, ascending."""
    number, router = moe.router.num_experts, moe.router
    if not kept or sorted(set(kept)) != list(kept) or kept[0] < 0 or kept[-1] >= number:
        raise ValueError(
            f"{name}: expected some of the experts 0 to {number - 1}, ascending, to keep; got {list(kept)}"
        )
    if isinstance(router, GShardRouter) and len(kept) < 2:
        raise ValueError(f"{name}: GShardRouter chooses two experts, of which 1 is to be kept")
    if (groups := getattr(router, "num_groups", 1)) > 1:
        size = number // groups
        left = [sum(e // size == group for e in kept) for group in range(groups)]
        if len(set(left)) > 1:
            raise ValueError(
                f"{name}: the gate chooses among {groups} groups of experts, of which equally many must be kept; "
                f"got {left}"
            )


def set_number(moe: MoE, number: int) -> tuple[int, int] | None:
    """Note that a layer has `number` experts now; returns k before and after where it had to go down.

    With one expert left in each group the best groups are those of the best experts: a plain choice, without groups.
    """
    router: Any = moe.router
    router.num_experts = moe.experts.num_experts = number
    most = number
    if getattr(router, "num_groups", 1) > 1:
        most = router.group_topk * (number // router.num_groups)
        if isinstance(router.group_score, int):
            router.group_score = min(router.group_score, number // router.num_groups)
        if number == router.num_groups:
            router.num_groups = router.group_topk = 1
    before = getattr(router, "k", None)
    for attribute in COUNTS:
        if isinstance(value := getattr(router, attribute, None), int) and value > most:
            setattr(router, attribute, most)
    return (before, router.k) if before is not None and router.k != before else None


@torch.no_grad()
def keep_experts(name: str, moe: MoE, kept: Sequence[int]) -> dict[nn.Parameter, Tensor]:
    """Drop a layer's other experts, in place: its parameters stay the same objects, with fewer rows.

    Returns the parameters that changed and the rows that they kept, for what goes along: an optimizer's state.
    Raises ValueError as `rows_of` and `check_kept`.
    """
    rows = rows_of(name, moe)
    check_kept(name, moe, kept)
    changed = {}
    for tensor in rows.values():
        index = torch.tensor(kept, device=tensor.device)
        tensor.data = tensor.data[index]
        if isinstance(tensor, nn.Parameter):
            tensor.grad = None if tensor.grad is None else tensor.grad[index]
            changed[tensor] = index
    _forget_counts(moe.router, torch.tensor(kept))
    set_number(moe, len(kept))
    return changed


def _forget_counts(router: Router, kept: Tensor) -> None:
    """What the gate counted of the experts since its last step."""
    counted = getattr(router, "load_since_update", None)
    if isinstance(counted, Tensor):
        router.load_since_update = counted[kept.to(counted.device)]
