"""Grouped matrix product of contiguous rows: expert outputs in the forward, input gradients in the backward."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .numerics import dot, store
from .schedule import RowTiles, grouped_order
from .tiles import Tile, input_precision


@triton.jit
def grouped_gemm_kernel(
    rows: tl.tensor,
    w: tl.tensor,
    bias: tl.tensor,
    tile_expert: tl.tensor,
    tile_row: tl.tensor,
    offsets: tl.tensor,
    out: tl.tensor,
    num_tiles: tl.tensor,
    E: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    stride_we: tl.tensor,
    stride_wn: tl.tensor,
    stride_wk: tl.tensor,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """out[a, n] = sum_k rows[a, k] * w[e, n, k] (+ bias[e, n]) for the assignments a of each expert e."""
    tile, tile_n = grouped_order(tl.program_id(0), num_tiles, tl.cdiv(N, BLOCK_N), GROUP)
    e = tl.load(tile_expert + tile)
    if e >= E:
        return
    first = tl.load(tile_row + tile)
    m = first + tl.arange(0, BLOCK_M)
    live = m < tl.load(offsets + e + 1)
    # Rows past the expert's end read its first row instead of a mask: what they compute is not stored.
    a = tl.where(live, m, first).to(tl.int64)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    left = rows + a[:, None] * K + k[None, :]
    right = w + e.to(tl.int64) * stride_we + n.to(tl.int64)[None, :] * stride_wn + k[:, None] * stride_wk
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        if EVEN_K:
            u = tl.load(left)
            v = tl.load(right, mask=(n < N)[None, :], other=0.0)
        else:
            u = tl.load(left, mask=(k < K - k0)[None, :], other=0.0)
            v = tl.load(right, mask=(n < N)[None, :] & (k < K - k0)[:, None], other=0.0)
        acc = dot(u, v, acc, PRECISION)
        left += BLOCK_K
        right += BLOCK_K * stride_wk
    if bias is not None:
        acc += tl.load(bias + e * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    inside = live[:, None] & (n < N)[None, :]
    store(out + m.to(tl.int64)[:, None] * N + n[None, :], acc, inside)


def grouped_gemm(rows: Tensor, w: Tensor, bias: Tensor | None, tiles: RowTiles, tile: Tile) -> Tensor:
    """rows [A, K] times each expert's w [E, N, K], any strides, transposed: [A, N]."""
    experts, width, depth = w.shape
    out = rows.new_empty(rows.shape[0], width)
    grouped_gemm_kernel[(len(tiles) * triton.cdiv(width, tile.n),)](
        rows,
        w,
        bias,
        tiles.expert,
        tiles.row,
        tiles.offsets,
        out,
        len(tiles),
        experts,
        width,
        depth,
        *w.stride(),
        EVEN_K=depth % tile.k == 0,
        PRECISION=input_precision(rows),
        **tile.options(),
    )
    return out
