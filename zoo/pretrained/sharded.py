"""Reading a published checkpoint into a model in parts: each process reads the bytes of its own parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..parallel import Mesh, parallelize
from .adopt import materialize
from .tensorfile import Entry


@dataclass(frozen=True)
class View:
    """Where a tensor of a file lies in a parameter of the model: from `origin` on, along the parameter's `dims`.

    A dimension of size one may be none of the parameter's: None.
    """

    name: str
    origin: tuple[int, ...]
    dims: tuple[int | None, ...]
    shape: tuple[int, ...]


def views(model: nn.Module, targets: Mapping[str, Tensor]) -> dict[str, View]:
    """Where each of `targets`, views into a whole model's state, lies in it; memory is not looked at.

    Raises ValueError, naming the target, for one that is not a part of one of the state's tensors.
    """
    owners = {t.untyped_storage()._cdata: (name, t) for name, t in model.state_dict().items()}
    return {key: _view(key, target, owners) for key, target in targets.items()}


def _view(key: str, target: Tensor, owners: Mapping[int, tuple[str, Tensor]]) -> View:
    if target.untyped_storage()._cdata not in owners:
        raise ValueError(f"{key} is computed from the model's tensors, not a part of one")
    name, owner = owners[target.untyped_storage()._cdata]
    rest, origin = target.storage_offset(), []
    for stride in owner.stride():
        origin.append(rest // stride)
        rest %= stride
    by_stride = {owner.stride(d): d for d in range(owner.dim()) if owner.shape[d] > 1}
    dims = tuple(by_stride.get(stride, -1) if size > 1 else None for size, stride in zip(target.shape, target.stride()))
    for d, size in zip(dims, target.shape):
        if d is not None and (d < 0 or origin[d] + size > owner.shape[d]):
            raise ValueError(f"{key} is {name} in another shape, not a part of it")
    return View(name, tuple(origin), dims, tuple(target.shape))


def spread_and_fill(
    model: Any,
    targets: Mapping[str, Tensor],
    entries: Mapping[str, Entry],
    mesh: Mesh,
    device: torch.device | str | None,
) -> None:
    """Spread a model that has no memory yet, give it some, and read this process's parts into it.

    targets: the view into the model's state that each of the entries of that name fills. How many bytes were read is
    then `model.bytes_read`. Processes meet nowhere after the model is spread: what one cannot read, it raises alone.
    """
    where = views(model, targets)
    parallelize(model, mesh)
    materialize(model, torch.device(device or torch.get_default_device()), initialize=False)
    model.bytes_read = fill(model, where, entries)


@torch.no_grad()
def fill(model: nn.Module, where: Mapping[str, View], entries: Mapping[str, Entry]) -> int:
    """Read this process's parts of a model from the files that hold its tensors; returns how many bytes that took."""
    state, read = model.state_dict(), 0
    for key in sorted(where, key=lambda key: (entries[key].path, entries[key].start)):
        view = where[key]
        tensor = state[view.name]
        if isinstance(tensor, DTensor):
            shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
            local = tensor.to_local()
        else:
            shape, offset, local = tuple(tensor.shape), (0,) * tensor.dim(), tensor
        if part := part_of(view, shape, offset, local):
            read += entries[key].read_part(*part)
    return read


def part_of(
    view: View, shape: Sequence[int], offset: Sequence[int], local: Tensor
) -> tuple[Tensor, list[slice]] | None:
    """Where a file's tensor goes in a part [shape] of a parameter, from `offset` on: the place, and what belongs there.

    None where it has nothing in this part.
    """
    here: list[slice | int] = []
    box = [slice(0, size) for size in view.shape]
    for d, (origin, first, size) in enumerate(zip(view.origin, offset, shape)):
        if d in view.dims:
            n = view.dims.index(d)
            low, high = max(origin, first), min(origin + view.shape[n], first + size)
            box[n] = slice(low - origin, max(low, high) - origin)
            here.append(slice(low - first, max(low, high) - first))
        elif first <= origin < first + size:
            here.append(origin - first)
        else:
            return None
    if not math.prod(part.stop - part.start for part in box):
        return None
    found = sorted(d for d in view.dims if d is not None)
    target = local[tuple(here)].permute([found.index(d) for d in view.dims if d is not None])
    for n, dim in enumerate(view.dims):
        target = target.unsqueeze(n) if dim is None else target
    return target, box
