"""The expert computation as fused Triton kernels, for NVIDIA GPUs from compute capability 8.0 on.

    choose     a token's best experts, and all choices sorted by expert
    forward    up      gathered x @ w_in.T, activation in the epilogue; keeps pre-activations if asked
               down    hidden @ w_out.T into contiguous rows [A, D]
               combine gather-and-sum of those rows into [T, D]
    backward   d_hidden  gathered dy @ w_out; epilogue gives d_pre, w * hidden and the combine weights' gradient
               d_x, d_w_in, d_w_out, biases, and the same gather-and-sum for dx

Weights are tensors, or codes of few bits with scales, which are decoded in registers (`weights`, `decode`).
No atomics, so results repeat bit for bit; no host synchronisation; offsets in memory are 64 bit.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

INSTALLED = importlib.util.find_spec("triton") is not None
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

if INSTALLED:
    from .activation import FORMS
    from .backward import backward
    from .forward import forward
    from .numerics import INTERPRETED

__all__ = ["backward", "forward", "unavailable", "unsupported"]


def unsupported(x: Tensor, w_in: Tensor, w_out: Tensor, activation: str) -> str | None:
    """Why these tensors cannot run here, or None when they can."""
    if not INSTALLED:
        return "the package triton is not installed"
    if x.dtype not in DTYPES:
        return f"its kernels compute in bfloat16, float16 and float32, not {x.dtype}"
    if activation not in FORMS:
        return f"activation {activation!r} has no Triton form"
    if min(x.shape[1], w_out.shape[2], w_out.shape[0]) == 0:
        return "it needs at least one expert and non-zero widths"
    return unavailable(x)


def unavailable(x: Tensor) -> str | None:
    """Why kernels cannot run where x is, or None when they can."""
    if not INSTALLED:
        return "the package triton is not installed"
    if INTERPRETED:
        return None
    if not x.is_cuda:
        return f"it needs a CUDA device (or TRITON_INTERPRET=1), x is on {x.device.type}"
    if torch.version.cuda is None:
        return "its kernels are written for NVIDIA GPUs"
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or newer"
    return None
