"""What stands between a router's scores and the experts, as registered operators: the best k, and choices by expert.

T tokens, E experts, K choices a token, A = T * K. On NVIDIA GPUs both are Triton kernels where they can be; elsewhere
torch's topk and stable sort. Operators, so that torch.compile does not look inside.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import transformed
from .portable import is_portable, sort_stably
from .register import operator

# Most experts that a program of the Triton kernels holds.
MOST = 1024


class Sorted(NamedTuple):
    """Choices sorted by expert and, within an expert, by token; place [T, K] int32 is the row of each, if known."""

    token_index: Tensor
    offsets: Tensor
    weight: Tensor
    place: Tensor | None = None


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest scores [T, E] of every token, best first, and their experts: [T, k] each."""
    if scores.dtype != torch.float64 and _can(scores, scores.shape[1]):
        expert = _top_k_op(scores.detach(), k)
        return scores.gather(1, expert), expert
    return scores.topk(k, dim=-1)


def sort_choices(expert: Tensor, weight: Tensor, num_experts: int, keep: Tensor | None = None) -> Sorted:
    """Sort choices expert [T, K] int64 with weights [T, K] by expert, without those that keep [T, K] leaves out."""
    if keep is None and _can(expert, num_experts):
        return Sorted(*_sort_op(expert, weight, num_experts))
    k = expert.shape[1]
    if keep is not None and (torch.compiler.is_exporting() or transformed.is_batched(keep)):
        # In a graph and under vmap sizes hang on no values: dropped choices stay, at the last expert, without weight.
        expert, weight, keep = expert.where(keep, num_experts - 1), weight.where(keep, 0), None
    # The narrowest integers that hold E: a radix sort takes a pass per byte.
    narrow = torch.uint8 if num_experts < 256 else torch.int16 if num_experts < 32768 else torch.int64
    key = expert.reshape(-1).to(narrow)
    if keep is not None:
        # A dropped choice sorts behind the last expert, so that it can be cut off.
        key = key.where(keep.reshape(-1), num_experts)
    key, order = sort_stably(key)
    bounds = torch.arange(num_experts + 1, dtype=key.dtype, device=key.device)
    if is_portable():  # not every runtime can search
        offsets = (key < bounds.unsqueeze(-1)).sum(-1, dtype=torch.int32)
    else:
        offsets = torch.searchsorted(key, bounds, out_int32=True)
    if keep is not None:
        order = order[: int(offsets[-1])]
    # Not weight[order]: its backward sums duplicates one by one, though there are none.
    weight = weight.reshape(-1).index_select(0, order)
    return Sorted(order // k if k > 1 else order, offsets, weight)


def _can(x: Tensor, num_experts: int) -> bool:
    """Whether the Triton kernels can run."""
    if not x.is_cuda or num_experts > MOST or is_portable():
        return False
    from . import triton  # elsewhere its kernels need not be defined

    return triton.unavailable(x) is None


def _top_k(scores: Tensor, k: int) -> Tensor:
    from .triton import choose

    return choose.top_k(scores, k)


def _sort_choices(expert: Tensor, weight: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .triton import choose

    return choose.sort_choices(expert, weight, num_experts)


def _sort_choices_fake(expert: Tensor, weight: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = expert.shape[0] * expert.shape[1]
    offsets, place = (expert.new_empty(shape, dtype=torch.int32) for shape in ((num_experts + 1,), expert.shape))
    return expert.new_empty(rows), offsets, weight.new_empty(rows), place


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    token_index, offsets, _, place = output
    ctx.save_for_backward(place)
    ctx.mark_non_differentiable(token_index, offsets, place)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, *grads):  # type: ignore[no-untyped-def]
    (place,) = ctx.saved_tensors
    grad = grads[2]
    return None, None if grad is None else grad.index_select(0, place.reshape(-1)).view(place.shape), None


_top_k_op = operator(
    "top_k(Tensor scores, int k) -> Tensor",
    *(_top_k, lambda scores, k: scores.new_empty((scores.shape[0], k), dtype=torch.int64)),
)
_sort_op = operator(
    "sort_choices(Tensor expert, Tensor weight, int num_experts) -> (Tensor, Tensor, Tensor, Tensor)",
    *(_sort_choices, _sort_choices_fake, _differentiate, _setup_context),
)
