"""Expert math on the CPU: a few experts at a time through small reused buffers, combined by one gather-and-sum.

T tokens, D width, F hidden, H = 2F (gated) or F, E experts, A assignments sorted by expert. A block is G experts of
about equal load with M rows each (see `blocks`). What the speed rests on, beside the products (see `products`):
- a block goes through gather, GEMM, activation and GEMM while it is in cache; only pre-activations, one output
  row per assignment and the gradients are large;
- in low precision oneDNN rearranges the right factor of a product, and a left one that does not lie by rows. With
  pre-activations by columns, W @ x.T, it rearranges tokens and not weights: with AMX up to half the time of a forward.
  The backward gains where it rearranges gradients of pre-activations less often, and loses as much if experts are big;
- combine weights scale tokens and their gradients, [M, D], never hidden units;
- the results of all experts are summed per token by `embedding_bag`, one pass that accumulates in float32;
- small experts with few rows are left to torch's grouped GEMM, whose loop over them is not Python's;
- large buffers come from `memory`, which reuses pages: fresh ones cost up to half as much as the GEMMs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import grouped_mm, memory
from .activations import Activation, get_activation
from .blocks import Block, Plan, kept_rows, plan
from .products import (
    FEW_ROWS,
    LARGER_WEIGHT,
    LOW_PRECISION,
    bmm,
    cast,
    linear,
    linear_of_few,
    reads_by_onednn,
    very_few,
)

# Rows an expert has on average up to which there are few, FEW_ROWS in float32: above, oneDNN would compile too much.
FEW_UNPADDED = 8
# Elements of all outputs together up to which index_add beats sorting the assignments by token.
FEW_OUTPUTS = 1 << 15
# Multiplications that a forward takes of a busy expert, on average, up to which torch's loop over experts costs less.
TINY = 1 << 20
# Elements of w_in of one expert up to which forward and backward together gain from pre-activations by columns.
SMALL_EXPERT = 1 << 19


def unsupported(x: Tensor, w_in: Tensor, w_out: Tensor, activation: str) -> str | None:
    """Why this backend cannot run these tensors, or None."""
    if x.device.type != "cpu":
        return f"it runs on the CPU, x is on {x.device.type}"
    if not x.dtype.is_floating_point or x.dtype.itemsize == 1:
        return f"it computes in float64, float32, bfloat16 and float16, not {x.dtype}"
    return None


def _by_columns(w_in: Tensor, dtype: torch.dtype, save: bool) -> bool:
    """Whether pre-activations and hidden units lie by columns; a backward must come to the same answer."""
    return dtype in LOW_PRECISION and (not save or w_in[0].numel() <= SMALL_EXPERT)


def _lay(buffer: Tensor, block: Block, columns: bool = False) -> Tensor:
    """The first elements of a buffer [_, N] as a block [G, M, N] that lies by rows or by columns."""
    part = buffer[: block.size * block.rows]
    if columns:
        return part.view(block.size, buffer.shape[1], block.rows).mT
    return part.view(block.size, block.rows, buffer.shape[1])


def _gather(source: Tensor, steps: Plan, block: Block, out: Tensor) -> Tensor:
    """The block's rows of source [T, D], as [G, M, D] in the buffer `out`."""
    out = _lay(out, block)
    torch.index_select(source, 0, steps.token[block.span], out=out.view(-1, out.shape[2]))
    return out


def _combine(rows: Tensor, steps: Plan, token_index: Tensor, weight: Tensor, tokens: int) -> Tensor:
    """y[t] = sum of weight[a] * row of a over the assignments a of token t; rows [P, D], y [T, D]."""
    if token_index.numel() * rows.shape[1] <= FEW_OUTPUTS:
        rows = steps.collect(rows) * weight[:, None]
        return rows.new_zeros(tokens, rows.shape[1]).index_add_(0, token_index, rows)
    order = torch.argsort(token_index, stable=True)
    starts = torch.zeros(tokens + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(token_index, minlength=tokens), 0, out=starts[1:])
    places = order if steps.place is None else steps.place[order]
    return torch.embedding_bag(rows, places, starts, False, 0, False, weight[order], True)[0]


