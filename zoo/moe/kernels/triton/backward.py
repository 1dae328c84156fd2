"""Backward of the expert computation from x, the pre-activations and the routing: nothing else was kept.

With dA' = dY W_out^T, gathered, the gradient of a combine weight is <dA', A> (+ <dY, b_out>), so the expert
outputs are not needed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import constants, hidden_grads, hidden_units
from .combine import combine, d_combine, token_lists
from .decode import rescaled
from .expert_grads import d_bias, d_weight
from .forward import unit_stride
from .gemm import grouped_gemm, product
from .numerics import quarters, store
from .plans import Tile
from .schedule import RowTiles, grouped_order, on_device, row_tiles
from .tiles import input_precision, plan_for
from .weights import Coded, weight_arguments


@triton.jit
def epilogue(
    acc: tl.tensor,
    pre: tl.tensor,
    d_pre: tl.tensor,
    scaled: tl.tensor,
    scale: tl.tensor,
    row: tl.tensor,
    live: tl.tensor,
    n: tl.tensor,
    F: tl.tensor,
    FORM: tl.constexpr,
    GATED: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFTED: tl.constexpr,
) -> tl.tensor:
    """Store d_pre and weight * hidden of some columns n; give <dA', hidden> over them."""
    H = 2 * F if GATED else F
    inside = live[:, None] & (n < F)[None, :]
    gate = tl.load(pre + row[:, None] * H + n[None, :], mask=inside, other=0.0).to(tl.float32)
    up = gate
    if GATED:
        up = tl.load(pre + row[:, None] * H + F + n[None, :], mask=inside, other=0.0).to(tl.float32)
    hidden = hidden_units(gate, up, FORM, GATED, LIMIT, SHIFTED)
    if scaled is not None:
        store(scaled + row[:, None] * F + n[None, :], hidden * scale, inside)
    if d_pre is not None:
        d_gate, d_up = hidden_grads(gate, up, acc * scale, FORM, GATED, LIMIT, SHIFTED)
        store(d_pre + row[:, None] * H + n[None, :], d_gate, inside)
        if GATED:
            store(d_pre + row[:, None] * H + F + n[None, :], d_up, inside)
    return tl.sum(acc * hidden, 1)


