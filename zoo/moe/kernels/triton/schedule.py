"""Which program computes what: the row tiles of the experts and the order in which programs take them.

The tiles are found on the device; the host knows an upper bound of their number, so nothing waits for the GPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class RowTiles:
    """Row tile i computes up to `rows` assignments of expert[i] from row[i] on; expert[i] = E means none."""

    expert: Tensor
    row: Tensor
    offsets: Tensor
    rows: int

    def __len__(self) -> int:
        return self.expert.shape[0]


@triton.jit
def row_tiles_kernel(
    offsets: tl.tensor,
    tile_expert: tl.tensor,
    tile_row: tl.tensor,
    num_tiles: tl.tensor,
    E: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> None:
    """For every tile the expert whose running tile count passes it."""
    e = tl.arange(0, BLOCK_E)
    begin = tl.load(offsets + e, mask=e < E, other=0)
    end = tl.load(offsets + e + 1, mask=e < E, other=0)
    last = tl.cumsum((end - begin + ROWS - 1) // ROWS, 0)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    passed = (last[None, :] <= t[:, None]) & (e < E)[None, :]
    expert = tl.sum(passed.to(tl.int32), 1)
    first = tl.max(tl.where(passed, last[None, :], 0), 1)
    row = tl.load(offsets + expert) + (t - first) * ROWS
    tl.store(tile_expert + t, expert, mask=t < num_tiles)
    tl.store(tile_row + t, row, mask=t < num_tiles)


def row_tiles(offsets: Tensor, assignments: int, rows: int) -> RowTiles:
    """Cut the assignments of every expert into tiles of at most `rows`, in expert order."""
    experts = offsets.shape[0] - 1
    offsets = offsets.contiguous()
    # A tile has at least one row, and each expert wastes less than one tile.
    bound = min(assignments, (assignments + experts * (rows - 1)) // rows)
    expert, row = offsets.new_empty(bound), offsets.new_empty(bound)
    block_e = triton.next_power_of_2(experts)
    block_t = max(1, min(128, 16384 // block_e))
    row_tiles_kernel[(triton.cdiv(bound, block_t),)](
        offsets, expert, row, bound, experts, ROWS=rows, BLOCK_E=block_e, BLOCK_T=block_t
    )
    return RowTiles(expert, row, offsets, rows)


@triton.jit
def grouped_order(
    pid: tl.tensor, num_m: tl.tensor, num_n: tl.tensor, GROUP: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Row and column tile of a program: GROUP row tiles by all columns, rows fastest, so that L2 serves both."""
    group = pid // (GROUP * num_n)
    first = group * GROUP
    size = tl.minimum(num_m - first, GROUP)
    inside = pid % (GROUP * num_n)
    return first + inside % size, inside // size


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Make the GPU of x the current one: Triton launches there."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
