"""How the losses of several tasks become one: fixed weights, uncertainty, GradNorm.

Every weighting is called as `weighting(losses, model)`: losses are scalars by task, each of which the task's own
`Target.weight` multiplies first. A loss that is exactly 0 had no labelled row in the batch and moves no weight,
unless it had one on another process.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data.tables_schema import Target
from ..nearest import unknown


class FixedWeighting(nn.Module):
    """L = sum_k w_k L_k with w_k = `Target.weight`."""

    needs_shared_parameters = False
    own: Tensor

    def __init__(self, tasks: Sequence[Target]) -> None:
        super().__init__()
        self.names = tuple(task.name for task in tasks)
        self.register_buffer("own", torch.tensor([task.weight for task in tasks]), persistent=False)

    def forward(self, losses: Mapping[str, Tensor], model: nn.Module | None = None) -> Tensor:
        """The loss to train with, a scalar."""
        return self._stacked(losses).sum()

    def factors(self) -> dict[str, float]:
        """What each task's loss is multiplied by now, beside its own weight."""
        return dict.fromkeys(self.names, 1.0)

    def _stacked(self, losses: Mapping[str, Tensor]) -> Tensor:
        """w_k L_k, [K]."""
        return torch.stack([losses[name] for name in self.names]) * self.own


class UncertaintyWeighting(FixedWeighting):
    """L = sum_k c_k exp(-s_k) L_k + s_k / 2 with s_k = log sigma_k^2 learnt (Kendall et al. 1705.07115, eq. 7 and 10).

    c_k is 1/2 for a regression, whose likelihood is Gaussian, and 1 for binary and ordinal tasks, whose softmax is
    scaled by 1/sigma^2. All sigma start at 1.
    """

    scale: Tensor

    def __init__(self, tasks: Sequence[Target]) -> None:
        super().__init__(tasks)
        self.log_variance = nn.Parameter(torch.zeros(len(tasks)))
        scale = [0.5 if task.kind == "regression" else 1.0 for task in tasks]
        self.register_buffer("scale", torch.tensor(scale), persistent=False)

    def forward(self, losses: Mapping[str, Tensor], model: nn.Module | None = None) -> Tensor:
        """The loss to train with, a scalar."""
        stacked = self._stacked(losses)
        terms = self.scale * torch.exp(-self.log_variance) * stacked + self.log_variance / 2
        return terms.where(_anywhere(stacked.detach() != 0), 0.0).sum()

    @torch.no_grad()
    def factors(self) -> dict[str, float]:
        """What each task's loss is multiplied by now, beside its own weight."""
        value: Any = self.log_variance
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value  # in parts over processes
        return dict(zip(self.names, (self.scale * torch.exp(-whole)).tolist()))


class GradNormWeighting(FixedWeighting):
    """L = sum_k v_k L_k with v moved so that tasks learn at one pace (GradNorm: Chen et al. 1711.02257, algorithm 1).

    With W = `model.shared_parameters()`, G_k = |grad_W v_k L_k| and the pace r_k = (L_k / L_k(0)) / mean of the same, v
    takes a step of gradient descent on sum_k |G_k - mean(G) r_k^alpha|, whose second term counts as a constant, and is
    then scaled to sum to K. L_k(0) is the first loss seen. v is kept at 0.001 or more, as one long step could turn a
    task's sign. The v of before the step weighs the loss. Over several processes losses and gradients are averaged, and
    all have the same v.

    Args:
        tasks: the tasks.
        alpha: how strongly slow tasks are favoured; 0 makes the gradients equally long.
        lr: step length for v.
    """

    needs_shared_parameters = True
    factor: Tensor
    initial: Tensor

    def __init__(self, tasks: Sequence[Target], alpha: float = 1.5, lr: float = 0.025) -> None:
        super().__init__(tasks)
        self.alpha, self.lr = alpha, lr
        self.register_buffer("factor", torch.ones(len(tasks)))
        self.register_buffer("initial", torch.full((len(tasks),), torch.nan))

    def forward(self, losses: Mapping[str, Tensor], model: nn.Module | None = None) -> Tensor:
        """The loss to train with, a scalar; in training the weights move. The losses' graph is kept for backward."""
        stacked, factor = self._stacked(losses), self.factor.clone()
        if self.training and torch.is_grad_enabled():
            assert model is not None
            shared = [p for p in model.shared_parameters() if p.requires_grad]  # type: ignore[operator]
            self._step(stacked.detach().float(), torch.stack([_gradient(loss, shared) for loss in stacked]))
        return (factor * stacked).sum()

    def factors(self) -> dict[str, float]:
        """What each task's loss is multiplied by now, beside its own weight."""
        return dict(zip(self.names, self.factor.tolist()))

    @torch.no_grad()
    def _step(self, losses: Tensor, gradients: Tensor) -> None:
        """Move the weights; losses [K], gradients [K, size of W] of the losses without the weights."""
        if _several():
            for values in (losses, gradients):
                dist.all_reduce(values)
                values /= dist.get_world_size()
        self.initial.copy_(self.initial.where(~self.initial.isnan() | (losses == 0), losses))
        seen = losses != 0
        if seen.sum() < 2:
            return
        norms = gradients.norm(dim=1)
        lengths, pace = self.factor * norms, losses / self.initial
        target = lengths[seen].mean() * (pace / pace[seen].mean()) ** self.alpha
        slope = norms * torch.sign(lengths - target)
        moved = torch.where(seen, self.factor - self.lr * slope, self.factor).clamp(min=1e-3)
        self.factor.copy_(moved * len(moved) / moved.sum())


WEIGHTINGS = {"fixed": FixedWeighting, "uncertainty": UncertaintyWeighting, "gradnorm": GradNormWeighting}


def task_weighting(spec: str | Mapping[str, Any], tasks: Sequence[Target]) -> FixedWeighting:
    """The weighting that `spec` names: "fixed", "uncertainty", "gradnorm" or {"name": "gradnorm", "alpha": ...}.

    Raises ValueError naming the nearest ones for an unknown name or argument.
    """
    arguments = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = str(arguments.pop("name", None))
    if name not in WEIGHTINGS:
        raise unknown("weighting", name, WEIGHTINGS)
    known = [argument for argument in inspect.signature(WEIGHTINGS[name]).parameters if argument != "tasks"]
    for argument in arguments:
        if argument not in known:
            raise unknown(f"argument of weighting {name}", argument, known)
    return WEIGHTINGS[name](tasks, **arguments)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _anywhere(seen: Tensor) -> Tensor:
    """Which booleans [K] are true on any process: all of them train then, or the mean over them would be too small."""
    if not _several():
        return seen
    count = seen.to(torch.int32)
    dist.all_reduce(count)
    return count > 0


def _gradient(loss: Tensor, shared: Sequence[Tensor]) -> Tensor:
    """The gradient of a loss at the shared parameters as one vector, zero where it does not reach them."""
    found = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True)
    return torch.cat([torch.zeros_like(p).view(-1) if g is None else g.reshape(-1) for p, g in zip(shared, found)])
