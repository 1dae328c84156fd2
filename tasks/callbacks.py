"""Callbacks that every task brings along: exact resumption, throughput, the last checkpoint."""

from __future__ import annotations

import random
import signal
import threading
import time
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from zoo.data import Loader


class ExactResume(Callback):
    """Make a resumed run continue bit for bit: random states of every process, and gradients not yet used.

    What Lightning keeps (weights, optimizer, schedule, counters) and what the loader keeps (its position) are not
    enough: dropout and router noise draw from generators, and a checkpoint inside an accumulation window would lose
    the window's first gradients. With several processes those are lost: make checkpoints at optimizer steps there.
    Epochs, too: Lightning takes one that was stopped in its middle for a whole one, forgets where the loader is when
    an epoch has ended or the schedule asked how long one is, and counts batches by their number whatever their size.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None
        self._resumed = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what is needed to the checkpoint."""
        states = [random_state()]
        if trainer.world_size > 1:
            states = [{}] * trainer.world_size
            dist.all_gather_object(states, random_state())
        extra: dict[str, Any] = {"random": states, "gradients": {}, "counts": {}}
        if trainer.world_size == 1 and trainer.fit_loop.epoch_loop._should_accumulate():
            extra["gradients"] = {n: p.grad for n, p in pl_module.named_parameters() if p.grad is not None}
            # What gates counted since their last step: loads, open gates, dropped assignments.
            extra["counts"] = {
                name: counts
                for name, module in pl_module.named_modules()
                if (counts := {k: v for k, v in vars(module).items() if k.endswith("_since_update") and v is not None})
            }
        checkpoint["exact_resume"] = extra
        batches = trainer.fit_loop.epoch_loop.batch_progress
        whole = batches.is_last_batch or batches.current.ready >= trainer.num_training_batches
        epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]
        if epochs["current"]["processed"] == epochs["current"]["started"]:
            for counts in epochs.values():
                counts["processed"] -= not whole
                counts["completed"] = counts["processed"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep it until the first batch: what happens before may still draw random numbers."""
        self._loaded = checkpoint.get("exact_resume")
        self._resumed = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the loader go on where it was, and Lightning count as many of its batches as are behind it."""
        fit: Any = trainer.fit_loop
        loader = trainer.train_dataloader
        if places := fit._combined_loader_states_to_load:
            fit._combined_loader._load_state_dicts(places)
            fit._combined_loader_states_to_load = []
        resumed, self._resumed = self._resumed, False
        if not (resumed and isinstance(loader, Loader)):
            return
        batches = fit.epoch_loop.batch_progress
        if loader.batches_done >= trainer.num_training_batches:
            loader.next_epoch()
            batches.is_last_batch = False
        counts = batches.current
        missing = loader.batches_done - counts.ready
        for name in ("ready", "started", "processed", "completed"):
            setattr(counts, name, getattr(counts, name) + missing)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Put it back."""
        if self._loaded is None:
            return
        extra, self._loaded = self._loaded, None
        if len(extra["random"]) == trainer.world_size:
            set_random_state(extra["random"][trainer.global_rank])
        parameters, modules = dict(pl_module.named_parameters()), dict(pl_module.named_modules())
        for name, gradient in extra["gradients"].items():
            parameters[name].grad = gradient.to(parameters[name].device)
        for name, counts in extra["counts"].items():
            for attribute, value in counts.items():
                setattr(modules[name], attribute, value.to(pl_module.device))


class Throughput(Callback):
    """Log tokens, images or what a task counts per second over all processes, validation left out."""

    def __init__(self) -> None:
        self._since, self._count, self._step = 0.0, 0, 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock, unless it runs."""
        if not self._since:
            self._since, self._count = time.perf_counter(), 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count, and log at Lightning's interval."""
        share = trainer.distributed_sampler_kwargs
        self._count += pl_module.count(batch) * (share["num_replicas"] if share else 1)  # type: ignore[operator]
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step != self._step and (step % every == 0 or step == trainer.max_steps):
            self._step = step
            rate = self._count / max(time.perf_counter() - self._since, 1e-9)
            pl_module.log(f"{pl_module.unit}/s", rate, prog_bar=True, logger=False)
            pl_module.log(f"train/{pl_module.unit}_per_s", rate)
            self._since = 0.0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._since = 0.0


class SaveLast(Callback):
    """Keep checkpoints/last.ckpt beside the logs: every so many steps, and at the end, whatever ended the run.

    The file, or folder of a checkpoint in parts, is replaced whole. Where an earlier run left one, as in a folder
    without logs, and this run does not go on from it, this one's is last-v1.ckpt, and so on. The first Ctrl-C ends the
    run after the step it is in, and so with a checkpoint that continues exactly; a second one ends it at once.
    """

    def __init__(self, every_n_steps: int = 1000) -> None:
        self.every_n_steps = every_n_steps
        self._saved_step, self.interrupted, self._name = 0, False, ""
        self._handler: Any = None

    def path(self, trainer: Trainer) -> Path:
        """Where the checkpoint is."""
        return Path(trainer.log_dir or trainer.default_root_dir, "checkpoints", self._name or "last.ckpt")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Catch Ctrl-C, in a single process: several would not stop at the same step."""
        self._saved_step = trainer.global_step
        self._name = self._name or trainer.strategy.broadcast(self._free_name(trainer))
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, self._interrupt)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save or stop, when this batch ended a step."""
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        trainer.should_stop = trainer.should_stop or self.interrupted
        if trainer.global_step - self._saved_step >= self.every_n_steps:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what came after the last time."""
        if trainer.global_step != self._saved_step:
            self._save(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how to go on."""
        if self.interrupted:
            print(f"stopped after step {trainer.global_step}; go on with --ckpt_path {self.path(trainer)}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give Ctrl-C back."""
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None

    def _free_name(self, trainer: Trainer) -> str:
        """A name that no checkpoint has but the one that this run goes on from."""
        names = chain(["last.ckpt"], (f"last-v{number}.ckpt" for number in count(1)))
        paths = (self.path(trainer).with_name(name) for name in names)
        return next(p.name for p in paths if not p.exists() or p.resolve() == Path(trainer.ckpt_path or "").resolve())

    def _interrupt(self, number: int, frame: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def _save(self, trainer: Trainer) -> None:
        path = self.path(trainer)
        if getattr(trainer.strategy, "writes_whole", False):
            trainer.save_checkpoint(path)
        else:
            draft = path.with_suffix(".part")
            trainer.save_checkpoint(draft)
            if trainer.is_global_zero:
                draft.replace(path)
        self._saved_step = trainer.global_step


class Before(Callback):
    """The first of all callbacks: lets a `SaveLast`, else the last of them, save before the others end training.

    Lightning's averages of weights take the model's place there; a checkpoint made after that would go on with them.
    """

    def __init__(self, saver: SaveLast) -> None:
        self.saver = saver

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        self.saver.on_train_end(trainer, pl_module)


class Begun(Callback):
    """Tells whether a batch has begun, which a resumed run's counters do not."""

    def __init__(self) -> None:
        self.yes = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """It has."""
        self.yes = True

    def on_validation_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """It has, unless training is still to come."""
        self.yes = self.yes or trainer.state.fn != TrainerFn.FITTING

    def on_test_batch_start(self, *args: Any) -> None:
        """It has."""
        self.yes = True

    def on_predict_batch_start(self, *args: Any) -> None:
        """It has."""
        self.yes = True


def random_state() -> dict[str, Any]:
    """States of all generators of this process, in types that a checkpoint loads without pickle."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set what `random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
