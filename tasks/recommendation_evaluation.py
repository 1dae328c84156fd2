"""Evaluating recommendation models exactly: every figure of every task, over a whole split and all processes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tasks import recommendation_metrics as metrics
from tasks.recommendation_metrics import Array
from zoo.data.tables_schema import Schema, Target, given_chain


def check_precision(schema: Schema, trainer: Any) -> None:
    """Raise ValueError where a trainer would round what rows are to be predicted, or how much they count."""
    if trainer.precision in ("16-true", "bf16-true"):
        what = [f"labels of task {task.name!r}" for task in schema.tasks if task.kind == "regression"]
        what += ["sample weights"] if schema.weight else []
        if what:
            raise ValueError(f"precision {trainer.precision}: it would round the {what[0]} too; use bf16-mixed")


class TableMetrics:
    """The figures of every task over the batches added so far, on all processes.

    binary: auc, logloss, calibration, ece, and with groups gauc and ndcgK; regression: rmse, mae; ordinal: rmse and mae
    of the expected class, accuracy and quadratic kappa of the nearest class, and with groups ndcgK. A task that is
    `given` others counts where those happened; its "<task>_joint" predictions, where a model has them, count
    everywhere, their label being all. Sample weights count in all but ndcgK. Kept a row: 8 bytes a prediction, 4 a
    label, 8 for the group and 4 for the weight.
    """

    def __init__(self, tasks: Sequence[Target], ndcg_k: int = 10) -> None:
        if ndcg_k < 1:
            raise ValueError(f"ndcg_k must be at least 1, got {ndcg_k}")
        self.tasks, self.ndcg_k = tuple(tasks), ndcg_k
        self.undefined: dict[str, str] = {}
        self._names: list[str] = []
        self._has = (False, False)
        self._kept: list[list[Tensor]] = []

    def add(
        self,
        predictions: Mapping[str, Tensor],
        labels: Tensor,
        group: Tensor | None = None,
        weight: Tensor | None = None,
        real: Tensor | None = None,
    ) -> None:
        """Add a batch: predictions [B] by name, labels [B, K] (nan: none), group [B] and weight [B].

        real [B] tells rows from padding.
        """
        self._names = list(predictions)
        columns = [torch.stack([p.detach().double() for p in predictions.values()], dim=1), labels.float()]
        columns += [column for column in (group, weight) if column is not None]
        self._has = (group is not None, weight is not None)
        self._kept.append([(column if real is None else column[real]).cpu() for column in columns])

    def compute(self) -> dict[str, float]:
        """Figures by "<figure>/<task>", the same on all processes, which must call it together.

        `undefined` then tells of each task with an undefined figure why it is.
        """
        if not self._kept:
            return {}
        self._kept = [[torch.cat(parts) for parts in zip(*self._kept)]]
        columns = _gathered(self._kept[0])
        results: list[Any] = [None if columns is None else self._figures([column.numpy() for column in columns])]
        if _world() > 1:
            dist.broadcast_object_list(results)
        figures, self.undefined = results[0]
        return figures

    def _figures(self, columns: list[Array]) -> tuple[dict[str, float], dict[str, str]]:
        predictions, labels, *rest = columns
        group = rest.pop(0) if self._has[0] else None
        weight = rest.pop(0) if self._has[1] else None
        by_task = {task.name: labels[:, i] for i, task in enumerate(self.tasks)}
        figures: dict[str, float] = {}
        undefined: dict[str, str] = {}
        for task in self.tasks:
            label = by_task[task.name]
            wanted = {task.name: label}
            if task.given:
                joint = label
                for happened in (by_task[name] for name in given_chain(self.tasks, task)):
                    wanted[task.name] = np.where(happened > 0, wanted[task.name], np.nan)
                    joint = np.where(happened == 0, 0, joint * happened)
                wanted[f"{task.name}_joint"] = joint
            for name, target in wanted.items():
                if name not in self._names:
                    continue
                rows = ~np.isnan(target)
                taken = (predictions[rows, self._names.index(name)], target[rows].astype(np.float64))
                extra = [None if values is None else values[rows] for values in (group, weight)]
                found = _of_kind(task.kind, self.ndcg_k, *taken, *extra)
                figures.update({f"{figure}/{name}": float(value) for figure, value in found.items()})
                if any(math.isnan(value) for value in found.values()):
                    undefined[name] = _reason(task.kind, *taken)
        return figures, undefined


def figure_names(tasks: Sequence[Target], groups: bool, ndcg_k: int = 10) -> list[str]:
    """What `TableMetrics.compute` finds for tasks, "<figure>/<task>", with groups of rows or without."""
    none = np.zeros(0)
    found = []
    for task in tasks:
        names = [task.name, *([f"{task.name}_joint"] if task.given else [])]
        figures = _of_kind(task.kind, ndcg_k, none, none, none if groups else None, None)
        found += [f"{figure}/{name}" for name in names for figure in figures]
    return found


def _of_kind(
    kind: str, k: int, prediction: Array, labels: Array, group: Array | None, weight: Array | None
) -> dict[str, float]:
    """The figures of a task of this kind."""
    if not np.isfinite(prediction).all():  # or a diverged model would get a rank
        prediction = np.full_like(prediction, np.nan)
        labels = np.full_like(labels, np.nan)
    if kind == "regression":
        return {"rmse": metrics.rmse(prediction, labels, weight), "mae": metrics.mae(prediction, labels, weight)}
    figures: dict[str, float] = {}
    if kind == "binary":
        figures["auc"] = metrics.auc(prediction, labels, weight)
        figures["logloss"] = metrics.log_loss(prediction, labels, weight)
        figures["calibration"] = metrics.calibration(prediction, labels, weight)
        figures["ece"] = metrics.calibration_error(prediction, labels, weight)
        if group is not None:
            figures["gauc"] = metrics.gauc(prediction, labels, group, weight)
    else:
        nearest = np.rint(prediction)
        figures["rmse"] = metrics.rmse(prediction, labels, weight)
        figures["mae"] = metrics.mae(prediction, labels, weight)
        figures["accuracy"] = metrics.accuracy(nearest, labels, weight)
        figures["kappa"] = metrics.kappa(nearest, labels, weight)
    if group is not None:
        figures[f"ndcg{k}"] = metrics.ndcg(prediction, labels, group, k)
    return figures


def _reason(kind: str, prediction: Array, labels: Array) -> str:
    if not len(labels):
        return "no row has a label"
    if not np.isfinite(prediction).all():
        return "predictions are not finite"
    if kind == "binary" and not (labels > 0).any():
        return "no row is positive"
    if kind == "binary" and (labels > 0).all():
        return "no row is negative"
    return "no group has rows of both classes" if kind == "binary" else "all labels are the same"


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _gathered(columns: list[Tensor]) -> list[Tensor] | None:
    """The columns of all processes one after another, on the first process; None on the others."""
    if _world() == 1:
        return columns
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    own = torch.tensor([len(columns[0])], device=device)
    lengths = [torch.zeros_like(own) for _ in range(_world())]
    dist.all_gather(lengths, own)
    longest, first = int(max(lengths)), dist.get_rank() == 0
    found: list[Tensor] = []
    for column in columns:
        padded = column.new_zeros((longest, *column.shape[1:]), device=device)
        padded[: len(column)] = column.to(device)
        parts = [torch.empty_like(padded) for _ in lengths] if first else None
        dist.gather(padded, parts)
        if parts is not None:
            found.append(torch.cat([part[: int(n)].cpu() for part, n in zip(parts, lengths)]))
    return found if first else None
