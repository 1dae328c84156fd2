"""Graphs that run where this library is not: while they are traced, all is computed with torch's own operators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_depth = 0


@contextmanager
def portable() -> Iterator[None]:
    """Compute with torch's own operators alone while the block runs.

        with zoo.moe.portable():
            torch.onnx.export(model, (images,), "model.onnx", dynamo=True)

    For torch.export, ONNX and AOTInductor, not for speed: every expert computes every token, num_experts / k times the
    work. A graph for any number of sequences needs gates that do not cut the batch into groups of several, nor take
    their capacity from it. Not exported so: experts in few bits or in files, and expert choice with max_experts.
    """
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def is_portable() -> bool:
    """Whether the block of a `portable` runs."""
    return _depth > 0


def sort_stably(values: Tensor, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    """Values sorted along a dimension and their indices; equal ones stay in order.

    ONNX knows no stable sort, so a portable one makes whole numbers different; equal scores are in order where the
    runtime keeps it, as ONNX's TopK does.
    """
    if not is_portable():
        return values.sort(dim=dim, descending=descending, stable=True)
    if values.dtype.is_floating_point:
        return values.sort(dim=dim, descending=descending)
    size, after = values.shape[dim], values.dim() - 1 - dim % values.dim()
    place = torch.arange(size, device=values.device).view(-1, *[1] * after)
    order = (values.long() * size + (size - 1 - place if descending else place)).sort(dim=dim, descending=descending)[1]
    return values.gather(dim, order), order


def expert_of_rows(offsets: Tensor, count: int, compare: bool = False) -> Tensor:
    """Expert of each of `count` rows sorted by expert, [A] int64, of where each expert's begin, offsets [E + 1].

    By comparisons where asked to, as vmap has no other way, or portable.
    """
    if compare or is_portable():
        rows = torch.arange(count, dtype=offsets.dtype, device=offsets.device)
        return (rows.unsqueeze(-1) >= offsets[1:]).sum(-1)
    experts = torch.arange(offsets.numel() - 1, device=offsets.device)
    return experts.repeat_interleave(offsets.diff().long(), output_size=count)
