"""What follows the shared part of a recommendation model: a tower a task, and what the tasks' outputs mean.

B rows, K tasks, O width of a tower's input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.tables_schema import Target, given_chain
from ..moe.expert_stack import ExpertStack


class Towers(nn.Module):
    """An MLP a task with one output, all computed as one; with domains, an MLP a task and domain.

    `hidden` are the units of the layers before the output; none is allowed. An ordinal task with C classes has C - 1
    thresholds in ascending order beside it: P(y > c) = sigmoid(score - t_c), the proportional odds model (McCullagh
    1980). They start where equally likely classes would have them.
    """

    def __init__(
        self,
        tasks: Sequence[Target],
        dim: int,
        hidden: Sequence[int],
        *,
        norm: str | None = None,
        dropout: float = 0.0,
        domains: int = 1,
    ) -> None:
        super().__init__()
        self.tasks, self.domains = tuple(tasks), domains
        count = len(self.tasks) * domains
        self.hidden = ExpertStack(count, dim, hidden, norm=norm, dropout=dropout) if hidden else None  # type: ignore[arg-type]
        self.weight = nn.Parameter(torch.empty(count, hidden[-1] if hidden else dim))
        self.bias = nn.Parameter(torch.zeros(count))
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)
        self.thresholds = nn.ModuleDict(
            {str(i): _Thresholds(task.classes) for i, task in enumerate(self.tasks) if task.classes is not None}
        )

    def forward(self, y: Tensor, domain: Tensor | None = None) -> dict[str, Tensor]:
        """By task, of inputs y [K, B, O] and the rows' domain [B]: a number [B], or logits [B, C - 1] of y > c."""
        if self.domains > 1:
            y = y.repeat_interleave(self.domains, 0)  # [K * domains, B, O]
        if self.hidden is not None:
            y = self.hidden(y.transpose(0, 1)).transpose(0, 1)
        scores = torch.baddbmm(self.bias[:, None, None], y, self.weight.unsqueeze(-1)).squeeze(-1).to(self.bias.dtype)
        if self.domains > 1:
            assert domain is not None
            scores = scores.unflatten(0, (-1, self.domains)).gather(1, domain.expand(len(self.tasks), 1, -1)).squeeze(1)
        found = dict(zip((task.name for task in self.tasks), scores.unbind()))
        for i, thresholds in self.thresholds.items():
            name = self.tasks[int(i)].name
            found[name] = found[name].unsqueeze(-1) - thresholds()
        return found


class _Thresholds(nn.Module):
    """C - 1 ascending numbers: the first, and logarithms of the steps after it."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        even = torch.logit(torch.arange(1, classes) / classes)
        self.first = nn.Parameter(even[:1].clone())
        self.log_steps = nn.Parameter(even.diff().log())

    def forward(self) -> Tensor:
        return torch.cat([self.first, self.first + self.log_steps.exp().cumsum(0)])


def predictions(tasks: Sequence[Target], outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What towers' outputs predict, [B] by task: the probability, the number, or the expected class.

    A task that is `given` another has its probability where that one happened, and "<task>_joint", that of both.
    """
    outputs = {name: out.float() if out.dtype == torch.bfloat16 else out for name, out in outputs.items()}
    found = {}
    for task in tasks:
        out = outputs[task.name]
        if task.kind == "regression":
            found[task.name] = out
        elif task.kind == "ordinal":
            found[task.name] = out.sigmoid().sum(-1)  # E y = sum_c P(y > c)
        else:
            found[task.name] = out.sigmoid()
            if task.given:
                found[f"{task.name}_joint"] = log_joint(tasks, outputs, task).exp()
    return found


def log_joint(tasks: Sequence[Target], outputs: Mapping[str, Tensor], task: Target) -> Tensor:
    """log P [B] that a binary task and all that it is given happen."""
    total = F.logsigmoid(outputs[task.name])
    if task.given:
        total = total + log_joint(tasks, outputs, next(t for t in tasks if t.name == task.given))
    return total


def task_losses(
    tasks: Sequence[Target],
    outputs: Mapping[str, Tensor],
    labels: Tensor,
    weight: Tensor | None = None,
    esmm: bool = False,
) -> dict[str, Tensor]:
    """Of each task, its loss's mean over the rows that have its label: labels [B, K], nan for none, weights [B].

    Cross-entropy of a binary task, half of nothing but the squared error of a regression, the sum over c of the
    cross-entropies of y > c of an ordinal task. A task that is given another has the labels of the rows where that one
    happened; with `esmm` (1804.07931, eq. 4) it is instead the cross-entropy of both, over all rows that have both
    labels. A batch without labels of a task gives 0, with a gradient of 0.
    """
    return {
        task.name: _loss(task, tasks, outputs, label, weight, esmm)
        for task, label in zip(tasks, _labels_that_count(tasks, labels, esmm))
    }


def task_counts(tasks: Sequence[Target], labels: Tensor, weight: Tensor | None = None, esmm: bool = False) -> Tensor:
    """How many rows each task's loss is the mean over, [K] float32; with weights, their sum."""
    real = ~torch.stack(_labels_that_count(tasks, labels, esmm), dim=1).isnan()
    return (real.float() if weight is None else real * weight[:, None]).sum(0)


def _labels_that_count(tasks: Sequence[Target], labels: Tensor, esmm: bool) -> list[Tensor]:
    """Of each task, the labels [B] that its loss takes, nan where it takes none."""
    by_name = {task.name: labels[:, i] for i, task in enumerate(tasks)}
    found = []
    for task in tasks:
        label = by_name[task.name]
        for other in (by_name[name] for name in given_chain(tasks, task)):
            # With esmm, of both: nan where either is, unless it is known that the first did not happen.
            label = torch.where(other == 0, 0.0, label * other) if esmm else label.where(other > 0, torch.nan)
        found.append(label)
    return found


def _loss(
    task: Target,
    tasks: Sequence[Target],
    outputs: Mapping[str, Tensor],
    label: Tensor,
    weight: Tensor | None,
    esmm: bool,
) -> Tensor:
    out, real = outputs[task.name], ~label.isnan()
    label = label.where(real, 0).to(out.dtype)
    if task.kind == "regression":
        losses = (out - label).square()
    elif task.kind == "ordinal":
        above = label.unsqueeze(-1) > torch.arange(out.shape[-1], device=out.device)
        losses = F.binary_cross_entropy_with_logits(out, above.to(out.dtype), reduction="none").sum(-1)
    elif esmm and task.given:
        both = log_joint(tasks, outputs, task)
        losses = -(label * both + (1 - label) * log1mexp(both))
    else:
        losses = F.binary_cross_entropy_with_logits(out, label, reduction="none")
    share = real.to(out.dtype) if weight is None else real * weight.to(out.dtype)
    return (losses * share).sum() / share.sum().clamp(min=torch.finfo(out.dtype).tiny)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, exact near 0 and far from it (Mächler 2012); x = 0 counts as the number before it."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -0.6931471805599453
    # The unused branch gets a harmless input, or its infinite gradient would spread as nan.
    return torch.where(near, (-torch.expm1(x.where(near, -0.5))).log(), torch.log1p(-x.where(~near, -1.0).exp()))
