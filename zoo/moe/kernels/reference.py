"""The definition of the expert computation: a plain loop over experts, any floating dtype.

Every other backend is tested against this one; its own gradients are checked by finite differences. Weights and
biases of another dtype than x's (autocast) are cast one expert at a time; their gradients keep their dtype.
A assignments sorted by expert, T tokens, D width, F hidden, H = 2F for gated activations and F otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import get_activation


def unsupported(x: Tensor, w_in: Tensor, w_out: Tensor, activation: str) -> str | None:
    """Nothing is unsupported by the definition."""
    return None


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
    y = x.new_zeros(x.shape)
    pre = x.new_empty(token_index.numel() if save else 0, w_in.shape[1])
    bounds = offsets.tolist()
    for e in range(w_in.shape[0]):
        rows = slice(bounds[e], bounds[e + 1])
        tokens = token_index[rows]
        h = x[tokens] @ w_in[e].T.to(x.dtype)
        if b_in is not None:
            h = h + b_in[e].to(x.dtype)
        if save:
            pre[rows] = h
        out = act.forward(h) @ w_out[e].T.to(x.dtype)
        if b_out is not None:
            out = out + b_out[e].to(x.dtype)
        y.index_add_(0, tokens, out * weight[rows, None].to(out.dtype))
    return y, pre


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
    """Gradients of x, w_in, w_out, b_in, b_out and weight; an empty tensor for each that is not needed.

    With A' = dY W_out^T the gradient of a combine weight is <A', A> (+ <dY, b_out>), so no expert output is
    kept for it.
    """
    act = get_activation(activation)
    dx = x.new_zeros(x.shape)
    dw_in, dw_out = torch.zeros_like(w_in), torch.zeros_like(w_out)
    db_in = torch.zeros_like(b_in) if b_in is not None else x.new_empty(0)
    db_out = torch.zeros_like(b_out) if b_out is not None else x.new_empty(0)
    dweight = torch.zeros_like(weight)
    bounds = offsets.tolist()
    for e in range(w_in.shape[0]):
        rows = slice(bounds[e], bounds[e + 1])
        tokens = token_index[rows]
        g = dy[tokens]
        hidden = act.forward(pre[rows])
        d_hidden = g @ w_out[e].to(x.dtype)
        dweight[rows] = (d_hidden * hidden).sum(-1).to(weight.dtype)
        scale = weight[rows, None].to(x.dtype)
        scaled = g * scale
        dw_out[e] = scaled.T @ hidden
        d_pre = act.backward(pre[rows], d_hidden * scale)
        dw_in[e] = d_pre.T @ x[tokens]
        dx.index_add_(0, tokens, d_pre @ w_in[e].to(x.dtype))
        if b_in is not None:
            db_in[e] = d_pre.sum(0)
        if b_out is not None:
            dweight[rows] += (g @ b_out[e].to(x.dtype)).to(weight.dtype)
            db_out[e] = scaled.sum(0)
    return [dx, dw_in, dw_out, db_in, db_out, dweight]
