"""Expert math on the CPU: one expert after the other through small reused buffers, combined by one gather-and-sum.

T tokens, D width, F hidden, H = 2F (gated) or F, E experts, A assignments sorted by expert; n rows of one expert.
What the speed rests on, measured on 2 cores with AMX:
- an expert's rows go through gather, GEMM, activation and GEMM while they are in cache; only pre-activations,
  one output row per assignment and the gradients are large;
- oneDNN compiles a GEMM for each new shape in about 4 ms, 20 times what the GEMM takes, so low-precision blocks
  are padded with zero rows to a few sizes;
- the results of all experts are summed per token by `embedding_bag`, one pass that accumulates in float32;
- large buffers come from `memory`, which reuses pages: fresh ones cost up to half as much as the GEMMs.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from . import memory
from .activations import get_activation

# Rows up to which W @ x.T beats x @ W.T: the library repacks its second factor.
FEW_ROWS = 32
# Elements of all outputs together up to which index_add beats sorting the assignments by token.
PADDED = (torch.bfloat16, torch.float16)
MANY_ROWS = 448
FEW_OUTPUTS = 1 << 15


def unsupported(x: Tensor, w_in: Tensor, w_out: Tensor, activation: str) -> str | None:
    """Why this backend cannot run these tensors, or None."""
    if x.device.type != "cpu":
        return f"it runs on the CPU, x is on {x.device.type}"
    if not x.dtype.is_floating_point or x.dtype.itemsize == 1:
        return f"it computes in float64, float32, bfloat16 and float16, not {x.dtype}"
    return None


def _padded(rows: int, dtype: torch.dtype) -> int:
    """Rows to compute for `rows` real ones: 16 sizes an octave where oneDNN would compile for each."""
    if dtype not in PADDED:
        return rows
    step = max(8, 1 << max(0, rows.bit_length() - 5)) if rows > 8 else 1
    return -(-rows // step) * step


def _blocks(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, each with its slice of the assignments."""
    bounds = offsets.tolist()
    for e, (start, end) in enumerate(pairwise(bounds)):
        if end > start:
            yield e, slice(start, end)


def _longest(offsets: Tensor, dtype: torch.dtype) -> int:
    return max((_padded(rows.stop - rows.start, dtype) for _, rows in _blocks(offsets)), default=0)


