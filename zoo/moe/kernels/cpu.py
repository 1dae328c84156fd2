"""Expert math on the CPU: a few experts at a time through small reused buffers, combined by one gather-and-sum.

T tokens, D width, F hidden, H = 2F (gated) or F, E experts, A assignments sorted by expert. A block is G experts of
about equal load with M rows each. What the speed rests on, measured on 2 cores with AMX:
- a block goes through gather, GEMM, activation and GEMM while it is in cache; only pre-activations, one output
  row per assignment and the gradients are large;
- oneDNN splits one GEMM of a few hundred rows badly over threads, two at once well: low precision takes pairs;
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
from .activations import Activation, get_activation

# Rows up to which W @ x.T and a transposition beat x @ W.T.
FEW_ROWS = 32
# Elements of all outputs together up to which index_add beats sorting the assignments by token.
FEW_OUTPUTS = 1 << 15
# What oneDNN multiplies; the others go to a library that compiles nothing and needs no company.
PADDED = (torch.bfloat16, torch.float16)
# Two neighbours share a block if the smaller one fills this share of it.
ALIKE = 0.8


def unsupported(x: Tensor, w_in: Tensor, w_out: Tensor, activation: str) -> str | None:
    """Why this backend cannot run these tensors, or None."""
    if x.device.type != "cpu":
        return f"it runs on the CPU, x is on {x.device.type}"
    if not x.dtype.is_floating_point or x.dtype.itemsize == 1:
        return f"it computes in float64, float32, bfloat16 and float16, not {x.dtype}"
    return None


class Block(NamedTuple):
    """`experts` selects G of them; `rows` are their assignments, computed as `padded` each from row `start` on."""

    experts: slice
    rows: tuple[slice, ...]
    padded: int
    start: int

    @property
    def span(self) -> slice:
        """The block's rows in buffers that hold padding too."""
        return slice(self.start, self.start + self.padded * len(self.rows))


