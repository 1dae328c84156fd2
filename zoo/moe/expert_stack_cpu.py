"""ReLU expert stacks on the CPU: the bare matrix products, and as few passes over memory beside them as possible.

T tokens, D width, E experts, H units of a layer. What the speed rests on, at T = 1024, D = 221, 8 experts of 128-64:
- the first layer is one product [T, D] x [D, E * H], and its bias a column of the weights, which meets a column of ones
  in x; so the bias and its gradient cost no pass, and rows that are a multiple of 32 bytes take 0.9 of the time;
- the other layers are batched products of contiguous [E, T, H]; the pass of ReLU, forward and backward, is also what
  moves values from one layout to the other;
- large buffers come from `memory`, which reuses pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .kernels import memory, products, transformed

ALIGNMENT = 8  # floats


def supports(x: Tensor, weight: Tensor) -> bool:
    """Whether `relu_stack` can stand in for the composition of torch's operators.

    Not where those are traced or transformed (torch.compile, export, vmap, forward mode), nor for subclasses of Tensor.
    Under autocast to bfloat16 products take and give bfloat16, as torch's do.
    """
    if torch.is_autocast_enabled("cpu"):
        types = torch.get_autocast_dtype("cpu") == torch.bfloat16
        types = types and x.dtype in (torch.float32, torch.bfloat16) and weight.dtype in (torch.float32, torch.bfloat16)
    else:
        types = x.dtype in (torch.float32, torch.float64) and x.dtype == weight.dtype
    return (
        x.device.type == "cpu"
        and types
        and type(x) in (Tensor, nn.Parameter)
        and type(weight) in (Tensor, nn.Parameter)
        and not torch.compiler.is_compiling()
        and not transformed.is_active()
    )


def relu_stack(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """h_l = relu(W_l h_(l-1) + b_l) of every expert, for x [T, D] or [T, E, D]: [T, E, O]; see `ExpertStack`."""
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype
    with torch.autocast("cpu", enabled=False):
        return _ReluStack.apply(x, dtype, *weights, *biases)


class _ReluStack(torch.autograd.Function):
    """Saves the inputs of every layer and the outputs, which tell where ReLU was on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, *parameters: Tensor) -> Tensor:
        depth = len(parameters) // 2
        weights, biases = list(parameters[:depth]), parameters[depth:]
        tokens, experts = x.shape[0], weights[0].shape[0]
        ctx.shared = x.dim() == 2
        kept = [_with_column(x, 1, dtype)] if ctx.shared else [x.to(dtype).transpose(0, 1)]
        for layer, (weight, bias) in enumerate(zip(weights, biases)):
            hidden = memory.empty((experts, tokens, bias.shape[1]), dtype)
            if layer == 0 and ctx.shared:
                weights[0] = _with_column(weight.flatten(0, 1), bias.flatten(), dtype)
                pre = memory.empty((tokens, bias.numel()), dtype)
                products.mm(kept[0], weights[0].T, pre)
                torch.clamp_min(_by_expert(pre, experts), 0, out=hidden)
            else:
                weights[layer] = weight.to(dtype)
                products.bmm(kept[-1], weights[layer].mT, hidden)
                hidden.add_(bias.to(dtype).unsqueeze(1)).relu_()
            kept.append(hidden)
        ctx.save_for_backward(x, *parameters, *kept, *weights)
        ctx.depth, ctx.dim, ctx.given = depth, x.shape[-1], (x.dtype, parameters[0].dtype, dtype)
        return kept[-1].transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        given, saved = ctx.saved_tensors[: 2 * ctx.depth + 1], ctx.saved_tensors[2 * ctx.depth + 1 :]
        if torch.is_grad_enabled():  # create_graph: these are to have gradients too
            needs = [need for i, need in enumerate(ctx.needs_input_grad) if i != 1]
            dx, *others = transformed.gradients(partial(_composed, ctx.given[2]), given, needs, grad)
            return dx, None, *others
        kept, weights = saved[: ctx.depth + 1], saved[ctx.depth + 1 :]
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[2:]
        experts, tokens, _ = kept[-1].shape
        d_weights: list[Tensor | None] = [None] * ctx.depth
        d_biases: list[Tensor | None] = [None] * ctx.depth
        d_hidden, dx = grad.transpose(0, 1), None
        x_dtype, dtype, _ = ctx.given
        for layer in reversed(range(ctx.depth)):
            hidden, inputs, weight = kept[layer + 1], kept[layer], weights[layer]
            units = hidden.shape[2]
            needs_parameters = needs[layer] or needs[ctx.depth + layer]
            if layer == 0 and ctx.shared:
                d_pre = memory.empty((tokens, experts * units), grad.dtype)
                _relu_backward(d_hidden, hidden, _by_expert(d_pre, experts))
                if needs_parameters:
                    d_joint = products.mm(d_pre.T, inputs, torch.empty_like(weight)).to(dtype)
                    d_joint = d_joint.unflatten(0, (experts, units))
                    d_weights[0], d_biases[0] = d_joint[..., : ctx.dim], d_joint[..., ctx.dim]
                if needs_x:
                    dx = products.mm(d_pre, weight, memory.empty((tokens, weight.shape[1]), grad.dtype))
                    dx = dx[:, : ctx.dim].to(x_dtype)
                break
            d_pre = memory.empty(hidden.shape, grad.dtype)
            _relu_backward(d_hidden, hidden, d_pre)
            if needs_parameters:
                d_weights[layer] = products.bmm(d_pre.mT, inputs, torch.empty_like(weight)).to(dtype)
                d_biases[layer] = d_pre.sum(1, dtype=dtype)
            if not (needs_x or any(needs[:layer]) or any(needs[ctx.depth : ctx.depth + layer])):
                break
            d_hidden = products.bmm(d_pre, weight, memory.empty(inputs.shape, grad.dtype))
        if needs_x and not ctx.shared:
            dx = d_hidden.transpose(0, 1).to(x_dtype)
        return dx, None, *d_weights, *d_biases


def _composed(dtype: torch.dtype, x: Tensor, *parameters: Tensor) -> Tensor:
    """The same [T, E, O] by torch's own operators."""
    depth = len(parameters) // 2
    x = x.to(dtype) if x.dim() == 3 else x.to(dtype).unsqueeze(1).expand(-1, len(parameters[0]), -1)
    for weight, bias in zip(parameters[:depth], parameters[depth:]):
        x = (torch.einsum("ted,ehd->teh", x, weight.to(dtype)) + bias.to(dtype)).relu()
    return x


def _by_expert(wide: Tensor, experts: int) -> Tensor:
    """[T, E * H] as [E, T, H], without a copy."""
    return wide.unflatten(1, (experts, -1)).transpose(0, 1)


def _with_column(x: Tensor, column: Tensor | float, dtype: torch.dtype) -> Tensor:
    """x [N, D], a column beside it and zeros up to a multiple of ALIGNMENT."""
    dim = x.shape[1]
    out = memory.empty((x.shape[0], -(-(dim + 1) // ALIGNMENT) * ALIGNMENT), dtype)
    out[:, :dim], out[:, dim], out[:, dim + 1 :] = x, column, 0
    return out


def _relu_backward(grad: Tensor, hidden: Tensor, out: Tensor) -> None:
    """out = grad where hidden units are on."""
    torch.ops.aten.threshold_backward.grad_input(grad, hidden, 0, grad_input=out)
