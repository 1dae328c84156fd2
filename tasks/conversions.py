"""Conversions of a model before it is trained, as a config lists them: upcycling and its kin."""

from __future__ import annotations

import functools
import inspect
import itertools
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import zoo
from zoo.convert.adapter_kinds import KINDS
from zoo.convert.usage import is_meta
from zoo.nearest import unknown
from zoo.parallel import checkpoint as store

# Functions of `zoo` from a model to a model.
CONVERSIONS = (
    "adapt",
    "average",
    "compose_adapters",
    "grow",
    "merge_adapters",
    "mix",
    "prune",
    "quantise",
    "share_depth",
    "split",
    "to_dense",
    "upcycle",
)
CALIBRATE = "calibrate"
BATCHES = 8
DECIDED = "decided_by_conversions"  # in checkpoints


def parse(said: Any) -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments of conversions from [{name: {argument: value}}, ...].

    Raises TypeError for another form; ValueError, naming the nearest, for an unknown conversion or argument, for a
    `calibrate` that is no number of batches, for what a conversion needs and is not given, and for adapters that hear
    something of each sample.
    """
    if isinstance(said, (str, Mapping)) or not isinstance(said, Sequence):
        raise TypeError(f"convert: expected a list such as [{{upcycle: {{num_experts: 8}}}}], got {said!r}")
    found = []
    for one in said:
        one = {one: {}} if isinstance(one, str) else one
        if not isinstance(one, Mapping) or len(one) != 1:
            raise TypeError(f"convert: expected one conversion and its arguments in each entry, got {one!r}")
        [(name, arguments)] = one.items()
        arguments = {} if arguments is None else arguments
        if name not in CONVERSIONS:
            raise unknown("conversion", str(name), CONVERSIONS)
        if not isinstance(arguments, Mapping):
            raise TypeError(f"convert: {name}: expected its arguments as a mapping, got {arguments!r}")
        _check(name, arguments)
        found.append((name, dict(arguments)))
    return found


def converted(model: nn.Module, conversions: Iterable[tuple[str, Mapping[str, Any]]], task: Any = None) -> nn.Module:
    """The model after all conversions, each applied to what the one before gave.

    A conversion that looks at data gets the task's loss (`batch_loss`) on as many of its training batches as the
    argument `calibrate` says, 8 if it does not. Without memory (meta device) none looks at data; with several processes
    the first one's data decide. What such a conversion decided of the model's shape, often nothing, is kept in
    `task.decided` by its number. Where that is there, as with a checkpoint to be read, it does not look at data again
    (`zoo.convert.again`): weights that only data could tell are the checkpoint's.
    """
    looked, decided = False, dict(getattr(task, "decided", {}))
    for number, (name, given) in enumerate(conversions):
        function, arguments = getattr(zoo, name), dict(given)
        parameters, again = inspect.signature(function).parameters, getattr(function, "again", None)
        batches = arguments.pop(CALIBRATE, BATCHES)
        if again is not None and number in decided:
            model = again(model, decided[number], **arguments)
            continue
        if "share" in parameters:
            arguments.setdefault("share", True)  # the model before is nobody else's
        data = {}
        if CALIBRATE in parameters:
            data[CALIBRATE] = functools.partial(_losses, task, batches)
            looked = True
            if task is not None and task._trainer is not None and not is_meta(model):
                model = model.to(task._trainer.strategy.root_device)
        before, model = model, function(model, **arguments, **data)
        if again is not None and task is not None and not is_meta(model):
            found = vars(model).pop("decided", {})
            decided[number] = _first(found)
            if decided[number] != found:
                model = again(before, decided[number], **arguments)
            task.decided = decided
        del before
    if looked:
        _agree(model)
    return model


def _losses(task: Any, batches: int, model: nn.Module) -> Iterator[Tensor]:
    """The task's loss with this model on each of some training batches, in evaluation mode."""
    data = getattr(task._trainer, "datamodule", None)
    if data is None:
        raise ValueError("convert: a conversion that looks at data needs a trainer with a data module")
    before, training = task.model, model.training
    device = next(model.parameters()).device
    task.model = model.eval()
    try:
        for batch in itertools.islice(data.train_dataloader(), batches):
            yield task.batch_loss(task.transfer_batch_to_device(batch, device, 0))
    finally:
        model.train(training)
        task.model = before


def looks_at_data(conversions: Iterable[tuple[str, Mapping[str, Any]]]) -> bool:
    """Whether one of these conversions does."""
    return any(CALIBRATE in inspect.signature(getattr(zoo, name)).parameters for name, _ in conversions)


def decided_in(checkpoint: str | Path) -> dict[int, dict[str, Any]]:
    """What data decided in the run that a checkpoint is of, a file or a folder of parts; its weights are not read."""
    path = store.found(Path(checkpoint))
    try:
        kept = torch.load(path / store.META if path.is_dir() else path, "cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:  # it has objects of some class, which whoever reads all of it may allow
        return {}
    return kept.get(DECIDED, {})


def _first(decided: dict[str, Any]) -> dict[str, Any]:
    """What the first process decided."""
    if not (dist.is_available() and dist.is_initialized()):
        return decided
    told = [decided]
    dist.broadcast_object_list(told, 0)
    return told[0]


@torch.no_grad()
def _agree(model: nn.Module) -> None:
    """Give every process the first one's weights and buffers: each calibrated on data of its own."""
    if dist.is_available() and dist.is_initialized():
        for value in model.state_dict().values():
            if not value.is_meta:
                dist.broadcast(value, 0)


def _check(name: str, arguments: Mapping[str, Any]) -> None:
    parameters = dict(list(inspect.signature(getattr(zoo, name)).parameters.items())[1:])
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    parameters = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    for argument in arguments:
        if argument not in parameters and not any_name:
            raise unknown(f"argument of {name}", str(argument), parameters)
    kind = KINDS.get(str(arguments.get("kind"))) if name == "adapt" else None
    if kind is not None and kind.hears is not None:
        raise ValueError(
            f"convert: adapt: the gates of {arguments['kind']} hear {kind.hears} of each sample, and tasks tell "
            "them nothing; adapt and train such a model in Python, calling it with moe_context"
        )
    batches = arguments.get(CALIBRATE, BATCHES)
    if not isinstance(batches, int) or isinstance(batches, bool) or batches < 1:
        raise ValueError(f"convert: {name}.calibrate: expected a number of batches of at least 1, got {batches!r}")
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in arguments]
    if missing:
        raise ValueError(f"convert: {name} needs {' and '.join(missing)}")
