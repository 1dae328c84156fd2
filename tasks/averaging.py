"""A running average of the weights, to evaluate and keep in place of the last step's."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class RunningAverage(WeightAveraging):
    """Average over about the last `share` of the steps, but over no more than `window` of them.

    At a constant learning rate it stands in for a decay (2405.18392, section 4), at any step and without knowing where
    training ends. Validation, exported and predicted weights are the average; training itself does not see it.
    """

    def __init__(self, share: float = 0.2, window: int = 200, every_n_steps: int = 4) -> None:
        def average(averaged: list[Tensor], current: list[Tensor], updates: Tensor | int) -> None:
            steps = max(1.0, min(float(window), share * every_n_steps * float(updates)) / every_n_steps)
            torch._foreach_lerp_(averaged, current, 1 / steps)

        super().__init__(use_buffers=False, multi_avg_fn=average)
        self.every_n_steps = every_n_steps

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """After the first optimizer step, and every `every_n_steps` steps."""
        return step_idx is not None and (step_idx == 0 or (step_idx + 1) % self.every_n_steps == 0)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the model alone: checkpoints that are made now are to continue with its own weights."""

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Put the average in the model's place, if training came far enough to have one."""
        if self._average_model is not None and int(self._average_model.n_averaged):
            super().on_train_end(trainer, pl_module)
