"""Expert math for torch.func and torch.vmap, which cannot see into our operators: compositions of torch's own.

Forward-mode derivatives would be silently wrong there, gradients and per-sample gradients an error. Every expert
computes every row, so that no size depends on what a gate decided; any number of derivatives may be taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import get_activation


def is_active() -> bool:
    """Whether a transform of torch.func is under way; torch.compile traces those by itself."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _expert_index(offsets: Tensor, count: int) -> Tensor:
    """Expert of each of `count` rows sorted by expert, [A]."""
    rows = torch.arange(count, dtype=offsets.dtype, device=offsets.device)
    return torch.searchsorted(offsets[1:], rows, right=True)


def moe_mlp(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    weight: Tensor,
    token_index: Tensor,
    offsets: Tensor,
    activation: str,
) -> Tensor:
    """The outputs [T, D] that `reference` defines."""
    experts, cell = w_in.shape[0], token_index * w_in.shape[0] + _expert_index(offsets, token_index.numel())
    combine = weight.new_zeros(x.shape[0] * experts).index_add(0, cell, weight).view(-1, experts).to(x.dtype)
    pre = torch.einsum("td,ehd->teh", x, w_in.to(x.dtype))
    if b_in is not None:
        pre = pre + b_in.to(x.dtype)
    hidden = get_activation(activation).forward(pre) * combine.unsqueeze(-1)
    y = torch.einsum("tef,edf->td", hidden, w_out.to(x.dtype))
    return y if b_out is None else y + combine @ b_out.to(x.dtype)


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Rows [A, I] through the weights [E, O, I] of their experts, [A, O]."""
    own = _expert_index(offsets, rows.shape[0]).unsqueeze(-1) == torch.arange(weight.shape[0], device=rows.device)
    spread = rows.unsqueeze(1) * own.unsqueeze(-1).to(rows.dtype)
    return torch.einsum("aei,eoi->ao", spread, weight)
