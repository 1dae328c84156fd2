"""Large CPU tensors on memory that is used again: fresh pages cost as much time as the arithmetic on them.

At 8 experts of 3584 x 1024 in float32 the weight gradients of one layer are 350 MB; touching that for the first
time takes 72 ms in pages of 4 KB, 37 ms in huge pages, and 22 ms when the pages are already there. glibc gives
back every block over 32 MB at once, so a training step would pay it anew each time.
"""

from __future__ import annotations

import math
import mmap
import sys
import threading
import time
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
ALIGNMENT = 64  # bytes between the parts of one block: a cache line
SMALLEST = 1 << 20  # bytes; glibc keeps smaller blocks by itself
SLACK = 1.25  # a slab serves requests down to 1/1.25 of its size
IDLE_SECONDS = 30.0  # slabs that nobody asked for since then go back to the system
RECYCLES = hasattr(mmap, "MADV_HUGEPAGE")  # Linux


class _Slab:
    """Anonymous memory; tensors made on it hold references, so counting those tells whether it is free."""

    def __init__(self, size: int) -> None:
        # A huge page more than asked for, so that the tensor can begin at the start of one.
        self.memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.skip = -torch.frombuffer(self.memory, dtype=torch.uint8).data_ptr() % HUGE_PAGE
        self.size = size
        self.used = 0.0
        self.unshared = self.references()

    def references(self) -> int:
        return sys.getrefcount(self.memory)

    @property
    def free(self) -> bool:
        return self.references() == self.unshared


_slabs: list[_Slab] = []
_lock = threading.Lock()


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised contiguous CPU tensor, like torch.empty; large ones may reuse memory no tensor holds."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < SMALLEST or not RECYCLES:
        return torch.empty(shape, dtype=dtype)
    now = time.monotonic()
    with _lock:
        fits = [s for s in _slabs if size <= s.size <= SLACK * size and s.free]
        slab = min(fits, key=lambda s: s.size) if fits else _Slab(size)
        if not fits:
            _slabs[:] = [s for s in _slabs if now - s.used < IDLE_SECONDS or not s.free]
            _slabs.append(slab)
        slab.used = now
        return torch.frombuffer(slab.memory, dtype=dtype, count=count, offset=slab.skip).view(*shape)


def empty_like(tensor: Tensor) -> Tensor:
    """As torch.empty_like, on reused memory where the tensor is contiguous."""
    return empty(tensor.shape, tensor.dtype) if tensor.is_contiguous() else torch.empty_like(tensor)


def blocks(shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[Tensor]:
    """Uninitialised tensors that share one allocation, for scratch that is dropped together."""
    step = ALIGNMENT // dtype.itemsize
    sizes = [-(-math.prod(shape) // step) * step for shape in shapes]
    parts = empty((sum(sizes),), dtype).split(sizes)
    return [part[: math.prod(shape)].view(*shape) for part, shape in zip(parts, shapes)]
