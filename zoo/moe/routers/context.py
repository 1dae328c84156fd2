"""What a gate reads of its context besides the mask: token ids, and labels of tokens or of whole sequences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..auxiliary import LABELS
from ..routing import Routing


def per_token(router: str, context: Mapping[str, Any], name: str, x: Tensor, limit: int | None = None) -> Tensor:
    """Whole numbers of the context as one a token, [T] int64, for tokens x [T, D] or [B, S, D].

    They may be given for each token ([T] or [B, S]), for each sequence ([B]), or as one number for all. With `limit`
    they must lie in 0..limit-1; where the context has a mask, a masked token may have any, and gets 0.
    Raises ValueError, naming the router, when they are missing, of another shape or out of range.
    """
    value = context.get(name)
    if value is None:
        raise missing(router, name)
    tokens = math.prod(x.shape[:-1])  # Size.numel would fix open sizes in torch.export
    value = torch.as_tensor(value, device=x.device).long()
    if value.dim() == 0:
        found = value.expand(tokens)
    elif value.shape in (x.shape[:-1], (tokens,)):
        found = value.reshape(-1)
    elif x.dim() == 3 and value.shape == x.shape[:1]:
        found = value[:, None].expand(x.shape[:-1]).reshape(-1)
    else:
        kinds = f"{list(x.shape[:-1])} (one a token)" + (f" or [{x.shape[0]}] (one a sequence)" if x.dim() == 3 else "")
        raise ValueError(f"{router}: {name} has shape {list(value.shape)}, expected {kinds}")
    if (mask := context.get("mask")) is not None:
        found = found.where(mask.reshape(-1).bool(), 0)
    if limit is not None and tokens:
        _check_range(router, name, found, limit)
    return found


def missing(router: str, name: str) -> ValueError:
    """The error for a context without what a router goes by."""
    return ValueError(
        f"{router} needs {name} in the context: call the layer as moe(x, {name}=...), a transformers model as "
        f'model(..., moe_context={{"{name}": ...}})'
    )


def label_sources(
    router: str, context: Mapping[str, Any], x: Tensor, mask: Tensor | None
) -> dict[str, Callable[[], Any]]:
    """What losses may ask for of the context, made on demand: labels, one a token, and what brings tokens to experts.

    x is as in `per_token`, mask may be flat.
    """
    given = {**context, "mask": mask}
    labels: dict[str, Callable[[], Any]] = {name: partial(per_token, router, given, name, x) for name in LABELS}
    return {**labels, "parallel": lambda: context.get("parallel")}


def _check_range(router: str, name: str, value: Tensor, limit: int) -> None:
    inside = ((value >= 0) & (value < limit)).all()
    if torch.compiler.is_compiling() or value.device.type != "cpu":
        torch._assert_async(inside, f"{router}: {name} must lie in 0..{limit - 1}")  # without waiting for the device
    elif not inside:
        raise ValueError(f"{router}: {name} must lie in 0..{limit - 1}, got {int(value.min())}..{int(value.max())}")


def to_experts(expert: Tensor, num_experts: int, x: Tensor, mask: Tensor | None) -> Routing:
    """The routing of tokens x that each go to K experts, [K, T] or [T] for one, with weight one."""
    chosen = (expert if expert.dim() == 2 else expert[None]).T
    weight = torch.ones_like(chosen, dtype=torch.promote_types(x.dtype, torch.float32))
    if mask is None:
        return Routing.from_choices(chosen, weight, num_experts)
    mask = mask.reshape(-1).bool()
    keep = mask[:, None].expand_as(chosen)
    return Routing.from_choices(chosen, weight, num_experts, keep=keep, asked=mask.long() * chosen.shape[1])
