"""Combine expert outputs by token: gather-and-sum, and the gradient of the combine weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .numerics import store
from .schedule import RowTiles


@dataclass(frozen=True)
class TokenLists:
    """Assignments of token t: order[bounds[t]:bounds[t+1]], in a fixed order."""

    order: Tensor
    bounds: Tensor


def token_lists(token_index: Tensor, num_tokens: int, place: Tensor | None = None) -> TokenLists:
    """Collect each token's assignments, however many it has: place [T, K], if they are known."""
    if place is not None:
        bounds = torch.arange(0, place.numel() + 1, place.shape[1], dtype=torch.int32, device=place.device)
        return TokenLists(place.reshape(-1), bounds)
    tokens, order = token_index.to(torch.int32).sort(stable=True)
    ids = torch.arange(num_tokens + 1, dtype=torch.int32, device=tokens.device)
    return TokenLists(order, torch.searchsorted(tokens, ids, out_int32=True))


@triton.jit
def combine_kernel(
    rows: tl.tensor,
    weight: tl.tensor,
    order: tl.tensor,
    bounds: tl.tensor,
    out: tl.tensor,
    D: tl.tensor,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One token, BLOCK_D columns: the sum of its assignments' rows, weighted if weights are given."""
    t = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    end = tl.load(bounds + t + 1)
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(tl.load(bounds + t), end, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        a = tl.load(order + j, mask=j < end, other=0).to(tl.int64)
        inside = (j < end)[:, None] & (d < D)[None, :]
        value = tl.load(rows + a[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        if weight is not None:
            value *= tl.load(weight + a, mask=j < end, other=0.0).to(tl.float32)[:, None]
        total += tl.sum(value, 0)
    store(out + t.to(tl.int64) * D + d, total, d < D)


def combine(rows: Tensor, weight: Tensor | None, tokens: TokenLists) -> Tensor:
    """Sum rows [A, D] into [T, D] by token, in float32 and in a fixed order."""
    num_tokens, width = tokens.bounds.shape[0] - 1, rows.shape[1]
    out = rows.new_empty(num_tokens, width)
    block_j = min(8, triton.next_power_of_2(triton.cdiv(rows.shape[0], num_tokens)))
    block_d = min(512, triton.next_power_of_2(width))
    combine_kernel[(num_tokens, triton.cdiv(width, block_d))](
        rows, weight, tokens.order, tokens.bounds, out, width, BLOCK_J=block_j, BLOCK_D=block_d
    )
    return out


@triton.jit
def d_combine_kernel(
    partial: tl.tensor,
    dy: tl.tensor,
    bias: tl.tensor,
    token_index: tl.tensor,
    tile_expert: tl.tensor,
    tile_row: tl.tensor,
    offsets: tl.tensor,
    out: tl.tensor,
    parts: tl.tensor,
    E: tl.tensor,
    A: tl.tensor,
    D: tl.tensor,
    stride_yt: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One row tile: the sum of <dA', hidden> over column tiles, plus <dy[token], bias[e]>."""
    e = tl.load(tile_expert + tl.program_id(0))
    if e >= E:
        return
    m = tl.load(tile_row + tl.program_id(0)) + tl.arange(0, BLOCK_M)
    live = m < tl.load(offsets + e + 1)
    total = tl.zeros([BLOCK_M], tl.float32)
    part = partial + m
    for _ in range(parts):
        total += tl.load(part, mask=live, other=0.0)
        part += A
    if bias is not None:
        token = tl.load(token_index + m, mask=live, other=0).to(tl.int64)
        for first in range(0, D, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            inside = live[:, None] & (d < D)[None, :]
            grad = tl.load(dy + token[:, None] * stride_yt + d[None, :], mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(grad * tl.load(bias + e * D + d, mask=d < D, other=0.0).to(tl.float32)[None, :], 1)
    store(out + m, total, live)


def d_combine(
    partial: Tensor,
    dy: Tensor,
    b_out: Tensor | None,
    token_index: Tensor,
    tiles: RowTiles,
    out: Tensor,
) -> None:
    """Fill out [A] with the gradient of the combine weights from partial sums [*, A] and dy [T, D]."""
    parts, assignments = partial.shape
    d_combine_kernel[(len(tiles),)](
        partial,
        dy,
        b_out,
        token_index,
        tiles.expert,
        tiles.row,
        tiles.offsets,
        out,
        parts,
        tiles.offsets.shape[0] - 1,
        assignments,
        dy.shape[1],
        dy.stride(0),
        BLOCK_M=tiles.rows,
        BLOCK_D=64,
    )
