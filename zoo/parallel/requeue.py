"""SLURM's notice that a job's time ends, answered by all processes together, at the end of a step."""

from __future__ import annotations

import signal
import threading
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.plugins.environments import SLURMEnvironment


class RequeueAfterStep(Callback):
    """Save a checkpoint and requeue the job after the step in which any process got the signal.

    Lightning does both as soon as the signal comes, wherever a process is: saving in parts, which processes do
    together, would meet others in the middle of an exchange. The checkpoint is Lightning's `hpc_ckpt_1.ckpt` in
    `default_root_dir`, from which the requeued job goes on by itself. `sbatch --signal=USR1@90` asks for the signal.
    """

    def __init__(self) -> None:
        self._noticed: int | None = None
        self._answer: Any = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the signal over from Lightning, whose answer comes after the step."""
        number = trainer.strategy.cluster_environment.requeue_signal
        if threading.current_thread() is threading.main_thread():
            self._answer = signal.signal(number, self._notice)

    def _notice(self, number: int, frame: Any) -> None:
        self._noticed = number

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Ask all processes whether one of them was told, when this batch ended a step."""
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        number = torch.tensor(self._noticed or 0, device=trainer.strategy.root_device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        if not int(number) or not callable(self._answer):
            return
        self._noticed = None
        # The job may be ended as soon as it is queued again.
        trainer.strategy.saver.background = False
        self._answer(int(number), None)


def prepare(trainer: Any) -> None:
    """Give a trainer the callback, where Lightning would requeue the job that SLURM runs."""
    environment = trainer.strategy.cluster_environment
    given = any(isinstance(callback, RequeueAfterStep) for callback in trainer.callbacks)
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and not given:
        trainer.callbacks.append(RequeueAfterStep())