def _padded(rows: int) -> int:
    """Rows to compute for `rows` real ones: 16 sizes an octave."""
    step = max(8, 1 << max(0, rows.bit_length() - 5)) if rows > 8 else 1
    return -(-rows // step) * step


def kept_rows(assignments: int, experts: int, dtype: torch.dtype) -> int:
    """Rows of the pre-activations kept for the backward: enough for any padding."""
    return assignments * 5 // 4 + 16 * experts if dtype in PADDED else assignments


def plan(offsets: Tensor, dtype: torch.dtype) -> list[Block]:
    """The blocks that cover every expert with rows; in low precision pairs of experts with about equal load."""
    bounds = enumerate(pairwise(offsets.tolist()))
    todo = [(end - start, e, slice(start, end)) for e, (start, end) in bounds if end > start]
    blocks: list[Block] = []
    if dtype not in PADDED:
        return [Block(slice(e, e + 1), (rows,), count, rows.start) for count, e, rows in todo]
    for count, e, rows in todo:
        last = blocks[-1] if blocks else None
        m = _padded(count)
        if last and len(last.rows) == 1 and last.experts.stop == e and _alike(m, last.padded):
            m = max(m, last.padded)
            blocks[-1] = Block(slice(e - 1, e + 1), (last.rows[0], rows), m, last.start)
        else:
            blocks.append(Block(slice(e, e + 1), (rows,), m, last.span.stop if last else 0))
    return blocks


def _alike(m: int, other: int) -> bool:
    return min(m, other) >= ALIKE * max(m, other)


def _bmm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out [G, M, N] = a [G, M, K] @ b [G, K, N]."""
    if a.dtype != out.dtype:
        out.copy_(a @ b)
    elif a.shape[0] == 1:
        torch.mm(a[0], b[0], out=out[0])
    else:
        torch.bmm(a, b, out=out)


def _linear(x: Tensor, w: Tensor, out: Tensor) -> None:
    """out [G, M, N] = x [G, M, K] @ w [G, N, K] transposed."""
    n = x.shape[1]
    if n > FEW_ROWS or (n < 4 and x.dtype not in PADDED):
        _bmm(x, w.mT, out)
    elif len(x) == 1:
        out[0].copy_(torch.mm(w[0], x[0].T).T)
    else:
        out.copy_((w @ x.mT).mT)


def _lay(rows: Tensor, block: Block) -> Tensor:
    """The first rows of a buffer [_, N] as a block, [G, M, N]."""
    g, m = len(block.rows), block.padded
    return rows[: g * m].view(g, m, rows.shape[1])


def _cast(w: Tensor, dtype: torch.dtype) -> Tensor:
    return w if w.dtype == dtype else w.to(dtype)  # the check is cheaper than a call that does nothing


def _gather(source: Tensor, token_index: Tensor, block: Block, out: Tensor) -> Tensor:
    """The block's rows of source [T, D], as [G, M, D] in the buffer `out`; padding is zero."""
    out = out[: block.padded * len(block.rows)].view(len(block.rows), block.padded, -1)
    for part, rows in zip(out, block.rows):
        count = rows.stop - rows.start
        torch.index_select(source, 0, token_index[rows], out=part[:count])
        if count < block.padded:
            part[count:].zero_()
    return out


def _combine(rows: Tensor, blocks: list[Block], token_index: Tensor, weight: Tensor | None, tokens: int) -> Tensor:
    """y[t] = sum of weight[a] * row of a over the assignments a of token t; rows as the blocks lie, y [T, D]."""
    if len(blocks) > 1 or (blocks and blocks[0].padded != token_index.numel()):
        place = torch.empty_like(token_index)
        for block in blocks:
            for i, part in enumerate(block.rows):
                first = block.start + i * block.padded
                torch.arange(first, first + part.stop - part.start, out=place[part])
    else:
        place = torch.arange(token_index.numel())
    if token_index.numel() * rows.shape[1] <= FEW_OUTPUTS:
        rows = rows[place] if weight is None else rows[place] * weight[:, None]
        return rows.new_zeros(tokens, rows.shape[1]).index_add_(0, token_index, rows)
    order = torch.argsort(token_index, stable=True)
    starts = torch.zeros(tokens + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(token_index, minlength=tokens), 0, out=starts[1:])
    per_sample = None if weight is None else weight[order]
    return torch.embedding_bag(rows, place[order], starts, False, 0, False, per_sample, True)[0]


def _one_token(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    weight: Tensor,
    offsets: Tensor,
    act: Activation,
) -> Tensor:
    """The output [1, D] of a single token: products of a matrix and a vector, and nothing else that takes time."""
    dtype, vector = x.dtype, x[0]
    outs = x.new_empty(weight.numel(), x.shape[1])
    for e, (start, end) in enumerate(pairwise(offsets.tolist())):
        if start == end:
            continue
        pre = torch.mv(_cast(w_in[e], dtype), vector)
        if b_in is not None:
            pre += b_in[e]
        out = torch.mv(_cast(w_out[e], dtype), act.forward(pre))
        if b_out is not None:
            out += b_out[e]
        outs[start:end] = out
    return weight.to(dtype)[None] @ outs


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
    """Outputs [T, D] and, when `save`, the pre-activations as the blocks lie (else an empty tensor)."""
    act, dtype = get_activation(activation), x.dtype
    (tokens, width), (experts, wide, _), hidden_dim = x.shape, w_in.shape, w_out.shape[2]
    if tokens == 1 and not save:
        return _one_token(x, w_in, w_out, b_in, b_out, weight, offsets, act), x.new_empty(0, wide)
    blocks = plan(offsets, dtype)
    total, largest = _sizes(blocks)
    kept = kept_rows(token_index.numel(), experts, dtype) if save else 0
    pre = memory.empty((kept if save else largest, wide), dtype)
    outs, x_rows, hidden_rows = memory.blocks([(total, width), (largest, width), (largest, hidden_dim)], dtype)
    for block in blocks:
        x_b = _gather(x, token_index, block, x_rows)
        pre_b = _lay(pre[block.start :] if save else pre, block)
        _linear(x_b, _cast(w_in[block.experts], dtype), pre_b)
        if b_in is not None:
            pre_b += b_in[block.experts, None]
        hidden = _lay(hidden_rows, block)
        act.forward_out(pre_b, hidden)
        out = _lay(outs[block.start :], block)
        _linear(hidden, _cast(w_out[block.experts], dtype), out)
        if b_out is not None:
            out += b_out[block.experts, None]
    y = _combine(outs, blocks, token_index, weight.to(dtype), tokens)
    return y, pre[:kept]


def _sizes(blocks: list[Block]) -> tuple[int, int]:
    """Rows of all blocks together, and of the largest one."""
    return max((b.span.stop for b in blocks), default=0), max((b.padded * len(b.rows) for b in blocks), default=0)


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
    act, dtype = get_activation(activation), x.dtype
    nothing = x.new_empty(0)
    need_x, need_in, need_out, need_b_in, need_b_out, need_weight = needs
    need_pre = need_x or need_in or need_b_in
    width, wide, hidden_dim = x.shape[1], w_in.shape[1], w_out.shape[2]
    blocks = plan(offsets, dtype)
    total, largest = _sizes(blocks)
    dw_in = memory.empty_like(w_in) if need_in else nothing
    dw_out = memory.empty_like(w_out) if need_out else nothing
    db_in = torch.zeros_like(b_in) if b_in is not None and need_b_in else nothing
    db_out = torch.zeros_like(b_out) if b_out is not None and need_b_out else nothing
    dweight = weight.new_empty(weight.shape) if need_weight else nothing
    widths = (width, width, wide, hidden_dim, hidden_dim, hidden_dim)
    sizes = [(total if need_x else 0, width), *((largest, size) for size in widths)]
    dx_rows, x_rows, g_rows, d_pre_rows, *hidden_rows = memory.blocks(sizes, dtype)
    for block in blocks:
        pre_b, d_pre = _lay(pre[block.start :], block), _lay(d_pre_rows, block)
        point, hidden, d_hidden = (_lay(rows, block) for rows in hidden_rows)
        g, scale = _gather(dy, token_index, block, g_rows), _spread(weight, block, dtype)
        act.forward_out(pre_b, hidden, point)
        if need_pre or need_weight:
            _bmm(g, _cast(w_out[block.experts], dtype), d_hidden)
        if need_weight:
            products = torch.mul(d_hidden, hidden, out=d_pre[..., :hidden_dim]).sum(-1, dtype=weight.dtype)
            if b_out is not None:
                products += (g @ _cast(b_out[block.experts], dtype)[..., None])[..., 0]
            for part, rows in zip(products, block.rows):
                dweight[rows] = part[: rows.stop - rows.start]
        if need_out or need_b_out:
            g.mul_(scale)
        if need_b_out and b_out is not None:
            db_out[block.experts] = g.sum(1, dtype=b_out.dtype)
        if need_out:
            _bmm(g.mT, hidden, dw_out[block.experts])
        if not need_pre:
            continue
        act.backward_out(pre_b, d_hidden.mul_(scale), point, d_pre)
        if need_b_in and b_in is not None:
            db_in[block.experts] = d_pre.sum(1, dtype=b_in.dtype)
        if need_in:
            _bmm(d_pre.mT, _gather(x, token_index, block, x_rows), dw_in[block.experts])
        if need_x:
            _bmm(d_pre, _cast(w_in[block.experts], dtype), _lay(dx_rows[block.start :], block))
    _zero_idle(offsets, dw_in, dw_out)
    dx = _combine(dx_rows, blocks, token_index, None, x.shape[0]) if need_x else nothing
    return [dx, dw_in, dw_out, db_in, db_out, dweight]


def _spread(weight: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """The combine weights of a block, [G, M, 1]; padding gets zero."""
    out = torch.zeros(len(block.rows), block.padded, 1, dtype=dtype)
    for part, rows in zip(out, block.rows):
        part[: rows.stop - rows.start, 0] = weight[rows]
    return out


def _zero_idle(offsets: Tensor, *grads: Tensor) -> None:
    """Zero the weight gradients of experts without rows; the others were written whole."""
    for e in (offsets.diff() == 0).nonzero()[:, 0].tolist():
        for grad in grads:
            if grad.numel():
                grad[e].zero_()