def _matmul(x: Tensor, w: Tensor, out: Tensor) -> None:
    """out [n, N] = x [n, K] @ w [K, N]."""
    n = x.shape[0]
    if n == 1:
        torch.mv(w.T, x[0], out=out[0])
    elif n <= FEW_ROWS:
        out.copy_((w.T @ x.T).T)
    elif n <= MANY_ROWS or x.dtype not in PADDED:
        torch.mm(x, w, out=out)
    else:
        parts = -(-n // MANY_ROWS)
        step = _padded(-(-n // parts), x.dtype)
        for i in range(0, n, step):
            torch.mm(x[i : i + step], w, out=out[i : i + step])


def _combine(rows: Tensor, token_index: Tensor, weight: Tensor | None, num_tokens: int) -> Tensor:
    """y[t] = sum of weight[a] * rows[a] over the assignments a of token t; rows [A, D], y [T, D]."""
    if rows.numel() <= FEW_OUTPUTS:
        scaled = rows if weight is None else rows * weight[:, None]
        return rows.new_zeros(num_tokens, rows.shape[1]).index_add_(0, token_index, scaled)
    order = torch.argsort(token_index, stable=True)
    starts = torch.zeros(num_tokens + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(token_index, minlength=num_tokens), 0, out=starts[1:])
    per_sample = None if weight is None else weight[order]
    return torch.embedding_bag(rows, order, starts, False, 0, False, per_sample, True)[0]


def forward(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    weight: Tensor,
    token_index: Tensor,
    offsets: Tensor,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs [T, D] and, when `save`, the pre-activations [A, H] (else an empty tensor)."""
    act = get_activation(activation)
    (tokens, width), (_, wide, _), hidden_dim = x.shape, w_in.shape, w_out.shape[2]
    count, longest = token_index.numel(), _longest(offsets, x.dtype)
    # Padding rows of one expert are overwritten by the next one, so only the end needs room for them.
    pre = memory.empty((count + longest if save else longest, wide), x.dtype)
    outs = memory.empty((count + longest, width), x.dtype)
    x_block = memory.empty((longest, width), x.dtype)
    hidden_block = memory.empty((longest, hidden_dim), x.dtype)
    for e, rows in _blocks(offsets):
        n = rows.stop - rows.start
        m = _padded(n, x.dtype)
        torch.index_select(x, 0, token_index[rows], out=x_block[:n])
        start = rows.start if save else 0
        _matmul(x_block[:m], w_in[e].T.to(x.dtype), pre[start : start + m])
        if b_in is not None:
            pre[start : start + n] += b_in[e]
        act.forward_out(pre[start : start + n], hidden_block[:n])
        _matmul(hidden_block[:m], w_out[e].T.to(x.dtype), outs[rows.start : rows.start + m])
        if b_out is not None:
            outs[rows] += b_out[e]
    y = _combine(outs[:count], token_index, weight.to(x.dtype), tokens)
    return y, pre[: count if save else 0]


def backward(
    dy: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    weight: Tensor,
    pre: Tensor,
    token_index: Tensor,
    offsets: Tensor,
    activation: str,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, w_in, w_out, b_in, b_out and weight; an empty tensor for each that is not needed."""
    act = get_activation(activation)
    nothing = x.new_empty(0)
    need_x, need_in, need_out, need_b_in, need_b_out, need_weight = needs
    need_pre = need_x or need_in or need_b_in
    (_, width), (_, wide, _), hidden_dim = x.shape, w_in.shape, w_out.shape[2]
    count, longest = token_index.numel(), _longest(offsets, x.dtype)
    dx_rows = memory.empty((count + longest, width), x.dtype) if need_x else nothing
    dw_in = memory.empty_like(w_in) if need_in else nothing
    dw_out = memory.empty_like(w_out) if need_out else nothing
    db_in = torch.zeros_like(b_in) if b_in is not None and need_b_in else nothing
    db_out = torch.zeros_like(b_out) if b_out is not None and need_b_out else nothing
    dweight = weight.new_empty(weight.shape) if need_weight else nothing
    x_block, g_block = (memory.empty((longest, width), x.dtype) for _ in range(2))
    point, hidden, d_hidden = (memory.empty((longest, hidden_dim), x.dtype) for _ in range(3))
    d_pre = memory.empty((longest, wide), x.dtype)
    for e, rows in _blocks(offsets):
        n = rows.stop - rows.start
        m = _padded(n, x.dtype)
        g = g_block[:n]
        for block in (x_block, g_block, hidden, d_pre):
            block[n:m].zero_()
        torch.index_select(dy, 0, token_index[rows], out=g)
        scale = weight[rows, None].to(x.dtype)
        act.forward_out(pre[rows], hidden[:n], point[:n])
        if need_pre or need_weight:
            _matmul(g_block[:m], w_out[e].to(x.dtype), d_hidden[:m])
        if need_weight:
            torch.mul(d_hidden[:n], hidden[:n], out=d_pre[:n, :hidden_dim])
            torch.sum(d_pre[:n, :hidden_dim], 1, dtype=weight.dtype, out=dweight[rows])
            if b_out is not None:
                dweight[rows] += g @ b_out[e].to(x.dtype)
        if need_out or need_b_out:
            g.mul_(scale)
        if need_b_out and b_out is not None:
            torch.sum(g, 0, dtype=b_out.dtype, out=db_out[e])
        if need_out:
            _product(g_block[:m].T, hidden[:m], dw_out[e])
        if not need_pre:
            continue
        act.backward_out(pre[rows], d_hidden[:n].mul_(scale), point[:n], d_pre[:n])
        if need_b_in and b_in is not None:
            torch.sum(d_pre[:n], 0, dtype=b_in.dtype, out=db_in[e])
        if need_in:
            torch.index_select(x, 0, token_index[rows], out=x_block[:n])
            _product(d_pre[:m].T, x_block[:m], dw_in[e])
        if need_x:
            _matmul(d_pre[:m], w_in[e].to(x.dtype), dx_rows[rows.start : rows.start + m])
    _zero_idle(offsets, dw_in, dw_out)
    dx = _combine(dx_rows[:count], token_index, None, x.shape[0]) if need_x else nothing
    return [dx, dw_in, dw_out, db_in, db_out, dweight]


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, through a buffer where out has another dtype."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def _zero_idle(offsets: Tensor, *grads: Tensor) -> None:
    """Zero the weight gradients of experts without rows; the others were written whole."""
    for e in (offsets.diff() == 0).nonzero()[:, 0].tolist():
        for grad in grads:
            if grad.numel():
                grad[e].zero_()
