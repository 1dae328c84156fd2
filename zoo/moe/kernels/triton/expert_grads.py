"""Gradients of the experts' weights and biases: sums over the assignments of each expert, in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .numerics import dot, store
from .plans import Tile
from .schedule import grouped_order
from .tiles import input_precision


@triton.jit
def d_weight_kernel(
    left: tl.tensor,
    right: tl.tensor,
    token_index: tl.tensor,
    offsets: tl.tensor,
    out: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    stride_l: tl.tensor,
    stride_r: tl.tensor,
    stride_oe: tl.tensor,
    stride_om: tl.tensor,
    stride_on: tl.tensor,
    GATHER_LEFT: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """out[e, m, n] = sum over e's assignments a of left[a, m] * right[a, n], one side read at token[a]."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    e = tl.program_id(0) // (tiles_m * tiles_n)
    tile_m, tile_n = grouped_order(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(offsets + e + 1)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(tl.load(offsets + e), end, BLOCK_K):
        a = first + tl.arange(0, BLOCK_K)
        token = tl.load(token_index + a, mask=a < end, other=0).to(tl.int64)
        row = a.to(tl.int64)
        if GATHER_LEFT:
            row_l, row_r = token, row
        else:
            row_l, row_r = row, token
        # Both sides need the mask: zero times a neighbour's infinity would be NaN.
        inside_l = (a < end)[:, None] & (m < M)[None, :]
        inside_r = (a < end)[:, None] & (n < N)[None, :]
        u = tl.load(left + row_l[:, None] * stride_l + m[None, :], mask=inside_l, other=0.0)
        v = tl.load(right + row_r[:, None] * stride_r + n[None, :], mask=inside_r, other=0.0)
        acc = dot(tl.trans(u), v, acc, PRECISION)
    base = out + e.to(tl.int64) * stride_oe
    at = m.to(tl.int64)[:, None] * stride_om + n.to(tl.int64)[None, :] * stride_on
    store(base + at, acc, (m < M)[:, None] & (n < N)[None, :])


def d_weight(
    left: Tensor,
    right: Tensor,
    token_index: Tensor,
    offsets: Tensor,
    gather_left: bool,
    tile: Tile,
    out: Tensor,
) -> None:
    """Fill out [E, M, N]: of left and right, one is [T, *] and read at token_index, the other [A, *]."""
    experts, m, n = out.shape
    d_weight_kernel[(experts * triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n),)](
        left,
        right,
        token_index,
        offsets,
        out,
        m,
        n,
        left.stride(0),
        right.stride(0),
        *out.stride(),
        GATHER_LEFT=gather_left,
        PRECISION=input_precision(left),
        **tile.options(),
    )


@triton.jit
def d_bias_kernel(
    rows: tl.tensor,
    token_index: tl.tensor,
    weight: tl.tensor,
    offsets: tl.tensor,
    out: tl.tensor,
    N: tl.tensor,
    stride_r: tl.tensor,
    stride_oe: tl.tensor,
    stride_on: tl.tensor,
    BLOCK_A: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """out[e, n] = sum over e's assignments a of rows[a, n], or of weight[a] * rows[token[a], n]."""
    e = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(offsets + e + 1)
    total = tl.zeros([BLOCK_N], tl.float32)
    for first in range(tl.load(offsets + e), end, BLOCK_A):
        a = first + tl.arange(0, BLOCK_A)
        live = a < end
        row = a.to(tl.int64)
        if weight is not None:
            row = tl.load(token_index + a, mask=live, other=0).to(tl.int64)
        inside = live[:, None] & (n < N)[None, :]
        value = tl.load(rows + row[:, None] * stride_r + n[None, :], mask=inside, other=0.0).to(tl.float32)
        if weight is not None:
            value *= tl.load(weight + a, mask=live, other=0.0).to(tl.float32)[:, None]
        total += tl.sum(value, 0)
    store(out + e.to(tl.int64) * stride_oe + n.to(tl.int64) * stride_on, total, n < N)


def d_bias(rows: Tensor, token_index: Tensor, weight: Tensor | None, offsets: Tensor, out: Tensor) -> None:
    """Fill out [E, N] with sums of rows [A, N], or with weights of rows [T, N] read at token_index."""
    experts, width = out.shape
    d_bias_kernel[(experts, triton.cdiv(width, 64))](
        rows, token_index, weight, offsets, out, width, rows.stride(0), *out.stride(), BLOCK_A=64, BLOCK_N=64
    )
