"""Checkpoints of models over several processes: each writes its own part, any number of processes reads them.

A checkpoint is a folder of torch's distributed checkpoint format, with meta.pt for what is not a tensor in parts. It is
written beside its place and moved when whole, so that what is there is whole; what an interrupted save leaves behind
ends in ".part", or in ".old" where it was interrupted between two moves.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

META = "meta.pt"
# Options of an optimizer a parameter at a time: meshes differ in how parameters are grouped.
FLAT = StateDictOptions(flatten_optimizer_state_dict=True, cpu_offload=False)


def is_sharded(path: Path) -> bool:
    """Whether there is a whole checkpoint of parts at a path: what says so is written when all else is."""
    return (path / ".metadata").is_file() and (path / META).is_file()


def found(path: Path) -> Path:
    """Where a checkpoint is: at its path, or beside it, whole already, where it was not moved there any more."""
    draft, old = (path.with_name(f"{path.name}.{end}") for end in ("part", "old"))
    if is_sharded(draft):
        return draft
    return old if not path.exists() and is_sharded(old) else path


def save(path: Path, model: nn.Module, optimizers: Mapping[str, Optimizer], meta: Mapping[str, Any]) -> None:
    """Write model, optimizers and the rest; all processes call it together.

    Raises OSError on every process when one of them cannot write; what was at the path before is still there then.
    """
    Saver(background=False).save(path, model, optimizers, meta)


class Saver:
    """Writes one checkpoint after another, in the background if asked: training goes on once the parts are copied.

    A checkpoint in the background takes its place when the next one begins, or at `wait`; until then it is beside it,
    and found there.
    """

    def __init__(self, background: bool = True) -> None:
        self.background = background
        self._group: dist.ProcessGroup | None = None
        self._pending: tuple[Path, Future[Any]] | None = None

    def save(
        self,
        path: Path,
        model: nn.Module,
        optimizers: Mapping[str, Optimizer],
        meta: Mapping[str, Any],
        without: Collection[str] = (),
    ) -> None:
        """Write model, but for what `without` names, optimizers and the rest; all processes call it together.

        Raises OSError on every process when one of them cannot write, or could not write the last one; what was at the
        path before is still there then.
        """
        self.wait()
        draft, first = path.with_name(f"{path.name}.part"), dist.get_rank() == 0
        state = _state(model, optimizers, without)
        problem: BaseException | None = None
        if first:
            try:
                if is_sharded(draft):
                    replace(draft, path)
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir(parents=True)
                torch.save(dict(meta), draft / META)
            except OSError as error:
                problem = error
        _together(problem, path)
        if self.background:
            if self._group is None:  # of its own: a thread uses it beside training
                self._group = dist.new_group(backend="gloo")
            future: Any = dcp.async_save(state, checkpoint_id=draft, process_group=self._group)
            self._pending = path, future
            return
        try:
            dcp.save(state, checkpoint_id=draft)
        except (Exception, CheckpointException) as error:  # of whatever kind: the others wait for this process
            problem = error
        self._finish(problem, path)

    def wait(self) -> None:
        """Until the last checkpoint is whole, and in its place; all processes call it together. Raises as `save`."""
        if self._pending is None:
            return
        (path, future), self._pending = self._pending, None
        problem: BaseException | None = None
        try:
            future.result()
        except (Exception, CheckpointException) as error:
            problem = error
        self._finish(problem, path)

    def _finish(self, problem: BaseException | None, path: Path) -> None:
        _together(problem, path)
        if dist.get_rank() == 0:
            replace(path.with_name(f"{path.name}.part"), path)
        dist.barrier()


def _together(problem: BaseException | None, path: Path) -> None:
    """Raise on every process what any of them met."""
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, None if problem is None else _in_short(problem))
    for rank, text in enumerate(told):
        if text is not None:
            raise OSError(f"{path}: process {rank} could not write its part: {text}") from problem


def _in_short(problem: BaseException) -> str:
    """What went wrong, without torch's trace of how."""
    causes = (
        [cause for cause, _ in problem.failures.values()] if isinstance(problem, CheckpointException) else [problem]
    )
    return "; ".join(dict.fromkeys(f"{type(cause).__name__}: {cause}" for cause in causes))