def _torch_is_quicker(x: Tensor, w_in: Tensor, w_out: Tensor, offsets: Tensor) -> bool:
    """Whether `_few` would do the products of torch's grouped GEMM, whose loop over all experts costs less."""
    if len(x) == 1 or reads_by_onednn(w_in[0], LARGER_WEIGHT) or not _torch_can(x, w_in, w_out):
        return False
    few = w_in.is_contiguous() and w_out.is_contiguous() and max(offsets.diff().tolist()) <= 2 * very_few(w_in[0])
    return few or _is_tiny(x, w_in, w_out, offsets)


def _torch_can(x: Tensor, w_in: Tensor, w_out: Tensor) -> bool:
    """Whether torch's grouped GEMM takes these, in float32."""
    same = x.dtype == w_in.dtype == w_out.dtype == torch.float32
    return same and not grouped_mm.unsupported(x, w_in, w_out, "")


def _is_tiny(x: Tensor, w_in: Tensor, w_out: Tensor, offsets: Tensor) -> bool:
    """Whether calls, of which torch's grouped GEMM needs fewest, would take longer than products."""
    loads = [load for load in offsets.diff().tolist() if load]
    work = sum(loads) * (w_in[0].numel() + w_out[0].numel())
    return bool(loads) and work <= TINY * len(loads) and _torch_can(x, w_in, w_out)


