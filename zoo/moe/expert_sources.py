"""Where offloaded experts stay: what of it the layers ask, and the host's memory."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from .experts import Experts
from .quantised import QuantisedExperts

LOCKED = 1 << 20  # bytes from which on a tensor's pages are locked; smaller ones share pages with what is not theirs

Held = Experts | QuantisedExperts


class Source(Protocol):
    """Where experts stay."""

    def read(self, expert: int, held: Held, slot: int) -> None:
        """Fill one slot of `held` with an expert; called by several threads at once, each for a slot of its own."""


class OnHost:
    """Experts that stay in the host's memory, `experts` being all of them. Copies of this share them.

    With `lock` their pages are locked until that memory is freed, so that a GPU reads them while it computes.
    """

    def __init__(self, experts: Held, lock: bool = False) -> None:
        self.tensors = {name: tensor.detach() for name, tensor in tensors_of(experts).items()}
        for tensor in self.tensors.values() if lock else ():
            _lock(tensor)

    def read(self, expert: int, held: Held, slot: int) -> None:
        """Fill one slot of `held` with an expert."""
        for name, tensor in tensors_of(held).items():
            tensor[slot].copy_(self.tensors[name][expert], non_blocking=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> OnHost:
        return self


def tensors_of(experts: Held) -> dict[str, Tensor]:
    """Parameters and buffers, stacked by expert, by name."""
    return {**dict(experts.named_parameters()), **dict(experts.named_buffers())}


def _lock(tensor: Tensor) -> None:
    """Lock a tensor's pages where they are: pin_memory() would need as much memory again."""
    size = tensor.numel() * tensor.itemsize
    if tensor.device.type != "cpu" or size < LOCKED or tensor.is_pinned():
        return
    runtime: Any = torch.cuda.cudart()
    torch.cuda.check_error(runtime.cudaHostRegister(tensor.data_ptr(), size, 0))
    # Pages that stayed locked when others get them could not be locked for these.
    freed = weakref.finalize(tensor.untyped_storage(), runtime.cudaHostUnregister, tensor.data_ptr())
    freed.atexit = False  # CUDA may have gone by then