def replace(draft: Path, path: Path) -> None:
    """Put a whole file or folder in the place of another, or where there is none."""
    if not draft.is_dir():
        draft.replace(path)
        return
    old = path.with_name(f"{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.is_dir():
        path.rename(old)
    elif path.exists():
        path.unlink()
    draft.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _state(model: nn.Module, optimizers: Mapping[str, Optimizer], without: Collection[str]) -> dict[str, Any]:
    whole = get_model_state_dict(model, options=FLAT)
    state: dict[str, Any] = {"model": {name: value for name, value in whole.items() if name not in without}}
    return state | {name: get_optimizer_state_dict(model, o, options=FLAT) for name, o in optimizers.items()}


def load(
    path: Path,
    model: nn.Module,
    optimizers: Mapping[str, Optimizer],
    strict: bool = True,
    weights_only: bool = True,
    without: Collection[str] = (),
) -> dict[str, Any]:
    """Read a checkpoint into model and optimizers, spread over processes in whatever way; returns the rest.

    What `without` names is left as it is, and is not missing for a model that says so of itself.

    Raises FileNotFoundError where there is none, and ValueError naming the folder where it is not whole or damaged.
    """
    path = found(path)
    if not is_sharded(path):
        raise FileNotFoundError(f"{path}: no whole checkpoint: .metadata or {META} is missing")
    state = _state(model, optimizers, without)
    try:
        dcp.load(state, checkpoint_id=path)
        meta = torch.load(path / META, weights_only=weights_only)
    except (Exception, CheckpointException) as error:
        raise ValueError(f"{path}: the checkpoint cannot be read: {_in_short(error)}") from error
    set_model_state_dict(model, state["model"], options=StateDictOptions(strict=strict))
    for name, optimizer in optimizers.items():
        set_optimizer_state_dict(model, optimizer, state[name], options=FLAT)
    return meta


def load_file(
    path: Path, model: nn.Module, optimizers: Sequence[Optimizer], strict: bool = True, weights_only: bool | None = None
) -> dict[str, Any]:
    """Read one file of Lightning's, of a model in one process or gathered from parts, into parts; returns the rest.

    Every process reads it. Raises ValueError for optimizers of other groups of parameters.
    """
    checkpoint = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
    options = StateDictOptions(full_state_dict=True, strict=strict)
    set_model_state_dict(model, checkpoint.pop("state_dict"), options=options)
    for optimizer, state in zip(optimizers, checkpoint.get("optimizer_states", ())):
        set_optimizer_state_dict(model, optimizer, _by_name(path, model, optimizer, state), options=options)
    return checkpoint


def _by_name(path: Path, model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state as torch saves it, by the names of parameters, with the groups that there are here."""
    number: dict[torch.Tensor, int] = {parameter: i for i, parameter in enumerate(model.parameters())}
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    saved = [i for group in state["param_groups"] for i in group["params"]]
    if saved == list(range(len(saved))):
        # Numbered as they come in groups, of which each may be several here: one for every mesh, in the model's order.
        groups, known = iter(optimizer.param_groups), []
        for group in state["param_groups"]:
            mine: list[torch.Tensor] = []
            while len(mine) < len(group["params"]) and (part := next(groups, None)) is not None:
                mine += part["params"]
            known += sorted(mine, key=number.__getitem__)
        place = {parameter: i for i, parameter in enumerate(known)}
    else:
        place = number  # numbered as they come in the model
    sizes = [[len(g["params"]) for g in each] for each in (state["param_groups"], optimizer.param_groups)]
    here = {place.get(p, -1) for group in optimizer.param_groups for p in group["params"]}
    if here != set(saved):
        raise ValueError(
            f"{path}: its optimizer has groups of {sizes[0]} parameters, which are not those of {sizes[1]}"
        )
    options = {i: group for group in state["param_groups"] for i in group["params"]}
    told = []
    for group in optimizer.param_groups:
        own = {name: group[name] for name in ("foreach", "fused") if name in group}
        told.append({**options[place[group["params"][0]]], **own, "params": [names[p] for p in group["params"]]})
    # Of what has had no gradient yet there is no state.
    each = {names[p]: state["state"][i] for p, i in place.items() if i in state["state"]}
    return {"state": each, "param_groups": told}


def whole_weights(path: Path) -> dict[str, torch.Tensor]:
    """The model's tensors of a checkpoint, put together in one process that needs no others."""
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    state = _load_state_dict_from_keys("model", checkpoint_id=found(path))
    return state["model"]
