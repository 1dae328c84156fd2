"""A model whose parameters lie on several meshes: the norm of its gradients, clipping, and its parts put together."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Replicate


def local(value: Tensor) -> Tensor:
    """This process's part of a tensor, or all of a plain one."""
    return value.to_local() if isinstance(value, DTensor) else value


def holders(value: Tensor) -> int:
    """How many processes have each element of a tensor: one or, of what is replicated, several."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if not isinstance(value, DTensor):
        return world
    split = [size for size, kind in zip(value.device_mesh.shape, value.placements) if not isinstance(kind, Replicate)]
    return world // math.prod(split)


def as_written(module: Any) -> Any:
    """A module as its class was written, with the same parameters: without what FSDP makes of one that it shards.

    Its own class, whose name begins with FSDP, and its hooks, which bring parameters together.
    """
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(module, FSDPModule):
        return module
    kind: Any = next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))
    plain = kind.__new__(kind)
    hooks = {
        name: type(held)() for name, held in vars(module).items() if name.endswith(("_hooks", "_hooks_with_kwargs"))
    }
    vars(plain).update(vars(module) | hooks)
    return plain


@torch.no_grad()
def total_norm(parameters: Iterable[Tensor], norm_type: float = 2.0) -> Tensor:
    """The norm of all gradients together, the same on every process, as one process with all of them has it."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    device = local(gradients[0]).device
    if math.isinf(norm_type):
        largest = [local(g).abs().max().float() for g in gradients if local(g).numel()]
        total = torch.stack(largest).max() if largest else torch.zeros((), device=device)
        if dist.is_initialized():
            dist.all_reduce(total, dist.ReduceOp.MAX)
        return total
    total = torch.zeros((), device=device, dtype=torch.float32)
    for gradient in gradients:
        part = local(gradient)
        norm = torch.linalg.vector_norm(part, norm_type, dtype=torch.promote_types(part.dtype, torch.float32))
        total = total + norm**norm_type / holders(gradient)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total ** (1 / norm_type)


@torch.no_grad()
def not_finite(model: nn.Module) -> str:
    """Which gradients of a model are not finite, on which process, in a few words; all processes call it together."""
    bad = [n for n, p in model.named_parameters() if p.grad is not None and not local(p.grad).isfinite().all()]
    told: list[list[str]] = [bad]
    if dist.is_initialized():
        told = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(told, bad)
    rank = next((rank for rank, names in enumerate(told) if names), 0)
    names, where = told[rank], f" on process {rank}" if len(told) > 1 else ""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"the gradient of {names[0]}{more} is not finite{where}" if names else "the norm of the gradients overflows"


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    """As `torch.nn.utils.clip_grad_norm_`, over all meshes at once; returns the norm before."""
    parameters = list(parameters)
    total = total_norm(parameters, norm_type)
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            part = local(parameter.grad)
            part.mul_(factor.to(part.dtype))
    return total


@torch.no_grad()
def clip_grad_value_(parameters: Iterable[Tensor], max_value: float) -> None:
    """As `torch.nn.utils.clip_grad_value_`, over all meshes."""
    for parameter in parameters:
        if parameter.grad is not None:
            local(parameter.grad).clamp_(-max_value, max_value)


def meshes_of(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Parameters in groups, those of a group on one mesh, plain ones together: what one fused step can take."""
    groups: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return list(groups.values())


def is_spread(model: nn.Module) -> bool:
    """Whether parameters of a model lie on meshes, in parts."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """A model's state on the CPU of the first process, its parts put together, and nothing elsewhere; all call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    found: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return found
