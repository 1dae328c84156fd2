"""Sums over the tokens that count, [..., T, E], which all losses on routing are made of."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def token_sum(values: Tensor, mask: Tensor | None) -> Tensor:
    """Sum over tokens: [..., T, E] -> [..., E]."""
    # A masked token may hold anything, even nan: select, do not multiply.
    return (values if mask is None else values.where(mask.unsqueeze(-1), 0)).sum(-2)


def choice_count(selected: Tensor, mask: Tensor | None, like: Tensor) -> Tensor:
    """How many tokens chose each expert, [..., E], in the type of `like` or a wider one; selected may be bool."""
    return token_sum(selected.to(torch.promote_types(like.dtype, torch.float32)), mask)


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


def world_size(processes: dist.ProcessGroup | None = None) -> int:
    """Number of processes, of all or in a group; 1 where torch.distributed does not run."""
    return dist.get_world_size(processes) if dist.is_available() and dist.is_initialized() else 1


def everywhere(values: Tensor, global_batch: bool = True) -> Tensor:
    """Sum over all processes, such that the mean of their gradients, as data parallelism takes it, is that of the sum.

    No gradient crosses: each process learns from its own share, times the number of processes.
    """
    world = world_size()
    if not global_batch or world == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total + world * (values - values.detach())
