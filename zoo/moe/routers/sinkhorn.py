"""Balanced assignment by optimal transport, without a loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.register import operator
from .topk import TopKRouter

EPS = 1e-8
STEPS_PER_CHECK = 16
MAX_CHECKS = 64  # EPS lets scalings drift for ever: a tolerance of 1e-8 would never be met


class SinkhornRouter(TopKRouter):
    """S-BASE (2202.01169), in the form of Megatron-Core: balance by entropy-regularised transport.

    In training a token takes the k experts that get most of it in the plan `sinkhorn_plan(logits)`, which gives every
    expert the same mass; in evaluation those of highest logit. Weights are sigmoid(logit) for k=1, else the softmax
    over all experts. The plan has no gradient. Other options as in `TopKRouter`.
    """

    def __init__(self, dim: int, num_experts: int, k: int = 1, *, tolerance: float = 1e-4, **options: Any) -> None:
        super().__init__(dim, num_experts, k, **{"score": "sigmoid" if k == 1 else "softmax", **options})
        self.tolerance = tolerance

    def _preference(self, logits: Tensor, mask: Tensor | None) -> Tensor | None:
        return sinkhorn_plan(logits.float(), self.tolerance, mask) if self.training else None


def sinkhorn_plan(logits: Tensor, tolerance: float = 1e-4, mask: Tensor | None = None) -> Tensor:
    """Transport plan [T, E] of logits [T, E]: rows sum to 1/T, columns to 1/E, as far as the last column scaling moved
    less than `tolerance` in the mean. Masked tokens (False) get nothing and do not count in T. It has no gradient.
    An operator, so that torch.compile does not look inside.
    """
    return _op(logits.detach(), tolerance, mask)


def _plan(logits: Tensor, tolerance: float, mask: Tensor | None) -> Tensor:
    tokens, experts = logits.shape
    # Scaling a row does not change the plan, and exp cannot overflow.
    cost = (logits - logits.amax(-1, keepdim=True)).exp()
    rows = torch.tensor(float(tokens), device=logits.device)
    if mask is not None:
        cost, rows = cost.where(mask[:, None], 0), mask.sum()
    row, column = cost.new_ones(tokens), cost.new_ones(experts)
    done = torch.tensor(tokens == 0, device=logits.device)
    for _ in range(MAX_CHECKS):
        # Several steps between looks at `done`, each of which makes the host wait for the device.
        if done:
            break
        for _ in range(STEPS_PER_CHECK):
            new_row = 1 / (rows * ((cost * column).sum(1) + EPS))
            new_column = 1 / (experts * ((cost * new_row[:, None]).sum(0) + EPS))
            # Stop exactly where a check at every step would have; nan ends it too.
            row, new_column = torch.where(done, row, new_row), torch.where(done, column, new_column)
            done = done | ~((new_column - column).abs().mean() > tolerance)
            column = new_column
    return (column * cost * row[:, None]).contiguous()


_op = operator(
    "sinkhorn_plan(Tensor logits, float tolerance, Tensor? mask) -> Tensor",
    *(_plan, lambda logits, tolerance, mask: logits.new_empty(logits.shape)),
)
