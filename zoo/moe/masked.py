"""Sums over the tokens that count, [..., T, E], which all losses on routing are made of."""

from __future__ import annotations

from torch import Tensor


def token_sum(values: Tensor, mask: Tensor | None) -> Tensor:
    """Sum over tokens: [..., T, E] -> [..., E]."""
    # A masked token may hold anything, even nan: select, do not multiply.
    return (values if mask is None else values.where(mask.unsqueeze(-1), 0)).sum(-2)


def token_count(values: Tensor, mask: Tensor | None) -> Tensor:
    """Number of tokens that count, [..., 1]."""
    if mask is None:
        return values.new_full((*values.shape[:-2], 1), float(values.shape[-2]))
    return mask.sum(-1, keepdim=True).to(values.dtype)


def cv_squared(values: Tensor, correction: int = 0) -> Tensor:
    """Squared coefficient of variation over the last dimension, population variance unless corrected."""
    correction = min(correction, values.shape[-1] - 1)
    return values.var(-1, correction=correction) / (values.mean(-1).square() + 1e-10)


def surprise(probs: Tensor) -> Tensor:
    """-p log p, of finite slope at 0."""
    return -(probs * probs.clamp(min=1e-20).log())
