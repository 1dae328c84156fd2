"""Lightning's command line with our defaults, and with errors that help."""

from __future__ import annotations

import logging
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse._typehints import ActionTypeHint
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from tasks.callbacks import Before, Begun, SaveLast
from tasks.cli import TASKS
from tasks.cli_options import ArgumentMistake, Network, Parser, Table, by_option
from tasks.folders import check_writable, remove_unused
from zoo import extras
from zoo.parallel import ExpertParallelStrategy
from zoo.parallel.checkpoint import found, is_sharded

TABLES = ("model.router", "model.losses", "model.overrides", "model.teacher")  # options that are tables
TRAINER_DEFAULTS = {
    "max_steps": 1000,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    "default_root_dir": "runs",
}


def run(domain: str, task: type[LightningModule], data: type[LightningDataModule], args: Sequence[str]) -> int:
    """Parse, build, and run; returns the exit status, 130 after Ctrl-C, and 2, before any work, for wrong arguments."""
    quiet()
    if "expert_parallel" not in StrategyRegistry:
        StrategyRegistry.register("expert_parallel", ExpertParallelStrategy, "experts, FSDP2 and tensors in parallel")
    try:
        cli = TaskCLI(domain, args[0], task, data, list(args))
    except ArgumentMistake as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    # As of a program that Ctrl-C ended, so that what a shell would run after it does not begin.
    trainer: Any = cli.trainer
    return 130 if any(isinstance(c, SaveLast) and c.interrupted for c in trainer.callbacks) else 0


def loggers(folder: str | Path, name: str) -> list[Logger]:
    """CSV and TensorBoard logs in one new folder, FOLDER/NAME/version_N."""
    csv = CSVLogger(str(folder), name=name)
    return [csv, TensorBoardLogger(str(folder), name=name, version=csv.version)]


def newest(log_dir: Path) -> str | None:
    """The newest whole last.ckpt of this run's kind, or None: what a restarted run goes on from.

    They are in `log_dir`, or where runs have folders of their own, version_N, in any beside it.
    """
    own = log_dir.parent.glob("version_*") if log_dir.name.startswith("version_") else [log_dir]
    folders = [folder / "checkpoints" for folder in own]
    paths = [found(path) for folder in folders for path in (folder / "last.ckpt", *folder.glob("last-v*.ckpt"))]
    there = [path for path in paths if path.exists()]
    return str(max(there, key=lambda path: path.stat().st_mtime)) if there else None


def quiet() -> None:
    """Leave out an advertisement, and warnings about matters inside Lightning and torchrec."""
    messages = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    messages.addFilter(lambda record: "litlogger" not in record.getMessage())
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)  # torchrec asks it whether it traces


MISTAKES = (ValueError, OSError, ImportError, AssertionError, MisconfigurationException)  # timm asserts


OF_ANOTHER, LONG = "Error(s) in loading state_dict", 400  # torch names every tensor


