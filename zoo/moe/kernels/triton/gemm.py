"""Grouped matrix product of contiguous rows: expert outputs in the forward, input gradients in the backward."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .descriptors import described_rows, described_weight, weight_block
from .numerics import dot, store
from .plans import Tile
from .schedule import RowTiles, grouped_order
from .tiles import input_precision


@triton.jit
def product(
    left: tl.tensor,
    w: tl.tensor,
    e: tl.tensor,
    first_n: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    stride_we: tl.tensor,
    stride_wn: tl.tensor,
    stride_wk: tl.tensor,
    DESCRIBED: tl.constexpr,
    ALONG_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """sum_k left[m, k] * w[e, n, k] for BLOCK_N columns from first_n on; left points to the first k of each row."""
    n = first_n + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if DESCRIBED:
        for k0 in range(0, K, BLOCK_K):
            if EVEN_K:
                u = tl.load(left)
            else:
                u = tl.load(left, mask=(k < K - k0)[None, :], other=0.0)
            acc = dot(u, weight_block(w, e, first_n, k0, ALONG_K, BLOCK_N, BLOCK_K), acc, PRECISION)
            left += BLOCK_K
    else:
        right = w + e.to(tl.int64) * stride_we + n.to(tl.int64)[None, :] * stride_wn + k[:, None] * stride_wk
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
    return acc


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
    DESCRIBED: tl.constexpr,
    ALONG_K: tl.constexpr,
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
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if DESCRIBED:
        # Rows past the expert's end are another's: what they compute is not stored.
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k0 in range(0, K, BLOCK_K):
            u = rows.load([first, k0])
            acc = dot(u, weight_block(w, e, tile_n * BLOCK_N, k0, ALONG_K, BLOCK_N, BLOCK_K), acc, PRECISION)
    else:
        # Rows past the expert's end read its first row instead of a mask.
        a = tl.where(live, m, first).to(tl.int64)
        left = rows + a[:, None] * K + tl.arange(0, BLOCK_K)[None, :]
        first_n = tile_n * BLOCK_N
        acc = product(
            left,
            w,
            e,
            first_n,
            N,
            K,
            stride_we,
            stride_wn,
            stride_wk,
            DESCRIBED,
            ALONG_K,
            EVEN_K,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
    if bias is not None:
        acc += tl.load(bias + e * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    inside = live[:, None] & (n < N)[None, :]
    store(out + m.to(tl.int64)[:, None] * N + n[None, :], acc, inside)


def grouped_gemm(rows: Tensor, w: Tensor, bias: Tensor | None, tiles: RowTiles, tile: Tile) -> Tensor:
    """rows [A, K] times each expert's w [E, N, K], any strides, transposed: [A, N]."""
    experts, width, depth = w.shape
    out = rows.new_empty(rows.shape[0], width)
    weight, along_k = described_weight(w, tile)
    grouped_gemm_kernel[(len(tiles) * triton.cdiv(width, tile.n),)](
        described_rows(rows, tile),
        weight,
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
        DESCRIBED=tile.described,
        ALONG_K=along_k,
        EVEN_K=depth % tile.k == 0,
        PRECISION=input_precision(rows),
        **tile.options(),
    )
    return out
