"""Expert math for derivatives that our operators do not have: compositions of torch's own.

That is torch.func, torch.vmap and forward mode, which cannot see into operators, gradients of gradients, and `portable`
graphs. Every expert computes every row, so that no size depends on what a gate decided; any number of derivatives may
be taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .activations import get_activation
from .portable import expert_of_rows, is_portable


def is_active() -> bool:
    """Whether `portable`, a transform of torch.func or forward mode is under way; torch.compile traces the latter."""
    if is_portable():
        return True
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def gradients(
    f: Callable[..., Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool], dy: Tensor
) -> list[Tensor | None]:
    """Gradients of f(*inputs) that have gradients themselves; None for each that is not needed."""
    # Aliases: one input may have been made from another, such as combine weights from tokens.
    own = [t if t is None else t.view_as(t) for t in inputs]
    wanted = [t for t, need in zip(own, needs) if need and t is not None]
    found = iter(torch.autograd.grad(f(*own), wanted, dy, create_graph=True))
    return [next(found) if need and t is not None else None for t, need in zip(own, needs)]


def is_batched(value: Tensor) -> bool:
    """Whether a vmap is under way over what this was computed from."""
    functorch, batched = torch._C._functorch, False
    while not batched and is_active() and functorch.is_functorch_wrapped_tensor(value):
        batched, value = functorch.is_batchedtensor(value), functorch.get_unwrapped(value)
    return batched


def kept(value: Tensor) -> Tensor:
    """A count that is to outlive the transforms under way, without their wrappers; under vmap that of all samples."""
    functorch = torch._C._functorch
    while is_active() and functorch.is_functorch_wrapped_tensor(value):
        dim = functorch.maybe_get_bdim(value)
        value = functorch.get_unwrapped(value)
        value = value if dim < 0 else value.sum(dim)
    return value


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
    experts = w_in.shape[0]
    cell = token_index * experts + expert_of_rows(offsets, token_index.numel(), compare=True)
    combine = weight.new_zeros(x.shape[0] * experts).index_add(0, cell, weight).view(-1, experts).to(x.dtype)
    pre = torch.einsum("td,ehd->teh", x, w_in.to(x.dtype))
    if b_in is not None:
        pre = pre + b_in.to(x.dtype)
    hidden = get_activation(activation).forward(pre) * combine.unsqueeze(-1)
    y = torch.einsum("tef,edf->td", hidden, w_out.to(x.dtype))
    return y if b_out is None else y + combine @ b_out.to(x.dtype)


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Rows [A, I] through the weights [E, O, I] of their experts, [A, O]."""
    expert = expert_of_rows(offsets, rows.shape[0], compare=True)
    own = expert.unsqueeze(-1) == torch.arange(weight.shape[0], device=rows.device)
    spread = rows.unsqueeze(1) * own.unsqueeze(-1).to(rows.dtype)
    return torch.einsum("aei,eoi->ao", spread, weight)