def _few(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    weight: Tensor,
    token_index: Tensor,
    offsets: Tensor,
    act: Activation,
) -> Tensor:
    """The outputs [T, D] of a few tokens, as in decoding: two products an expert and as little else as possible."""
    dtype, count = x.dtype, token_index.numel()
    busy = [(e, load) for e, load in enumerate(offsets.diff().tolist()) if load]
    loads = [load for _, load in busy]
    rows = x.index_select(0, token_index)
    pre, out = x.new_empty(count, w_in.shape[1]), x.new_empty(count, x.shape[1])
    for (e, _), x_e, out_e in zip(busy, rows.split(loads), pre.split(loads)):
        linear_of_few(x_e, w_in[e], None if b_in is None else b_in[e], out_e)
    hidden = act.forward(pre)
    for (e, _), x_e, out_e in zip(busy, hidden.split(loads), out.split(loads)):
        linear_of_few(x_e, w_out[e], None if b_out is None else b_out[e], out_e)
    weight = weight.to(dtype)
    if len(x) == 1:
        return out.mul_(weight[:, None]).sum(0, keepdim=True)
    return x.new_zeros(x.shape).index_add_(0, token_index, out.mul_(weight[:, None]))


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
    if not save and token_index.numel() <= (FEW_UNPADDED if dtype in LOW_PRECISION else FEW_ROWS) * experts:
        if _torch_is_quicker(x, w_in, w_out, offsets):
            tensors = (x, w_in, w_out, b_in, b_out, weight, token_index, offsets)
            return grouped_mm.forward(*tensors, activation, False)
        return _few(x, w_in, w_out, b_in, b_out, weight, token_index, offsets, act), x.new_empty(0, wide)
    count = token_index.numel()
    kept = kept_rows(count, experts, dtype) if save else 0
    if save and _is_tiny(x, w_in, w_out, offsets):
        y, rows = grouped_mm.forward(x, w_in, w_out, b_in, b_out, weight, token_index, offsets, activation, True)
        return y, rows if kept == count else torch.nn.functional.pad(rows, (0, 0, 0, kept - count))
    steps, columns = plan(token_index, offsets, w_in, w_out, dtype), _by_columns(w_in, dtype, save)
    largest = steps.largest
    pre = memory.empty((kept if save else largest, wide), dtype)
    sizes = [(len(steps.token), width), (largest, width), (largest, hidden_dim)]
    out_rows, x_rows, hidden_rows = memory.blocks(sizes, dtype)
    if save:
        pre[len(steps.token) :] = 0  # nobody reads those, but the same call gives the same
    for block in steps.blocks:
        x_b, out = _gather(x, steps, block, x_rows), _lay(out_rows[block.span], block)
        pre_b = _lay(pre[block.start :] if save else pre, block, columns)
        hidden = _lay(hidden_rows, block, columns)
        linear(x_b, cast(w_in[block.experts], dtype), pre_b)
        if b_in is not None:
            pre_b += b_in[block.experts, None]
        act.forward_out(pre_b, hidden)
        linear(hidden, cast(w_out[block.experts], dtype), out)
        if b_out is not None:
            out += b_out[block.experts, None]
    return _combine(out_rows, steps, token_index, weight.to(dtype), tokens), pre[:kept]


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
    if _is_tiny(x, w_in, w_out, offsets):
        pre = pre[: token_index.numel()]
        saved = (dy, x, w_in, w_out, b_in, b_out, weight, pre, token_index, offsets)
        return grouped_mm.backward(*saved, activation, needs)
    act, dtype = get_activation(activation), x.dtype
    nothing = x.new_empty(0)
    need_x, need_in, need_out, need_b_in, need_b_out, need_weight = needs
    need_pre = need_x or need_in or need_b_in
    width, wide, hidden_dim = x.shape[1], w_in.shape[1], w_out.shape[2]
    steps, columns = plan(token_index, offsets, w_in, w_out, dtype), _by_columns(w_in, dtype, True)
    total, largest = len(steps.token), steps.largest
    scales = steps.spread(weight.to(dtype))
    dw_in = memory.empty_like(w_in) if need_in else nothing
    dw_out = memory.empty_like(w_out) if need_out else nothing
    db_in = torch.zeros_like(b_in) if b_in is not None and need_b_in else nothing
    db_out = torch.zeros_like(b_out) if b_out is not None and need_b_out else nothing
    dots = weight.new_empty(total if need_weight else 0)
    widths = (width, width, wide, hidden_dim, hidden_dim, hidden_dim)
    sizes = [(total if need_x else 0, width), *((largest, size) for size in widths)]
    dx_rows, x_rows, g_rows, d_pre_rows, *hidden_rows = memory.blocks(sizes, dtype)
    for block in steps.blocks:
        pre_b, d_pre = _lay(pre[block.start :], block, columns), _lay(d_pre_rows, block, columns)
        point, hidden, d_hidden = (_lay(rows, block, columns) for rows in hidden_rows)
        # The gradient of the experts' outputs is g * scale. Everything up to d_pre is linear in it and made from g,
        # as the gradient of the combine weights needs it; `scale` joins at the end, on the narrow factors.
        g, scale = _gather(dy, steps, block, g_rows), scales[block.span].view(block.size, block.rows, 1)
        act.forward_out(pre_b, hidden, point)
        if need_pre or need_weight:
            bmm(g, cast(w_out[block.experts], dtype), d_hidden)
        if need_weight:
            products = torch.mul(d_hidden, hidden, out=d_pre[..., :hidden_dim]).sum(-1, dtype=weight.dtype)
            if b_out is not None:
                products += (g @ cast(b_out[block.experts], dtype)[..., None])[..., 0]
            dots[block.span] = products.view(-1)
        if need_out or need_b_out:
            g.mul_(scale)
        if need_b_out and b_out is not None:
            db_out[block.experts] = g.sum(1, dtype=b_out.dtype)
        if need_out:
            bmm(g.mT, hidden, dw_out[block.experts])
        if not need_pre:
            continue
        act.backward_out(pre_b, d_hidden, point, d_pre)
        if need_b_in and b_in is not None:
            db_in[block.experts] = (scale.mT @ d_pre)[:, 0].to(b_in.dtype)
        if need_in:
            bmm(d_pre.mT, _gather(x, steps, block, x_rows).mul_(scale), dw_in[block.experts])
        if need_x:
            bmm(d_pre, cast(w_in[block.experts], dtype), _lay(dx_rows[block.span], block))
    _zero_idle(offsets, dw_in, dw_out)
    dx = _combine(dx_rows, steps, token_index, weight.to(dtype), x.shape[0]) if need_x else nothing
    return [dx, dw_in, dw_out, db_in, db_out, steps.collect(dots) if need_weight else nothing]


def _zero_idle(offsets: Tensor, *grads: Tensor) -> None:
    """Zero the weight gradients of experts without rows; the others were written whole."""
    for e in (offsets.diff() == 0).nonzero()[:, 0].tolist():
        for grad in grads:
            if grad.numel():
                grad[e].zero_()
