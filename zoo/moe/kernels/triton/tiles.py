"""Which tiles a call uses: those measured on this GPU for its shape, or else the table's.

A choice depends on shapes only, so that results repeat from run to run; nothing is searched for at run time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .plans import CODED, PLANS, ROWS, Plan
from .tuned import Key, tuned
from .weights import Coded


def architecture(device: torch.device) -> str:
    """Which part of the table a device uses: "90" where a program has 227 KB of shared memory, else "80"."""
    if device.type != "cuda":
        return "90"
    return "90" if torch.cuda.get_device_capability(device)[0] in (9, 10) else "80"


def aligned(*tensors: Tensor) -> bool:
    """Whether rows of all can be read 16 elements at a time."""
    return all(
        1 in t.stride()[-2:] and t.data_ptr() % 16 == 0 and all(s == 1 or s % 16 == 0 for s in t.stride())
        for t in tensors
    )


def plan_for(assignments: int, w_in: Tensor | Coded, w_out: Tensor | Coded, *tokens: Tensor) -> Plan:
    """The tiles for so many assignments to experts w_in [E, H, D] and w_out [E, D, F] of tokens [T, D]."""
    experts, width, hidden = w_out.shape
    rows = rows_name(assignments / experts)
    if isinstance(w_in, Coded) or isinstance(w_out, Coded):
        rows = rows if rows == "few" else "some"
        if width % 16 or hidden % 16 or not aligned(*(w.codes for w in (w_in, w_out) if isinstance(w, Coded)), *tokens):
            rows = "odd"
        return CODED[architecture(w_in.device), tokens[0].element_size(), rows]
    if width % 16 or hidden % 16 or not aligned(w_in, w_out, *tokens):
        rows = "odd"
    elif w_in.shape[1] == 2 * hidden:
        measured = tuned(w_in.device).get(Key(w_in.element_size(), width, hidden, rows))
        if measured is not None:
            return measured
    return PLANS[architecture(w_in.device), w_in.element_size(), rows]


def rows_name(mean: float) -> str:
    """The name of so many rows per expert."""
    return next((name for most, name in ROWS if mean <= most), "many")


def input_precision(x: Tensor) -> str:
    """How float32 products are computed, as torch.backends.cuda.matmul says; other dtypes are exact anyway."""
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"
