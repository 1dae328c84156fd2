"""Expert math on torch's own grouped GEMM, `torch.nn.functional.grouped_mm`, where its constraints allow.

T tokens, D width, F hidden, H = 2F (gated) or F, E experts, A assignments sorted by expert.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .activations import get_activation
from .portable import expert_of_rows

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ALIGNMENT = 16  # bytes; the GEMM refuses rows that start elsewhere


def unsupported(x: Tensor, w_in: Tensor, w_out: Tensor, activation: str) -> str | None:
    """Why this backend cannot run these tensors, or None."""
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm"
    if x.dtype not in DTYPES:
        return f"torch's grouped GEMM takes bfloat16, float16 and float32, not {x.dtype}"
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "torch's grouped GEMM needs a GPU of compute capability 8.0 or newer"
    if x.device.type not in ("cpu", "cuda"):
        return f"torch's grouped GEMM runs on CPU and CUDA, x is on {x.device}"
    for name, size in (("D", w_out.shape[1]), ("F", w_out.shape[2])):
        if size * x.dtype.itemsize % ALIGNMENT:
            return f"torch's grouped GEMM needs rows of whole {ALIGNMENT} bytes, {name} = {size} in {x.dtype} has not"
    return None


def aligned(w: Tensor) -> Tensor:
    """A factor as the GEMM can read it: contiguous and starting at a multiple of 16 bytes."""
    w = w.contiguous()
    return w.clone() if w.data_ptr() % ALIGNMENT else w


def _combine(rows: Tensor, token_index: Tensor, num_tokens: int) -> Tensor:
    """Sum rows [A, D] into their tokens [T, D], in float32."""
    y = rows.new_zeros(num_tokens, rows.shape[1], dtype=torch.float32)
    return y.index_add_(0, token_index, rows.float()).to(rows.dtype)


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
    nothing = x.new_empty(0, w_in.shape[1])
    count, ends = token_index.numel(), offsets[1:]
    if not count:
        return x.new_zeros(x.shape), nothing
    pre = F.grouped_mm(x[token_index], aligned(w_in).transpose(1, 2), offs=ends)
    if b_in is not None:
        pre += b_in[expert_of_rows(offsets, count)]
    out = F.grouped_mm(get_activation(activation).forward(pre), aligned(w_out).transpose(1, 2), offs=ends)
    if b_out is not None:
        out += b_out[expert_of_rows(offsets, count)]
    y = _combine(out * weight[:, None].to(out.dtype), token_index, x.shape[0])
    return y, pre if save else nothing


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
    nothing = x.new_empty(0)
    inputs = (x, w_in, w_out, b_in, b_out, weight)
    count, ends = token_index.numel(), offsets[1:]
    if not count:
        return [t.new_zeros(t.shape) if t is not None and n else nothing for t, n in zip(inputs, needs)]
    act = get_activation(activation)
    need_x, need_in, need_out, need_b_in, need_b_out, need_weight = needs
    dx = dw_in = dw_out = db_in = db_out = dweight = nothing
    scale = weight[:, None].to(x.dtype)
    g, hidden = dy[token_index], act.forward(pre)
    d_hidden = F.grouped_mm(g, aligned(w_out), offs=ends)
    if need_weight:
        dweight = (d_hidden * hidden).sum(-1, dtype=weight.dtype)
        if b_out is not None:
            dweight += (g * b_out[expert_of_rows(offsets, count)]).sum(-1, dtype=weight.dtype)
    g = g * scale
    if need_out:
        dw_out = F.grouped_mm(g.T, hidden, offs=ends)
    if need_b_out and b_out is not None:
        db_out = _sum_rows(g, b_out, offsets)
    d_pre = act.backward(pre, d_hidden * scale)
    if need_in:
        dw_in = F.grouped_mm(d_pre.T, x[token_index], offs=ends)
    if need_b_in and b_in is not None:
        db_in = _sum_rows(d_pre, b_in, offsets)
    if need_x:
        dx = _combine(F.grouped_mm(d_pre, aligned(w_in), offs=ends), token_index, x.shape[0])
    return [dx, dw_in, dw_out, db_in, db_out, dweight]


def _sum_rows(rows: Tensor, bias: Tensor, offsets: Tensor) -> Tensor:
    """Gradient of a bias [E, N]: rows [A, N] summed per expert, in float64."""
    # One long running sum: in float32 it would be less exact than torch.sum, which adds in a tree.
    total = torch.zeros(bias.shape, dtype=torch.float64, device=bias.device)
    return total.index_add_(0, expert_of_rows(offsets, rows.shape[0]), rows.double()).to(bias.dtype)
