"""What every task shares: building and compiling the model, optimizer and schedule, losses, balance, export."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor, nn

import zoo
from tasks import conversions, frozen, labels
from tasks.balance import LayerBalance
from tasks.callbacks import ExactResume, Throughput
from tasks.folders import check_free
from tasks.optim import learning_rate, parameter_groups, regroup, said_of, tell
from zoo.moe import QuantisedExperts, Step
from zoo.parallel import ExpertParallelStrategy
from zoo.parallel.parts import is_spread, meshes_of, not_finite, total_norm, whole_state
from zoo.pretrained.dispatch import LAYOUTS, check_savable, layout_of

# Among values of any type the command line takes a {"class_path": ...} for a class that it is to fill with defaults;
# but here the model makes it, which knows the sizes.
Overrides = dict[str, bool | int | float | str | list | dict | None]


def share_of(trainer: Any) -> dict[str, int]:
    """Which share of the data a process has, and of how many: the arguments of a `Loader`."""
    share = trainer.distributed_sampler_kwargs if trainer else None
    return (
        {"rank": 0, "world_size": 1} if share is None else {"rank": share["rank"], "world_size": share["num_replicas"]}
    )


def data_group(trainer: Any) -> Any:
    """The processes that have all data between them, each its own share; None for all there are."""
    return getattr(getattr(trainer.strategy, "mesh", None), "data_group", None)


class Task(LightningModule):
    """A model with MoE layers and how it is trained; a domain adds what its batches and its loss are.

    Args:
        network: the name of a model of ours, or a module.
        lr: peak learning rate.
        schedule: after warm-up "cosine", "wsd" (stable, then a linear decay) or "constant".
        warmup_steps: steps of linear warm-up.
        schedule_steps: where the schedule ends; the trainer's number of steps by default.
        decay_fraction: the share of the steps in which "wsd" decays.
        min_lr_ratio: the learning rate at the end, as a share of the peak.
        weight_decay: of AdamW, on matrices; norms, biases and embeddings do not decay.
        decay_router: whether gates decay.
        betas: of AdamW.
        activation_checkpointing: recompute layers in backward instead of keeping what they computed.
        compile: run the model through torch.compile.
        export: a folder that gets the model in its published layout when training ends.
        convert: what is done to the model before it is trained, in order, such as
            [{upcycle: {layers: all, num_experts: 8}}]: functions of `zoo` with their arguments. `calibrate`, where one
            has it, is a number of training batches.
        non_finite: what happens when a gradient is not finite: "stop" with an error that names the parameter, "skip"
            the step with a warning, or "ignore" it.
    """

    unit = "samples"  # what throughput counts
    reads = "transformers"  # the layout of the folders that it starts from
    generates = False  # whether `predict` calls the model until a text ends
    writes_parts = False  # whether in `predict` each process writes a file of its own
    left_alone: Collection[str] = ()  # names of the model's parameters that another optimizer has
    model: Any

    def __init__(
        self,
        network: str | nn.Module,
        lr: float = 1e-3,
        schedule: Literal["cosine", "wsd", "constant"] = "cosine",
        warmup_steps: int = 100,
        schedule_steps: int | None = None,
        decay_fraction: float = 0.2,
        min_lr_ratio: float = 0.1,
        weight_decay: float = 0.1,
        decay_router: bool = True,
        betas: tuple[float, float] = (0.9, 0.95),
        activation_checkpointing: bool = False,
        compile: bool = False,
        export: str | None = None,
        convert: list[dict[str, Any] | str] | None = None,
        non_finite: Literal["stop", "skip", "ignore"] = "stop",
    ) -> None:
        super().__init__()
        for name, value in (("lr", lr), ("warmup_steps", warmup_steps), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        self._conversions = conversions.parse(convert or [])
        self.decided: dict[int, dict[str, Any]] = {}
        if convert and isinstance(network, nn.Module):
            raise ValueError("convert is for a model that the task makes; convert a module before it is given")
        self.save_hyperparameters(ignore=["network"] if isinstance(network, nn.Module) else [])
        self.network = network
        self.model = network if isinstance(network, nn.Module) else None
        self._compiled = False
        self._sums: Tensor | None = None
        self._window: Tensor | None = None
        self._said: list[dict[str, Any]] = []
        self._resumed = False
        self._balance = LayerBalance()
        if self.frozen_in_files():
            self.register_load_state_dict_post_hook(frozen.forgive)

    def build(self) -> nn.Module:
        """The model that the arguments describe, fresh or pretrained."""
        raise NotImplementedError

    def converted(self, model: nn.Module) -> nn.Module:
        """A built model after the conversions that the arguments name."""
        return conversions.converted(model, self._conversions, self)

    def batch_loss(self, batch: Any) -> Tensor:
        """Mean loss of a batch, without auxiliary losses."""
        raise NotImplementedError

    def count(self, batch: Any) -> int:
        """How many of `unit` a batch holds."""
        raise NotImplementedError

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Names of what DistributedDataParallel, which asks for them, is neither to average nor to send each step."""
        frozen = [(name, module) for name, module in self.named_modules() if isinstance(module, QuantisedExperts)]
        alone = [f"{name}.{buffer}" for name, module in frozen for buffer, _ in module.named_buffers()]
        return [*(f"model.{name}" for name in self.left_alone), *alone]

    def setup(self, stage: str) -> None:
        """Raise ValueError before training, not after it, where the folder to export to is taken or read-only."""
        export = self.hparams["export"]
        if stage != "fit" or not export:
            return
        check_free("export", export)

    def check_run(self, trainer: Any, data: Any, subcommand: str, checkpoint: str | None) -> None:
        """Raise ValueError for what is wrong with a run of the command line, before any work is done.

        What data decided of the model in the run that a checkpoint is of is taken from there.
        """
        self.setup(subcommand)
        sources = {name: self.hparams.get(name) for name in ("pretrained", "teacher")}
        if isinstance(sources["teacher"], Mapping):
            sources["teacher"] = sources["teacher"].get("pretrained")
        for name, source in sources.items():
            if isinstance(source, str) and (found := layout_of(source)) not in (None, self.reads):
                raise ValueError(f"{name}: expected {LAYOUTS[self.reads]}, and {source} holds {LAYOUTS[found]}")
        if trainer.accumulate_grad_batches < 1:
            raise ValueError(f"accumulate_grad_batches must be at least 1, got {trainer.accumulate_grad_batches}")
        if checkpoint and self._conversions:
            self.decided = conversions.decided_in(checkpoint)
        in_parts = isinstance(trainer.strategy, ModelParallelStrategy)
        if subcommand == "fit" and in_parts:
            for callback in trainer.callbacks:
                if isinstance(callback, WeightAveraging):
                    raise ValueError(
                        f"{type(callback).__name__} averages whole weights, and {type(trainer.strategy).__name__} lays "
                        "them out in parts: leave out the callback, or use trainer.strategy ddp"
                    )
        processes = trainer.num_devices * trainer.num_nodes
        if subcommand == "predict" and self.generates and in_parts and processes > 1:
            raise ValueError(
                f"predict: {processes} processes with a model in parts cannot generate texts of unequal length; use "
                "one, with trainer.devices 1"
            )
        apart = isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)
        if subcommand == "predict" and apart and not self.writes_parts:
            raise ValueError(
                "predict: processes that trainer.strategy forks or spawns keep their predictions to themselves; use ddp"
            )
        data.check(subcommand)
        self.check(data)
        if subcommand == "fit" and trainer.max_steps == -1 and trainer.max_epochs in (None, -1):  # max_time alone
            self.lr_factor(self.hparams["schedule_steps"] or math.inf)

    def check(self, data: Any) -> None:
        """Build the model without memory: raises what is wrong with the arguments before any work is done."""
        if self.model is None and self.checked_on_meta():
            with torch.device("meta"):
                model = self.converted(self.build())
            labels.check(model, data)
            with torch.device("meta"):
                self.check_model(model, data)
        steps = self.hparams["schedule_steps"]
        self.lr_factor(1 if steps is None else steps)

    def checked_on_meta(self) -> bool:
        """Whether `build` needs no memory on the meta device; here, for a pretrained model it may."""
        return not self.hparams["pretrained"]

    def check_model(self, model: Any, data: Any) -> None:
        """Raise ValueError when a model does not fit the data."""

    def waits_for_checkpoint(self) -> bool:
        """Whether a model cannot be built, since only a checkpoint, with `load_from_checkpoint`, tells its shape."""
        alone = self._trainer is None and self.model is None and not self.decided
        return alone and not torch.empty(0).is_meta and conversions.looks_at_data(self._conversions)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the data object first: with other classes or another tokenizer the weights' shapes fail less clearly.

        A model whose shape data decided is made anew as they did in the run that the checkpoint is of.
        """
        trainer: Any = self._trainer
        data = getattr(trainer, "datamodule", None)
        if (name := type(data).__qualname__) in checkpoint and data is not None:
            data.load_state_dict(checkpoint[name])
        if self.model is not None:
            frozen.check(checkpoint, self.model)
        decided = checkpoint.get(conversions.DECIDED, {})
        if decided and decided != self.decided:
            # Other data, or other weights to start from, decided otherwise here; or nothing has yet.
            self.decided, self.model, self._compiled = decided, None, False
            with trainer.init_module() if trainer is not None else nullcontext():
                self.configure_model()
            for callback in trainer.callbacks if trainer is not None and trainer.training else ():
                if isinstance(callback, WeightAveraging):
                    callback.setup(trainer, self, "fit")  # the copy that it has is of the model before
        self._resumed = True
        if trainer is not None and trainer.training and not isinstance(trainer.strategy, ModelParallelStrategy):
            regroup(checkpoint, self.parameter_groups(), self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what data decided of the model's shape; leave out frozen weights that its files have."""
        if self.decided:
            checkpoint[conversions.DECIDED] = self.decided
        if left := self.left_out():
            frozen.leave_out(checkpoint, left, self.model)

    def frozen_in_files(self) -> bool:
        """Whether the arguments say where each weight is read from that stays frozen, so that checkpoints need not."""
        return False

    def left_out(self) -> set[str]:
        """Names in the module's state of what checkpoints leave out."""
        known = (SingleDeviceStrategy, DDPStrategy, ExpertParallelStrategy)
        if self.model is None or not self.frozen_in_files() or not isinstance(self.trainer.strategy, known):
            return set()
        return {f"model.{name}" for name in frozen.names(self.model)}

    def prepare_model(self, recompute: Callable[[], Any]) -> None:
        """Make a built model ready for training: `recompute` turns on activation checkpointing, where asked for."""
        self.model.train()
        if self.hparams["activation_checkpointing"]:
            recompute()
        trainer = self._trainer
        if self.hparams["compile"] and not self._compiled and trainer is not None and not trainer.predicting:
            self.model.compile()
            self._compiled = True

    def recompute_layers(self) -> None:
        """Turn on activation checkpointing in a model of `transformers`."""
        with warnings.catch_warnings():
            # Its successor is younger than the oldest transformers that we run on.
            warnings.simplefilter("ignore", FutureWarning)
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def configure_callbacks(self) -> list[Callback]:
        """Exact resumption and throughput."""
        return [ExactResume(), Throughput()]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What decays, and what does not."""
        h = self.hparams
        groups: Any = parameter_groups(self.model, h["weight_decay"], h["decay_router"], without=self.left_alone)
        return [{**group, "params": part} for group in groups for part in meshes_of(group["params"])]

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """AdamW over groups of parameters."""
        h = self.hparams
        return torch.optim.AdamW(groups, lr=h["lr"], betas=tuple(h["betas"]), fused=True)

    def lr_factor(self, steps: float) -> Callable[[int], float]:
        """The schedule's factor at each step of so many; raises ValueError for settings that make none."""
        h = self.hparams
        return learning_rate(h["schedule"], h["warmup_steps"], steps, h["min_lr_ratio"], h["decay_fraction"])

    def configure_optimizers(self) -> Any:
        """The optimizer, and the schedule a step at a time."""
        steps = self.hparams["schedule_steps"]
        factor = self.lr_factor(max(self.trainer.estimated_stepping_batches, 1) if steps is None else steps)
        if not (groups := self.parameter_groups()):
            last = f" after {self._conversions[-1][0]}" if self._conversions else ""
            raise ValueError(f"fit: every parameter is frozen{last}, so that there is nothing to train")
        optimizer: Any = self.optimizer(groups)
        # A fused one could unscale fp16 gradients itself, but Lightning then refuses to clip them; let it unscale.
        optimizer._step_supports_amp_scaling = False
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        self._said = said_of(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Go by this run's learning rate, weight decay and betas where a checkpoint brought those of its own."""
        if self._resumed and self._said:
            [optimizer], [config] = self.trainer.optimizers, self.trainer.lr_scheduler_configs
            tell(optimizer, config.scheduler, self._said)
        self._resumed = False

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then move what follows steps, not gradients: once a step, however many micro-batches it had."""
        super().optimizer_step(*args, **kwargs)
        zoo.moe.balance.update_biases(self.model)
        zoo.moe.schedule.advance(self.model)
        zoo.moe.routers.remoe.update_l1(self.model)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Stop, or leave the step out, where a gradient is not finite on any process."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # fp16's finds infinities, and skips, itself
        if self.hparams["non_finite"] == "ignore" or scaler is not None:
            return
        if torch.isfinite(total_norm(self.model.parameters())):
            return
        told = f"step {self.global_step + 1}: {not_finite(self.model)}"
        if self.hparams["non_finite"] == "stop":
            raise RuntimeError(f"{told}; model.non_finite=skip leaves such steps out")
        warnings.warn(f"{told}; the step is left out", stacklevel=2)
        optimizer.zero_grad(set_to_none=True)

    def with_auxiliary(self, loss: Tensor, step: Step) -> Tensor:
        """The loss plus every auxiliary loss of the recorded step; logs those, and at intervals how balanced it was."""
        for name, value in step.losses().items():
            loss = loss + value
            self.log(f"train/loss_{name}", value.detach())
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            balance = LayerBalance()
            balance.update(step)
            self._log_balance("train", balance, prog_bar=True)
        return loss

    def log_loss(self, total: Tensor, number: Tensor, batch_idx: int) -> None:
        """Log the mean loss of a step so far: `total` over `number` of its micro-batches; in logs, of all processes."""
        sums = torch.stack([total.detach().float(), number.float()])
        window = self.trainer.accumulate_grad_batches
        self._window = sums if batch_idx % window == 0 or self._window is None else self._window + sums
        told = self._window
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            told = self.trainer.strategy.reduce(told.clone(), reduce_op="sum")  # which is in place
        mean = told[0] / told[1].clamp(min=1)
        self.log("loss", mean, prog_bar=True, logger=False)
        self.log("train/loss", mean)

    def add_to_evaluation(self, step: Step, sums: Tensor, real: Tensor | None = None) -> None:
        """Add a batch's sums [any length], and its balance over the rows that are `real` [B], to the evaluation's."""
        self._balance.update(step, real)
        self._sums = sums if self._sums is None else self._sums + sums

    def evaluated(self, sums: list[float]) -> tuple[dict[str, float], str]:
        """Figures of an evaluation by name from its sums over all batches and processes, and which one to show."""
        raise NotImplementedError

    def on_validation_epoch_start(self) -> None:
        """Start the sums anew."""
        self._sums, self._balance = None, LayerBalance()

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        """Log the figures of the evaluation, and balance."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log the figures of the evaluation, and balance."""
        self._log_evaluation("test")

    def _log_evaluation(self, stage: str) -> None:
        assert self._sums is not None
        sums = self.trainer.strategy.reduce(self._sums, reduce_op="sum")
        figures, shown = self.evaluated(sums.tolist())
        for name, value in figures.items():
            # All processes have the same sums by now; sync_dist keeps Lightning from warning that they might not.
            self.log(f"{stage}/{name}", value, prog_bar=name == shown, sync_dist=True)
        self._log_balance(stage, self._balance)

    def _log_balance(self, stage: str, balance: LayerBalance, prog_bar: bool = False) -> None:
        layers: Mapping[str, Mapping[str, float]] = balance.compute()
        for layer, figures in layers.items():
            named = {f"{stage}/{figure}/{layer}": value for figure, value in figures.items()}
            self.log_dict(named, sync_dist=stage != "train")
        if layers:
            worst = max(figures["load_max"] for figures in layers.values())
            self.log("balance", worst, prog_bar=prog_bar, logger=False, sync_dist=stage != "train")

    def show_predictions(self, predictions: list[Any]) -> None:
        """Print what `predict` gave."""
        for text in predictions:
            print(text)

    def rebuilt(self, state: Mapping[str, Tensor]) -> Any:
        """The model in one process, from what its parts were put together to."""
        model = self.converted(self.build())
        model.load_state_dict(state)
        return model

    def on_fit_start(self) -> None:
        """Raise ArgumentMistake before training, not after it, for a model that export has no layout for."""
        if self.hparams["export"] and not is_spread(self.model):
            try:
                check_savable(self.model)
            except (TypeError, ValueError) as error:
                from tasks.lightning_cli import ArgumentMistake

                raise ArgumentMistake(f"export: {error}") from error

    def on_fit_end(self) -> None:
        """Export, where asked for; a model in parts is put together first."""
        if not self.hparams["export"]:
            return
        model = self.model
        spread = is_spread(model)
        state = whole_state(model) if spread else {}
        if not self.trainer.is_global_zero:
            return
        zoo.save_pretrained(self.rebuilt(state) if spread else model, self.hparams["export"])
