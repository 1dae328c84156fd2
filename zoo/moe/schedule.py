"""Gates that change as training goes on, once an optimizer step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Scheduled:
    """Base of modules that change with every optimizer step. Unless they say otherwise they count steps in a buffer
    `step` [], int64, which checkpoints keep.
    """

    step: Tensor

    def advance(self) -> None:
        """Count one optimizer step."""
        self.step += 1


@torch.no_grad()
def advance(model: nn.Module) -> None:
    """Tell every gate of `model` that changes with steps or follows its experts that one optimizer step was taken.

    Call it on all processes once an optimizer step, however many micro-batches that had. `tasks.training.Task` does.
    """
    for module in model.modules():
        if isinstance(module, Scheduled):
            module.advance()
        router: Any = getattr(module, "router", None)
        if hasattr(router, "follow"):
            router.follow(module.experts)
