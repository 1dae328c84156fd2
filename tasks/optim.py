"""Which parameters decay, and how the learning rate moves."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from zoo.moe import Router, ScaledLinear
from zoo.nearest import unknown

SCHEDULES = ("cosine", "wsd", "constant")


def parameter_groups(
    model: nn.Module, weight_decay: float, decay_router: bool = True, without: Collection[str] = ()
) -> list[dict[str, object]]:
    """Two AdamW groups: matrices, which decay, and everything else: norms, biases, embeddings, and on request gates.

    A bias of stacked experts is a matrix [E, F] by shape and a bias by nature; it does not decay. Nor do IA3's vectors
    [E, O], which change nothing where they are one. Nor does what a model names in `no_weight_decay()`, as timm's do
    with their position embeddings and class tokens. The parameters named in `without` are in neither group.
    """
    exempt: set[Tensor] = set()
    named: set[str] = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) or (isinstance(module, Router) and not decay_router):
            exempt.update(module.parameters())
        if isinstance(module, ScaledLinear):
            exempt.add(module.vectors)
    decayed: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or name in without:
            continue
        is_bias = name.rsplit(".", 1)[-1].endswith("bias")
        group = rest if parameter.ndim < 2 or is_bias or parameter in exempt or name in named else decayed
        group.append(parameter)
    groups: list[dict[str, object]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def layered(model: nn.Module, groups: list[dict[str, Any]], lr: float, decay: float) -> list[dict[str, Any]]:
    """The groups of a timm model split by block: the head learns at `lr`, each block before it by `decay` slower.

    Blocks are what the model's own `group_matcher` says, as in timm's layer decay (2106.08254, appendix).
    """
    from timm.models import group_parameters

    blocks = group_parameters(model, model.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
    names = {parameter: name for name, parameter in model.named_parameters()}
    deepest = max(blocks.values())
    split: dict[tuple[int, int], dict[str, Any]] = {}
    for number, group in enumerate(groups):
        for parameter in group["params"]:
            block = blocks[names[parameter]]
            empty = {**group, "params": [], "lr": lr * decay ** (deepest - block)}
            split.setdefault((number, block), empty)["params"].append(parameter)
    return list(split.values())


def regroup(checkpoint: dict[str, Any], groups: list[dict[str, Any]], model: nn.Module) -> None:
    """Let what a checkpoint has of an optimizer and its schedule fit these groups of a model's parameters, in place.

    A file that was gathered from a mesh has a group for each of its meshes, with parameters numbered as the model's
    are. Where it is of other parameters nothing is changed.
    """
    number = {parameter: i for i, parameter in enumerate(model.parameters())}
    for state, schedule in zip(checkpoint.get("optimizer_states", ()), checkpoint.get("lr_schedulers", ())):
        options = {i: group for group in state.get("param_groups", ()) for i in group["params"]}
        told = [[number[parameter] for parameter in group["params"]] for group in groups]
        if len(state.get("param_groups", groups)) == len(groups) or {i for each in told for i in each} != set(options):
            continue
        place = {i: new for new, i in enumerate(itertools.chain.from_iterable(told))}
        state["state"] = {place[i]: kept for i, kept in state["state"].items()}
        state["param_groups"] = [{**options[each[0]], "params": [place[i] for i in each]} for each in told]
        rates = {"base_lrs": "initial_lr", "_last_lr": "lr"}
        schedule |= {name: [group[rate] for group in state["param_groups"]] for name, rate in rates.items()}
        schedule["lr_lambdas"] = schedule["lr_lambdas"][:1] * len(groups)


SAID = ("initial_lr", "weight_decay", "betas")  # of a group; what a run is told, and no state of what it did


def said_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What each group of an optimizer with a schedule was told."""
    return [{name: group[name] for name in SAID if name in group} for group in optimizer.param_groups]


def tell(optimizer: torch.optim.Optimizer, schedule: Any, said: list[dict[str, Any]]) -> None:
    """Let a restored optimizer and its `LambdaLR` go by what this run says, not by what the checkpoint's run said."""
    for group, own in zip(optimizer.param_groups, said):
        group.update(own)
    schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    for group, base, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas):
        group["lr"] = base * factor(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]


class Beside(torch.optim.Optimizer):
    """An optimizer, and beside it one of embedding tables that has moved them in backward already.

    To a schedule, a checkpoint and Lightning it is one, with the groups of both.
    """

    def __init__(self, main: torch.optim.Optimizer, tables: Any) -> None:
        self.main, self.tables = main, tables
        super().__init__([torch.zeros(0)], {})  # for its hooks; the groups and states are those of the two

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of both."""
        return [*self.main.param_groups, *self.tables.param_groups]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        """What the base class makes is not used."""

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """Those of both."""
        return defaultdict(dict, {**self.main.state, **self.tables.state})

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        """What the base class makes is not used."""

    def step(self, closure: Any = None) -> Any:
        """Run the closure, in whose backward the tables move, and move the rest."""
        loss = self.main.step(closure)
        self.tables.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of both; the tables take over the learning rate for the backward that follows."""
        self.main.zero_grad(set_to_none)
        self.tables.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Of both, and the tables' learning rates, which torchrec's optimizers leave out."""
        rates = [group["lr"] for group in self.tables.param_groups]
        return {"main": self.main.state_dict(), "tables": self.tables.state_dict(), "rates": rates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of both."""
        self.main.load_state_dict(state_dict["main"])
        self.tables.load_state_dict(state_dict["tables"])
        for group, rate in zip(self.tables.param_groups, state_dict["rates"]):
            group["lr"] = rate


def learning_rate(
    schedule: str, warmup: int, total: float, floor: float = 0.1, decay: float = 0.2
) -> Callable[[int], float]:
    """The factor on the peak learning rate at each step: linear warm-up, then one of SCHEDULES down to `floor`.

    "cosine" falls over all steps that are left; "wsd" (warm-up, stable, decay: MiniCPM 2404.06395) stays up and falls
    in a straight line over the last share `decay` of the steps; "constant" does not fall. Raises ValueError when a
    schedule that ends has no number of steps to end at.
    """
    if schedule not in SCHEDULES:
        raise unknown("schedule", schedule, SCHEDULES)
    for name, share in (("min_lr_ratio", floor), ("decay_fraction", decay)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {share}")
    if total < 1:
        raise ValueError(f"schedule_steps must be at least 1, got {total}")
    if schedule != "constant" and not math.isfinite(total):
        raise ValueError(f"schedule {schedule!r} must know its end: set schedule_steps, or the trainer's max_steps")

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if schedule == "constant":
            return 1.0
        start = warmup if schedule == "cosine" else max(warmup, total * (1 - decay))
        done = min(1.0, max(0.0, (step - start) / max(1.0, total - start)))
        fall = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
        return floor + (1 - floor) * fall

    return factor