@contextmanager
def _one_line(*kinds: type[Exception], unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Turn these exceptions into an ArgumentMistake, but where `unless` says otherwise."""
    try:
        with extras.named():
            yield
    except kinds as error:
        if unless():
            raise
        raise ArgumentMistake(" ".join(str(error).split()) or type(error).__name__) from error


class SaveConfig(SaveConfigCallback):
    """Keep a training run's configuration beside its logs, and nothing of other runs."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Without logs the folder is the same in every run, and a second one would find its file there."""
        if stage == "fit" and trainer.logger is not None:
            super().setup(trainer, pl_module, stage)


class TaskCLI(LightningCLI):
    """Lightning's command line for one subcommand of a task."""

    def __init__(
        self,
        domain: str,
        subcommand: str,
        task: type[LightningModule],
        data: type[LightningDataModule],
        args: list[str],
    ) -> None:
        self.domain, self._only, self._task = domain, subcommand, task
        # Only the one that was asked for: building the parsers of all four takes seconds.
        named = {subcommand: LightningCLI.subcommands()[subcommand]}
        self.subcommands = lambda: named  # type: ignore[method-assign]
        super().__init__(
            task,
            data,
            save_config_callback=SaveConfig,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={"prog": f"zoo {domain}"},
            auto_configure_optimizers=False,
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The task's name, where the domain has several; `tasks.cli` has chosen the classes by it."""
        for action in parser._actions:
            if isinstance(action, ActionTypeHint) and action.dest in TABLES:
                action.__class__ = Table
            elif action.dest == "model.network":
                action.__class__ = Network
        if tasks := TASKS.get(self.domain):
            own = next((name for name, row in tasks.items() if row[0] == self._task.__name__), None)
            parser.add_argument("--task", default=own, help=f"one of {', '.join(tasks)}")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse `args`; sys.argv is what data parallelism starts more processes with, and stays as it is."""
        self._args = args
        argv, sys.argv = sys.argv, sys.argv[:1]  # Lightning warns about args beside those of the process
        try:
            super().parse_arguments(parser, args)
        finally:
            sys.argv = argv

    def _parse_ckpt_path(self) -> None:
        # A checkpoint's own hyper-parameters fill in for a config file; they overrule neither one nor what is said.
        if self.config[self._only].get("config") or not self.config[self._only].get("ckpt_path"):
            return
        said, router = self.config.clone(), f"{self._only}.model.router"
        if isinstance(self.config.get(router), dict):
            self.config[router] = None  # not to be taken for a class by jsonargparse
        super()._parse_ckpt_path()
        again = [self._only]
        for option, *values in by_option(self._args[1:]):
            name = option.partition("=")[0].removeprefix("--").removesuffix("+")
            if name.count(".") == 1 and name.startswith("model."):
                self.config[f"{self._only}.{name}"] = said[f"{self._only}.{name}"]
            elif name.startswith("model."):
                again += [option, *values]
        self.config = self.parser.parse_args(again, namespace=self.config)

    def _set_seed(self) -> None:
        with _one_line(ValueError):
            super()._set_seed()

    def _run_subcommand(self, subcommand: str) -> None:
        """Run; what is wrong with data or options and shows before the first batch is one line, not a traceback."""
        trainer: Any = self.trainer
        begun = next(callback for callback in trainer.callbacks if isinstance(callback, Begun))
        with _one_line(*MISTAKES, unless=lambda: begun.yes):
            try:
                with self._keeping_predictions():
                    super()._run_subcommand(subcommand)
            except Exception as error:
                if not begun.yes and trainer.is_global_zero and trainer.loggers:
                    remove_unused(Path(trainer.log_dir or ""))
                if not isinstance(error, RuntimeError):
                    raise
                told = " ".join(str(error).split())
                if begun.yes or not told.startswith(OF_ANOTHER):
                    raise
                told = told if len(told) < LONG else f"{told[:LONG]}..."
                raise ValueError(f"the checkpoint is of another model: {told}") from error

    @contextmanager
    def _keeping_predictions(self) -> Iterator[None]:
        """Whatever stops `predict`, an image that cannot be read or Ctrl-C: write what there is to the file it makes.

        With several processes, which would wait for one that has stopped, nothing is written.
        """
        try:
            yield
        except BaseException:
            trainer: Any = self.trainer
            found = trainer.predict_loop.predictions if self._only == "predict" and trainer.world_size == 1 else []
            if found and isinstance(found[0], list):  # of rows; not what was written, or can be read, already
                print("stopped early; kept:", end=" ", flush=True)
                self.model.show_predictions(found)
            raise

    def instantiate_classes(self) -> None:
        """Build task, data and trainer, and check them; mistakes are one line, not a traceback."""
        config = self.config[self._only]
        checkpoint = config.get("ckpt_path")
        if checkpoint and checkpoint not in ("auto", "best", "last", "hpc") and not found(Path(checkpoint)).exists():
            raise ArgumentMistake(f"there is no checkpoint {checkpoint!r}")
        if checkpoint and (folder := found(Path(checkpoint))).is_dir() and not is_sharded(folder):
            inside = ", ".join(sorted(str(path) for path in folder.glob("*.ckpt"))[:3])
            raise ArgumentMistake(
                f"{checkpoint} is a folder, and no checkpoint" + (f"; it has {inside}" * bool(inside))
            )
        if checkpoint and Path(checkpoint).is_file() and not zipfile.is_zipfile(checkpoint):
            raise ArgumentMistake(f"{checkpoint} is no checkpoint, or not a whole one")
        with _one_line(*MISTAKES, TypeError, RuntimeError):
            if self._only == "fit" and (root := config["trainer"]["default_root_dir"]):
                check_writable("trainer.default_root_dir", root)
            super().instantiate_classes()
            if checkpoint in ("auto", "last"):
                checkpoint = self._newest(checkpoint)
                config["ckpt_path"] = self.config_init[self._only]["ckpt_path"] = checkpoint
            file = checkpoint if checkpoint and found(Path(checkpoint)).exists() else None
            whole = isinstance(self.trainer.strategy, DDPStrategy | SingleDeviceStrategy)
            if whole and file and found(Path(file)).is_dir():
                raise ValueError(
                    f"{file} is a checkpoint in parts, which trainer.strategy expert_parallel reads, on one process too"
                )
            self.model.check_run(self.trainer, self.datamodule, self._only, file)
            if self._only != "fit" and not checkpoint and not self.model.hparams["pretrained"]:
                warnings.warn(
                    f"{self._only}: neither --ckpt_path nor model.pretrained is given, so that the weights are those "
                    "that a fit would start from",
                    stacklevel=2,
                )

    def _newest(self, wanted: str) -> str | None:
        """The checkpoint that "auto" means, or "last", for which those of a trainer's own callbacks come first.

        A fit may find none, and begins afresh, as Lightning says of "last"; raises ValueError for all else.
        """
        trainer = self.trainer
        root = Path(trainer.default_root_dir)
        own = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and wanted == "last"]
        paths = [path for saver in own for path in saver._find_last_checkpoints(trainer)]
        if paths:
            return max(paths, key=lambda path: get_filesystem(path).modified(path))
        logs = Path((trainer.log_dir if self._only == "fit" else root / self.domain / "version_0") or root)
        checkpoint = newest(logs)
        told = f"--ckpt_path {wanted}: no last.ckpt in {logs.parent if logs.name.startswith('version_') else logs}"
        if checkpoint is None and self._only != "fit":
            raise ValueError(f"{told}; give the path of a checkpoint")
        if checkpoint is None and wanted == "last":
            warnings.warn(f"{told}, so that training begins afresh", stacklevel=2)
        return checkpoint

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer with CSV and TensorBoard logs and checkpoints, unless the config names its own."""
        config = self._get(self.config_init, "trainer")
        fitting = self.subcommand == "fit" and not config.get("fast_dev_run")
        if config.get("logger") is None:
            kwargs["logger"] = loggers(config["default_root_dir"], self.domain) if fitting else False
        given = config.get("callbacks") or []
        callbacks = [given] if isinstance(given, Callback) else list(given)
        if fitting and config.get("enable_checkpointing") is not False:
            saver = SaveLast()
            callbacks = [Before(saver), *callbacks, saver]
            # Lightning would otherwise add one of its own, which writes an epoch's last step a second time.
            kwargs["enable_checkpointing"] = any(isinstance(c, ModelCheckpoint) for c in callbacks)
        if fitting and kwargs.get("logger", config.get("logger")):
            callbacks += [LearningRateMonitor("step")]
        return super().instantiate_trainer(callbacks=[*callbacks, Begun()], **kwargs)

    def after_predict(self) -> None:
        """Show what was predicted."""
        self.model.show_predictions(self.trainer.predict_loop.predictions)
