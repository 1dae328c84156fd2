"""Forward of the expert computation: up projection with gather and activation, down projection, combine."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .activation import constants, hidden_units
from .combine import combine, token_lists
from .decode import rescaled, scale_block, scale_rows, times
from .descriptors import weight_block
from .gemm import grouped_gemm
from .numerics import dot, quarters, store
from .plans import Tile
from .schedule import RowTiles, grouped_order, on_device, row_tiles
from .tiles import input_precision, plan_for
from .weights import Coded, weight_arguments


@triton.jit
def epilogue(
    gate: tl.tensor,
    up: tl.tensor,
    bias: tl.tensor,
    pre: tl.tensor,
    hidden: tl.tensor,
    e: tl.tensor,
    row: tl.tensor,
    live: tl.tensor,
    n: tl.tensor,
    F: tl.tensor,
    FORM: tl.constexpr,
    GATED: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFTED: tl.constexpr,
) -> None:
    """Add the biases of some columns n, store pre-activations if kept, and hidden units."""
    H = 2 * F if GATED else F
    inside = live[:, None] & (n < F)[None, :]
    if bias is not None:
        gate += tl.load(bias + e * H + n, mask=n < F, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(bias + e * H + F + n, mask=n < F, other=0.0).to(tl.float32)[None, :]
    if pre is not None:
        store(pre + row[:, None] * H + n[None, :], gate, inside)
        if GATED:
            store(pre + row[:, None] * H + F + n[None, :], up, inside)
    store(hidden + row[:, None] * F + n[None, :], hidden_units(gate, up, FORM, GATED, LIMIT, SHIFTED), inside)


@triton.jit
def up_kernel(
    x: tl.tensor,
    bias: tl.tensor,
    token_index: tl.tensor,
    tile_expert: tl.tensor,
    tile_row: tl.tensor,
    offsets: tl.tensor,
    pre: tl.tensor,
    hidden: tl.tensor,
    num_tiles: tl.tensor,
    E: tl.tensor,
    D: tl.tensor,
    F: tl.tensor,
    stride_xt: tl.tensor,
    w: tl.tensor,
    scales: tl.tensor,
    stride_we: tl.tensor,
    stride_wn: tl.tensor,
    stride_wk: tl.tensor,
    stride_se: tl.tensor,
    stride_sn: tl.tensor,
    stride_sk: tl.tensor,
    FORM: tl.constexpr,
    GATED: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFTED: tl.constexpr,
    FORMAT: tl.constexpr,
    DESCRIBED: tl.constexpr,
    ALONG_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """hidden[a, n] of gate = x[token[a]] . w[e, n] and, if gated, up = x[token[a]] . w[e, F + n]."""
    tile, tile_n = grouped_order(tl.program_id(0), num_tiles, tl.cdiv(F, BLOCK_N), GROUP)
    e = tl.load(tile_expert + tile)
    if e >= E:
        return
    m = tl.load(tile_row + tile) + tl.arange(0, BLOCK_M)
    live = m < tl.load(offsets + e + 1)
    # Rows past the expert's end read token 0 instead of a mask: what they compute is not stored.
    token = tl.load(token_index + m, mask=live, other=0).to(tl.int64)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    left = x + token[:, None] * stride_xt + k[None, :]
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if DESCRIBED:
        for k0 in range(0, D, BLOCK_K):
            if EVEN_K:
                u = tl.load(left)
            else:
                u = tl.load(left, mask=(k < D - k0)[None, :], other=0.0)
            gate = dot(u, weight_block(w, e, tile_n * BLOCK_N, k0, ALONG_K, BLOCK_N, BLOCK_K), gate, PRECISION)
            if GATED:
                up = dot(u, weight_block(w, e, F + tile_n * BLOCK_N, k0, ALONG_K, BLOCK_N, BLOCK_K), up, PRECISION)
            left += BLOCK_K
    else:
        # Two numbers of MXFP4 are a byte.
        BYTES: tl.constexpr = 2 if FORMAT == "mxfp4" else 1
        at = tl.arange(0, BLOCK_K // BYTES)
        right = w + e.to(tl.int64) * stride_we + n.to(tl.int64)[None, :] * stride_wn + at[:, None] * stride_wk
        right_up = right + tl.cast(F, tl.int64) * stride_wn
        scales_up = scales
        if FORMAT is not None:
            scales += e.to(tl.int64) * stride_se
            scales_up = scales + scale_rows(F, FORMAT) * stride_sn
        first_n = tile_n * BLOCK_N
        scale = scale_block(scales, first_n, 0, F, D, stride_sn, stride_sk, FORMAT, ALONG_K, BLOCK_N, BLOCK_K)
        scale_up = scale_block(scales_up, first_n, 0, F, D, stride_sn, stride_sk, FORMAT, ALONG_K, BLOCK_N, BLOCK_K)
        for k0 in range(0, D, BLOCK_K):
            ahead = scale_block(
                scales, first_n, k0 + BLOCK_K, F, D, stride_sn, stride_sk, FORMAT, ALONG_K, BLOCK_N, BLOCK_K
            )
            if EVEN_K:
                u = tl.load(left)
                inside = (n < F)[None, :]
            else:
                u = tl.load(left, mask=(k < D - k0)[None, :], other=0.0)
                inside = (n < F)[None, :] & (at < (D - k0) // BYTES)[:, None]
            v = tl.load(right, mask=inside, other=0)
            gate = times(u, v, gate, scale, FORMAT, ALONG_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
            if GATED:
                ahead_up = scale_block(
                    scales_up, first_n, k0 + BLOCK_K, F, D, stride_sn, stride_sk, FORMAT, ALONG_K, BLOCK_N, BLOCK_K
                )
                v = tl.load(right_up, mask=inside, other=0)
                up = times(u, v, up, scale_up, FORMAT, ALONG_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
                scale_up = ahead_up
                right_up += BLOCK_K // BYTES * stride_wk
            scale = ahead
            left += BLOCK_K
            right += BLOCK_K // BYTES * stride_wk
        gate = rescaled(gate, scales, n, F, stride_sn, x.dtype.element_ty, FORMAT, ALONG_K)
        if GATED:
            up = rescaled(up, scales_up, n, F, stride_sn, x.dtype.element_ty, FORMAT, ALONG_K)
    gates, ups = quarters(gate, BLOCK_M, BLOCK_N), quarters(up, BLOCK_M, BLOCK_N)
    row = m.to(tl.int64)
    for i in tl.static_range(4):
        n = tile_n * BLOCK_N + i * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
        epilogue(gates[i], ups[i], bias, pre, hidden, e, row, live, n, F, FORM, GATED, LIMIT, SHIFTED)


def up_projection(
    x: Tensor,
    w_in: Tensor | Coded,
    b_in: Tensor | None,
    token_index: Tensor,
    tiles: RowTiles,
    tile: Tile,
    activation: str,
    pre: Tensor | None,
    hidden: Tensor,
) -> None:
    """Fill hidden [A, F] and, if given, the pre-activations [A, H]."""
    width, depth = hidden.shape[1], x.shape[1]
    up_kernel[(len(tiles) * triton.cdiv(width, tile.n),)](
        x,
        b_in,
        token_index,
        tiles.expert,
        tiles.row,
        tiles.offsets,
        pre,
        hidden,
        len(tiles),
        w_in.shape[0],
        depth,
        width,
        x.stride(0),
        **weight_arguments(w_in, tile),
        **constants(activation),
        EVEN_K=depth % tile.k == 0,
        PRECISION=input_precision(x),
        **tile.options(),
    )


def unit_stride(x: Tensor) -> Tensor:
    """x [T, D] itself if its rows are dense, else a copy."""
    return x if x.stride(1) == 1 else x.contiguous()


def forward(
    x: Tensor,
    w_in: Tensor | Coded,
    w_out: Tensor | Coded,
    b_in: Tensor | None,
    b_out: Tensor | None,
    weight: Tensor,
    token_index: Tensor,
    offsets: Tensor,
    activation: str,
    save: bool,
    place: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs [T, D] and, when `save`, the pre-activations [A, H] (else an empty tensor); place [T, K], if known."""
    assignments = token_index.shape[0]
    pre = x.new_empty(assignments if save else 0, w_in.shape[1])
    if assignments == 0:
        return x.new_zeros(x.shape), pre
    x, token_index = unit_stride(x), token_index.contiguous()
    b_in, b_out = (b if b is None else b.contiguous() for b in (b_in, b_out))
    plan = plan_for(assignments, w_in, w_out, x)
    with on_device(x):
        tiles = row_tiles(offsets, assignments, plan.up.m)
        hidden = x.new_empty(assignments, w_out.shape[2])
        up_projection(x, w_in, b_in, token_index, tiles, plan.up, activation, pre if save else None, hidden)
        rows = grouped_gemm(hidden, w_out, b_out, tiles, plan.down)
        return combine(rows, weight.contiguous(), token_lists(token_index, x.shape[0], place)), pre
