"""Reading a published checkpoint into a model in parts: each process reads the bytes of its own parts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from .tensorfile import Entry


@dataclass(frozen=True)
class View:
    """Where a tensor of a file lies in a parameter of the model: from `origin` on, along the parameter's `dims`."""

    name: str
    origin: tuple[int, ...]
    dims: tuple[int, ...]
    shape: tuple[int, ...]


def views(model: nn.Module, targets: Mapping[str, Tensor]) -> dict[str, View]:
    """Where each of `targets`, views into a whole model's state, lies in it; memory is not looked at."""
    owners = {t.untyped_storage()._cdata: (name, t) for name, t in model.state_dict().items()}
    found = {}
    for key, target in targets.items():
        name, owner = owners[target.untyped_storage()._cdata]
        rest, origin = target.storage_offset(), []
        for stride in owner.stride():
            origin.append(rest // stride)
            rest %= stride
        dims, last = [], owner.dim()
        for size, stride in zip(reversed(target.shape), reversed(target.stride())):
            last = next(d for d in range(last - 1, -1, -1) if owner.stride(d) == stride or size == 1)
            dims.append(last)
        found[key] = View(name, tuple(origin), tuple(reversed(dims)), tuple(target.shape))
    return found


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
        here: list[slice | int] = []
        box = [slice(0, size) for size in view.shape]
        for d, (origin, first, size) in enumerate(zip(view.origin, offset, shape)):
            if d in view.dims:
                n = view.dims.index(d)
                low, high = max(origin, first), min(origin + view.shape[n], first + size)
                box[n] = slice(low - origin, max(low, high) - origin)
                here.append(slice(low - first, max(low, high) - first))
            else:
                # -1: this process has none of it
                here.append(origin - first if first <= origin < first + size else -1)
        if -1 in here or not math.prod(part.stop - part.start for part in box):
            continue
        read += entries[key].read_part(local[tuple(here)], box)
    return read