@triton.jit
def d_hidden_kernel(
    dy: tl.tensor,
    pre: tl.tensor,
    weight: tl.tensor,
    token_index: tl.tensor,
    tile_expert: tl.tensor,
    tile_row: tl.tensor,
    offsets: tl.tensor,
    d_pre: tl.tensor,
    scaled: tl.tensor,
    partial: tl.tensor,
    num_tiles: tl.tensor,
    E: tl.tensor,
    A: tl.tensor,
    D: tl.tensor,
    F: tl.tensor,
    stride_yt: tl.tensor,
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
    """dA'[a, n] = dy[token[a]] . w[e, :, n]; from it d_pre, weight * hidden, and <dA', hidden> over these columns."""
    tile, tile_n = grouped_order(tl.program_id(0), num_tiles, tl.cdiv(F, BLOCK_N), GROUP)
    e = tl.load(tile_expert + tile)
    if e >= E:
        return
    m = tl.load(tile_row + tile) + tl.arange(0, BLOCK_M)
    live = m < tl.load(offsets + e + 1)
    # Rows past the expert's end read token 0 instead of a mask: what they compute is not stored.
    token = tl.load(token_index + m, mask=live, other=0).to(tl.int64)
    left = dy + token[:, None] * stride_yt + tl.arange(0, BLOCK_K)[None, :]
    if FORMAT is not None:
        scales += e.to(tl.int64) * stride_se
    acc = product(
        left,
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32),
        e,
        tile_n * BLOCK_N,
        F,
        D,
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
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = rescaled(acc, scales, n, F, stride_sn, dy.dtype.element_ty, FORMAT, ALONG_K)
    row = m.to(tl.int64)
    scale = tl.load(weight + m, mask=live, other=0.0).to(tl.float32)[:, None]
    # A quarter of the columns at a time: the registers of all would not fit beside the accumulator.
    parts = quarters(acc, BLOCK_M, BLOCK_N)
    total = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.static_range(4):
        n = tile_n * BLOCK_N + i * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
        total += epilogue(parts[i], pre, d_pre, scaled, scale, row, live, n, F, FORM, GATED, LIMIT, SHIFTED)
    if partial is not None:
        store(partial + tile_n.to(tl.int64) * A + m, total, live)


def d_hidden(
    dy: Tensor,
    w_out: Tensor | Coded,
    pre: Tensor,
    weight: Tensor,
    token_index: Tensor,
    tiles: RowTiles,
    tile: Tile,
    activation: str,
    d_pre: Tensor | None,
    scaled: Tensor | None,
    partial: Tensor | None,
) -> None:
    """Fill those that are given: d_pre [A, H], weight * hidden [A, F], and <dA', hidden> by column tile, [*, A]."""
    experts, depth, width = w_out.shape
    d_hidden_kernel[(len(tiles) * triton.cdiv(width, tile.n),)](
        dy,
        pre,
        weight,
        token_index,
        tiles.expert,
        tiles.row,
        tiles.offsets,
        d_pre,
        scaled,
        partial,
        len(tiles),
        experts,
        pre.shape[0],
        depth,
        width,
        dy.stride(0),
        **weight_arguments(w_out.transpose(1, 2), tile),
        **constants(activation),
        EVEN_K=depth % tile.k == 0,
        PRECISION=input_precision(dy),
        **tile.options(),
    )


def backward(
    dy: Tensor,
    x: Tensor,
    w_in: Tensor | Coded,
    w_out: Tensor | Coded,
    b_in: Tensor | None,
    b_out: Tensor | None,
    weight: Tensor,
    pre: Tensor,
    token_index: Tensor,
    offsets: Tensor,
    activation: str,
    needs: list[bool],
    place: Tensor | None = None,
) -> list[Tensor]:
    """Gradients of x, w_in, w_out, b_in, b_out and weight; an empty tensor for each that is not needed."""
    given = (x, w_in, w_out, b_in, b_out, weight)
    need_x, need_w_in, need_w_out, need_b_in, need_b_out, need_weight = (
        n and t is not None for n, t in zip(needs, given)
    )
    # Filled below, but for dx, which is the last step's own output.
    grads = [
        torch.empty_like(t) if isinstance(t, Tensor) and n else x.new_empty(0)
        for t, n in zip(given, (False, *needs[1:]))
    ]
    _, dw_in, dw_out, db_in, db_out, dweight = grads
    assignments = token_index.shape[0]
    if assignments == 0:
        return [x.new_zeros(x.shape) if need_x else grads[0], *(g.zero_() for g in grads[1:])]
    dy, x = unit_stride(dy), unit_stride(x)
    token_index, weight = token_index.contiguous(), weight.contiguous()
    plan = plan_for(assignments, w_in, w_out, x, dy)
    with on_device(x):
        tiles = row_tiles(offsets, assignments, plan.d_hidden.m)
        d_pre = torch.empty_like(pre) if need_x or need_w_in or need_b_in else None
        scaled = x.new_empty(assignments, w_out.shape[2]) if need_w_out else None
        columns = triton.cdiv(w_out.shape[2], plan.d_hidden.n)
        partial = x.new_empty(columns, assignments, dtype=torch.float32) if need_weight else None
        wanted = (d_pre, scaled, partial)
        if any(t is not None for t in wanted):
            d_hidden(dy, w_out, pre, weight, token_index, tiles, plan.d_hidden, activation, *wanted)
        if partial is not None:
            d_combine(partial, dy, None if b_out is None else b_out.contiguous(), token_index, tiles, dweight)
        if scaled is not None:
            d_weight(dy, scaled, token_index, tiles.offsets, True, plan.d_weight, dw_out)
        del wanted, scaled, partial  # before the next large buffer
        if need_b_out:
            d_bias(dy, token_index, weight, tiles.offsets, db_out)
        if d_pre is not None and need_b_in:
            d_bias(d_pre, token_index, None, tiles.offsets, db_in)
        if d_pre is not None and need_w_in:
            d_weight(d_pre, x, token_index, tiles.offsets, False, plan.d_weight, dw_in)
        if d_pre is not None and need_x:
            rows = grouped_gemm(d_pre, w_in.transpose(1, 2), None, tiles, plan.d_x)
            grads[0] = combine(rows, None, token_lists(token_index, x.shape[0], place))
    return grads
