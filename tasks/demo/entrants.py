"""What both parts of the demo share: trainings set up by the command line, and kept by a clock."""

from __future__ import annotations

import csv
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from .machine import Stopwatch
from .output import tell


def entrant(domain: str, task: type, data: type, config: Path, options: Mapping[str, str]) -> Any:
    """What `zoo DOMAIN fit` makes of a configuration: its model, datamodule and trainer, not yet run.

    Raises ValueError for a configuration that does not fit.
    """
    from tasks.lightning_cli import ArgumentMistake, TaskCLI

    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # advice on loaders, loggers and speed

    class Prepared(TaskCLI):
        def _run_subcommand(self, subcommand: str) -> None:
            """Left to the caller."""

    everywhere = {
        "trainer.accelerator": "cpu",
        "trainer.max_steps": "-1",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.enable_checkpointing": "false",
        "trainer.num_sanity_val_steps": "0",
    }
    switches = (f"--{key}={value}" for key, value in {**everywhere, **options}.items())
    try:
        return Prepared(domain, "fit", task, data, ["fit", "--config", str(config), *switches])
    except ArgumentMistake as mistake:
        raise ValueError(f"{config}: {mistake}") from mistake


def train(cli: Any, watch: Clocked) -> tuple[Any, Any, Any]:
    """Train an entrant under a watch, whose folder is made; returns its task, data and trainer.

    The watch comes before the configuration's own callbacks, and the data has been announced already.
    """
    import torch

    watch.folder.mkdir(parents=True, exist_ok=True)
    cli.trainer.callbacks.insert(0, watch)
    cli.datamodule.prepare_data = lambda: None
    torch.manual_seed(0)
    cli.trainer.fit(cli.model, cli.datamodule)
    return cli.model, cli.datamodule, cli.trainer


class Clocked(Callback):
    """Starts with the other training, and ends after `seconds` of training or when it is to stop.

    A subclass says what a step leaves behind (`after_step`) and an evaluation (`after_evaluation`); neither, nor the
    evaluation itself, is training time.
    """

    unit: str  # what `seen` counts

    def __init__(
        self, name: str, folder: Path, start: Callable[[], None], stopping: Callable[[], bool], seconds: float
    ) -> None:
        self.name, self.folder, self.seconds = name, folder, seconds
        self.start, self.stopping = start, stopping
        self.watch, self.seen = Stopwatch(), 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the other training, and start the clock."""
        self.start()
        self.watch.go()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the step, and stop when it is time to."""
        self.watch.halt()
        self.after_step(trainer, batch)
        if self.watch.seconds >= self.seconds or self.stopping():
            trainer.should_stop = True
        self.watch.go()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluation is not training time."""
        self.watch.halt()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what was reached, and tell."""
        reached = self.after_evaluation(trainer)
        rate = self.seen / max(self.watch.seconds, 1e-9)
        tell(
            f"{self.watch.seconds:6.1f} s  {self.name:<6} step {trainer.global_step:5d}   "
            f"{reached}   {rate:7,.0f} {self.unit}/s"
        )
        self.watch.go()

    def after_step(self, trainer: Trainer, batch: Any) -> None:
        """Count a batch."""
        raise NotImplementedError

    def after_evaluation(self, trainer: Trainer) -> str:
        """Keep the figures of an evaluation; the answer is what to tell of them."""
        raise NotImplementedError

    def when(self, trainer: Trainer) -> dict[str, Any]:
        """The columns that place a row."""
        seconds = round(self.watch.seconds, 3)
        return {"step": trainer.global_step, "seconds": seconds, self.unit: self.seen}

    def write(self, file: str, when: dict[str, Any], **figures: Any) -> None:
        """Add a row; it is on disk at once, for a report of a run that was cut short."""
        path = self.folder / file
        row = {**when, **figures}
        new = not path.exists()
        with path.open("a", newline="") as out:
            writer = csv.DictWriter(out, row)
            if new:
                writer.writeheader()
            writer.writerow(row)
