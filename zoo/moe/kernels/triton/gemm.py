"""Grouped matrix product of contiguous rows: expert outputs in the forward, input gradients in the backward."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .decode import rescaled, scale_block, scale_rows, times
from .descriptors import described_rows, weight_block
from .numerics import dot, store
from .plans import Tile
from .schedule import RowTiles, grouped_order
from .tiles import input_precision
from .weights import Coded, weight_arguments


@triton.jit
def product(
    left: tl.tensor,
    acc: tl.tensor,
    e: tl.tensor,
    first_n: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    w: tl.tensor,
    scales: tl.tensor,
    stride_we: tl.tensor,
    stride_wn: tl.tensor,
    stride_wk: tl.tensor,
    stride_sn: tl.tensor,
    stride_sk: tl.tensor,
    FORMAT: tl.constexpr,
    DESCRIBED: tl.constexpr,
    ALONG_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """acc + sum_k left[m, k] * w[e, n, k] for BLOCK_N columns from first_n on; left points to a row's first k.

    `scales` are those of e; what of them is left out `rescaled` makes up for.
    """
    k = tl.arange(0, BLOCK_K)
    if DESCRIBED:
        for k0 in range(0, K, BLOCK_K):
            if EVEN_K:
                u = tl.load(left)
            else:
                u = tl.load(left, mask=(k < K - k0)[None, :], other=0.0)
            acc = dot(u, weight_block(w, e, first_n, k0, ALONG_K, BLOCK_N, BLOCK_K), acc, PRECISION)
            left += BLOCK_K
    else:
        # Two numbers of MXFP4 are a byte, along memory.
        BYTES_N: tl.constexpr = 2 if FORMAT == "mxfp4" and not ALONG_K else 1
        BYTES_K: tl.constexpr = 2 if FORMAT == "mxfp4" and ALONG_K else 1
        n = first_n // BYTES_N + tl.arange(0, BLOCK_N // BYTES_N)
        at = tl.arange(0, BLOCK_K // BYTES_K)
        right = w + e.to(tl.int64) * stride_we + n.to(tl.int64)[None, :] * stride_wn + at[:, None] * stride_wk
        scale = scale_block(scales, first_n, 0, N, K, stride_sn, stride_sk, FORMAT, ALONG_K, BLOCK_N, BLOCK_K)
        for k0 in range(0, K, BLOCK_K):
            # Read a step ahead, as the compiler does by itself only with larger blocks.
            ahead = scale_block(
                scales, first_n, k0 + BLOCK_K, N, K, stride_sn, stride_sk, FORMAT, ALONG_K, BLOCK_N, BLOCK_K
            )
            if EVEN_K:
                u = tl.load(left)
                v = tl.load(right, mask=(n < N // BYTES_N)[None, :], other=0)
            else:
                u = tl.load(left, mask=(k < K - k0)[None, :], other=0.0)
                v = tl.load(right, mask=(n < N // BYTES_N)[None, :] & (at < (K - k0) // BYTES_K)[:, None], other=0)
            acc = times(u, v, acc, scale, FORMAT, ALONG_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
            scale = ahead
            left += BLOCK_K
            right += BLOCK_K // BYTES_K * stride_wk
    return acc


@triton.jit
def grouped_gemm_kernel(
    rows: tl.tensor,
    bias: tl.tensor,
    tile_expert: tl.tensor,
    tile_row: tl.tensor,
    offsets: tl.tensor,
    out: tl.tensor,
    num_tiles: tl.tensor,
    E: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    w: tl.tensor,
    scales: tl.tensor,
    stride_we: tl.tensor,
    stride_wn: tl.tensor,
    stride_wk: tl.tensor,
    stride_se: tl.tensor,
    stride_sn: tl.tensor,
    stride_sk: tl.tensor,
    FORMAT: tl.constexpr,
    PARTS: tl.constexpr,
    DESCRIBED: tl.constexpr,
    ALONG_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """out[a, n] = sum_k rows[a, k] * w[e, n, k] (+ bias[e, n]) for the assignments a of each expert e.

    k runs over PARTS times K numbers, one part after another: each has scales of its own.
    """
    tile, tile_n = grouped_order(tl.program_id(0), num_tiles, tl.cdiv(N, BLOCK_N), GROUP)
    e = tl.load(tile_expert + tile)
    if e >= E:
        return
    first = tl.load(tile_row + tile)
    m = first + tl.arange(0, BLOCK_M)
    live = m < tl.load(offsets + e + 1)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if DESCRIBED:
        # Rows past the expert's end are another's: what they compute is not stored.
        for k0 in range(0, K, BLOCK_K):
            u = rows.load([first, k0])
            acc = dot(u, weight_block(w, e, tile_n * BLOCK_N, k0, ALONG_K, BLOCK_N, BLOCK_K), acc, PRECISION)
    else:
        # Rows past the expert's end read its first row instead of a mask.
        a = tl.where(live, m, first).to(tl.int64)
        left = rows + a[:, None] * (K * PARTS) + tl.arange(0, BLOCK_K)[None, :]
        if FORMAT is not None:
            scales += e.to(tl.int64) * stride_se
        for part in tl.static_range(PARTS):
            if part > 0:
                left += K
                w += tl.cast(K, tl.int64) * stride_wk
                scales += scale_rows(K, FORMAT) * stride_sk
            acc = product(
                left,
                acc,
                e,
                tile_n * BLOCK_N,
                N,
                K,
                w,
                scales,
                stride_we,
                stride_wn,
                stride_wk,
                stride_sn,
                stride_sk,
                FORMAT,
                DESCRIBED,
                ALONG_K,
                EVEN_K,
                PRECISION,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
            )
    acc = rescaled(acc, scales, n, N, stride_sn, out.dtype.element_ty, FORMAT, ALONG_K)
    if bias is not None:
        acc += tl.load(bias + e * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    inside = live[:, None] & (n < N)[None, :]
    store(out + m.to(tl.int64)[:, None] * N + n[None, :], acc, inside)


def grouped_gemm(rows: Tensor, w: Tensor | Coded, bias: Tensor | None, tiles: RowTiles, tile: Tile) -> Tensor:
    """rows [A, K] times each expert's w [E, N, K], any strides, transposed: [A, N]."""
    experts, width, depth = w.shape
    out = rows.new_empty(rows.shape[0], width)
    parts = w.parts if isinstance(w, Coded) and w.turned else 1
    grouped_gemm_kernel[(len(tiles) * triton.cdiv(width, tile.n),)](
        described_rows(rows, tile),
        bias,
        tiles.expert,
        tiles.row,
        tiles.offsets,
        out,
        len(tiles),
        experts,
        width,
        depth // parts,
        **weight_arguments(w, tile),
        PARTS=parts,
        EVEN_K=depth // parts % tile.k == 0,
        PRECISION=input_precision(rows),
        **tile.options(),
    )
    return out
