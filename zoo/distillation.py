"""Distillation: a student learns what a teacher finds likely beside what is right (Switch, 2101.03961, section 4.2)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

IGNORE = -100


def distillation_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    weight: float = 0.25,
    temperature: float = 1.0,
    ignore_index: int = IGNORE,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """(1 - weight) cross-entropy with labels + weight `soft_loss` with the teacher, a scalar in float32.

    Switch's mixture is weight 0.25, for a student whose weights outside the MLPs start as the teacher's: `zoo.to_dense`
    makes such a one. logits and teacher_logits [..., V], labels [...]; where a label is ignore_index, neither
    counts. reduction="none" gives the loss at every place [...], zero there; "mean" over the places that count, zero
    where there are none. The teacher gets no gradient. Raises ValueError for shapes that do not belong together, a
    weight outside [0, 1], or a temperature of zero or less.
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"distillation_loss: labels {list(labels.shape)} are not one for each {list(logits.shape)}")
    if not 0 <= weight <= 1:
        raise ValueError(f"distillation_loss: weight must be between 0 and 1, got {weight}")
    soft = soft_loss(logits, teacher_logits, temperature)
    rows = logits.float().reshape(-1, logits.shape[-1])
    flat = F.cross_entropy(rows, labels.flatten(), reduction="none", ignore_index=ignore_index)
    real = labels != ignore_index
    loss = ((1 - weight) * flat.view_as(labels) + weight * soft).where(real, 0.0)
    return loss if reduction == "none" else loss.sum() / real.sum().clamp(min=1)


def soft_loss(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 times the cross-entropy of softmax(logits / T) with the teacher's softmax at the same T, [...] float32.

    T^2 keeps gradients of one size at any temperature (1503.02531, section 2). The teacher gets no gradient.
    Raises ValueError for other logits than the student's, and a temperature of zero or less.
    """
    if logits.shape != teacher_logits.shape:
        raise ValueError(
            f"distillation: the student's logits are {list(logits.shape)}, the teacher's {list(teacher_logits.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"distillation: temperature must be above 0, got {temperature}")
    wanted = (teacher_logits.detach().float() / temperature).softmax(-1)
    return -(wanted * (logits.float() / temperature).log_softmax(-1)).sum(-1) * temperature**2
