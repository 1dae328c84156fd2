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

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from . import memory
from .activations import get_activation

# Rows up to which W @ x.T beats x @ W.T: the library repacks its second factor.
FEW_ROWS = 32
# Elements of all outputs together up to which index_add beats sorting the assignments by token.
FEW_OUTPUTS = 1 << 15
# What oneDNN multiplies; the others go to a library that compiles nothing.
PADDED = (torch.bfloat16, torch.float16)


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


class Rows(NamedTuple):
    """Where the rows of one expert lie: `real` of them from `start`, computed as `padded` ones."""

    expert: int
    start: int
    real: int
    padded: int


def _rows(offsets: Tensor, dtype: torch.dtype) -> list[Rows]:
    """The experts that have rows."""
    bounds = enumerate(pairwise(offsets.tolist()))
    return [Rows(e, start, end - start, _padded(end - start, dtype)) for e, (start, end) in bounds if end > start]


def _cast(w: Tensor, dtype: torch.dtype) -> Tensor:
    return w if w.dtype == dtype else w.to(dtype)  # the check is cheaper than a call that does nothing


def _matmul(x: Tensor, w: Tensor, out: Tensor) -> None:
    """out [n, N] = x [n, K] @ w [K, N]."""
    n = x.shape[0]
    if n == 1:
        torch.mv(w.T, x[0], out=out[0])
    elif n <= FEW_ROWS:
        out.copy_((w.T @ x.T).T)
    else:
        torch.mm(x, w, out=out)


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
    (tokens, width), wide, hidden_dim = x.shape, w_in.shape[1], w_out.shape[2]
    experts = _rows(offsets, x.dtype)
    count, longest = token_index.numel(), max((r.padded for r in experts), default=0)
    # Padding rows of one expert are overwritten by the next one, so only the end needs room for them.
    pre = memory.empty((count + longest if save else longest, wide), x.dtype)
    sizes = ((count + longest, width), (longest, width), (longest, hidden_dim))
    outs, x_block, hidden = memory.blocks(sizes, x.dtype)
    for e, start, n, m in experts:
        torch.index_select(x, 0, token_index[start : start + n], out=x_block[:n])
        pre_e = pre[start : start + m] if save else pre[:m]
        _matmul(x_block[:m], _cast(w_in[e], x.dtype).T, pre_e)
        if b_in is not None:
            pre_e += b_in[e]
        act.forward_out(pre_e[:n], hidden[:n])
        out = outs[start : start + m]
        _matmul(hidden[:m], _cast(w_out[e], x.dtype).T, out)
        if b_out is not None:
            out += b_out[e]
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
    width, wide, hidden_dim = x.shape[1], w_in.shape[1], w_out.shape[2]
    experts = _rows(offsets, x.dtype)
    count, longest = token_index.numel(), max((r.padded for r in experts), default=0)
    dw_in = memory.empty_like(w_in) if need_in else nothing
    dw_out = memory.empty_like(w_out) if need_out else nothing
    db_in = torch.zeros_like(b_in) if b_in is not None and need_b_in else nothing
    db_out = torch.zeros_like(b_out) if b_out is not None and need_b_out else nothing
    dweight = weight.new_empty(weight.shape) if need_weight else nothing
    scales = weight.to(x.dtype)[:, None]
    widths = (width, width, hidden_dim, hidden_dim, hidden_dim, wide)
    sizes = [(longest, size) for size in widths]
    dx_rows, *scratch = memory.blocks([(count + longest if need_x else 0, width), *sizes], x.dtype)
    for e, start, n, m in experts:
        rows = slice(start, start + n)
        index, scale, pre_e = token_index[rows], scales[rows], pre[rows]
        padded = [block[:m] for block in scratch]
        x_m, g_m, _, hidden_m, d_hidden_m, d_pre_m = padded
        _, g, point, hidden, d_hidden, d_pre = padded if n == m else [block[:n] for block in scratch]
        if n < m:
            for block in (x_m, g_m, hidden_m, d_pre_m):
                block[n:].zero_()
        torch.index_select(dy, 0, index, out=g)
        act.forward_out(pre_e, hidden, point)
        if need_pre or need_weight:
            _matmul(g_m, _cast(w_out[e], x.dtype), d_hidden_m)
        if need_weight:
            product = torch.mul(d_hidden, hidden, out=d_pre[:, :hidden_dim])
            torch.sum(product, 1, dtype=weight.dtype, out=dweight[rows])
            if b_out is not None:
                dweight[rows] += g @ _cast(b_out[e], x.dtype)
        if need_out or need_b_out:
            g.mul_(scale)
        if need_b_out and b_out is not None:
            torch.sum(g, 0, dtype=b_out.dtype, out=db_out[e])
        if need_out:
            _product(g_m.T, hidden_m, dw_out[e])
        if not need_pre:
            continue
        act.backward_out(pre_e, d_hidden.mul_(scale), point, d_pre)
        if need_b_in and b_in is not None:
            torch.sum(d_pre, 0, dtype=b_in.dtype, out=db_in[e])
        if need_in:
            torch.index_select(x, 0, index, out=x_m[:n])
            _product(d_pre_m.T, x_m, dw_in[e])
        if need_x:
            _matmul(d_pre_m, _cast(w_in[e], x.dtype), dx_rows[start : start + m])
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
