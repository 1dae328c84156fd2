"""Rotary positions (2104.09864), in the form that splits a head in two halves, as `transformers` does."""

from __future__ import annotations

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]


def rotary(position_ids: Tensor, dim: int, base: float = 10000.0) -> Rotary:
    """Cosines and sines [.., S, dim] of positions [.., S]; dim, even, is how much of a head they turn.

    What `transformers`' rotary modules give is of the same form.
    """
    frequency = base ** (-torch.arange(0, dim, 2, device=position_ids.device, dtype=torch.float32) / dim)
    angle = position_ids.unsqueeze(-1) * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first R dimensions of x [.., d] by cos and sin [.., R]; the others stay (SwitchHead turns half).

    Raises ValueError where heads are narrower than R.
    """
    if cos.shape[-1] > x.shape[-1]:
        raise ValueError(f"rotary positions turn {cos.shape[-1]} dimensions, but heads have head_dim={x.shape[-1]}")
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
