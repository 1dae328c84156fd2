"""Multi-task recommendation: train, evaluate and use models with experts that tasks share.

python -m tasks.recommendation fit --config configs/recommendation/census_income_mmoe.yaml
"""

from __future__ import annotations

if __name__ == "__main__":  # before the heavy imports, so that --help is instant
    from tasks.cli import main

    raise SystemExit(main("recommendation"))

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

import zoo
from tasks import recommendation_tables
from tasks.folders import check_writable
from tasks.optim import Beside
from tasks.recommendation_data import RecommendationData, of_checkpoint
from tasks.recommendation_evaluation import TableMetrics, check_precision, figure_names
from tasks.recommendation_gates import ExpertUse
from tasks.recommendation_parts import Parts, fingerprint, input_files
from tasks.training import Overrides, Task
from zoo.data import Loader
from zoo.data.tables import Preparation
from zoo.data.tables_batch import TableBatch
from zoo.data.tables_schema import Categorical, Schema, Target
from zoo.models.task_weighting import FixedWeighting, task_weighting
from zoo.nearest import unknown

__all__ = ["RecommendationData", "RecommendationTask"]


class RecommendationTask(Task):
    """A recommendation model, the losses of its tasks, and what to log.

    Args:
        network: the name of a model of ours ("recommendation/mmoe", see `zoo models`), or a module.
        pretrained: a folder that `export` or `zoo.save_pretrained` wrote, to start from instead.
        overrides: keywords of the model to change, such as {num_experts: 4, expert_dims: [64]}.
        router: the gates, a name or {"name": ..., arguments}; the model's own by default.
        losses: auxiliary losses of the gates by name with their weights, such as {"importance": 0.01}.
        weighting: how the tasks' losses become one: "fixed", "uncertainty", "gradnorm" or {"name": "gradnorm", "alpha":
            0.5}.
        task_weights: factors on the losses by task, instead of the schema's.
        embedding_optimizer: of the embedding tables, which updates in backward the rows used and no others:
            "rowwise_adagrad", "adagrad" or "sgd"; none leaves them to AdamW, which moves every row in every step.
        embedding_lr: its peak learning rate; the schedule is that of the rest. Gradients of tables are not clipped.
        sharding: how tables with an optimizer of their own are split over several processes: "auto" asks torchrec's
            planner, "table_wise", "row_wise" or "column_wise".
        ndcg_k: how many rows of a group count in NDCG.
        predictions: the folder that `predict` writes: Parquet parts with a row for each row of the input, in order.
        rows_per_part: rows of a part; a run that was cut short goes on after the last whole one.
        weight_decay: of AdamW, on matrices.
        betas: of AdamW.
        training: arguments of `tasks.training.Task`: learning rate, schedule and so on.
    """

    unit = "rows"
    writes_parts = True
    reads = "recommendation"
    weighting: FixedWeighting

    def __init__(
        self,
        network: str | nn.Module = "recommendation/mmoe",
        pretrained: str | None = None,
        overrides: Overrides | None = None,
        router: dict[str, Any] | str | None = None,
        losses: dict[str, Any] | None = None,
        weighting: dict[str, Any] | str = "fixed",
        task_weights: dict[str, float] | None = None,
        embedding_optimizer: Literal["rowwise_adagrad", "adagrad", "sgd"] | None = "rowwise_adagrad",
        embedding_lr: float = 0.01,
        sharding: Literal["auto", "table_wise", "row_wise", "column_wise"] = "auto",
        ndcg_k: int = 10,
        predictions: str = "predictions",
        rows_per_part: int = 100_000,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        **training: Any,
    ) -> None:
        super().__init__(network, weight_decay=weight_decay, betas=betas, **training)
        if self._conversions:
            raise ValueError("convert: a recommendation model is made of experts already; choose network and overrides")
        if pretrained and (overrides or router or losses):
            raise ValueError("pretrained: the model there has its own sizes and gates; leave out overrides and router")
        self.preparation: Preparation | None = None  # how rows are encoded, once the data or a checkpoint says
        self._tables: Any = None  # the optimizer of embedding tables, if it is their own
        self._metrics = TableMetrics((), ndcg_k)
        self._use: ExpertUse | None = None
        self._parts: Parts | None = None

    def build(self) -> nn.Module:
        """The model that the arguments describe, fresh or pretrained."""
        h = self.hparams
        if h["pretrained"]:
            return zoo.from_pretrained(h["pretrained"])
        assert isinstance(self.network, str)
        gate = {name: h[name] for name in ("router", "losses") if h[name] is not None}
        schema = None if self.preparation is None else self.preparation.schema
        return zoo.create_model(self.network, schema=schema, **(h["overrides"] or {}), **gate)

    def tasks(self, schema: Schema) -> list[Target]:
        """The schema's tasks with the weights asked for; raises ValueError naming the nearest for an unknown task."""
        weights = dict(self.hparams["task_weights"] or {})
        tasks = [replace(task, weight=weights.pop(task.name, task.weight)) for task in schema.tasks]
        for name in weights:
            raise unknown("task of task_weights", name, [task.name for task in tasks])
        return list(replace(schema, tasks=tuple(tasks)).tasks)  # which checks the weights

    def check_run(self, trainer: Any, data: Any, subcommand: str, checkpoint: str | None) -> None:
        """Take how rows are encoded from the model that is to be used, then check everything that can be."""
        if checkpoint:
            data.adopt(of_checkpoint(checkpoint), checkpoint)
        elif self.hparams["pretrained"]:
            data.adopt(Preparation.load(self.hparams["pretrained"]), self.hparams["pretrained"])
        elif subcommand == "predict" and isinstance(self.network, str):
            raise ValueError("nothing to predict with: give --ckpt_path or model.pretrained")
        if subcommand == "predict":
            check_writable("predictions", self.hparams["predictions"])
        super().check_run(trainer, data, subcommand, checkpoint)
        if subcommand == "fit":
            self._check_monitors(trainer, data.schema)
            looks = task_weighting(self.hparams["weighting"], []).needs_shared_parameters
            if looks and isinstance(trainer.strategy, ModelParallelStrategy):
                raise ValueError(
                    "weighting: gradnorm compares gradients at whole shared parameters, which "
                    f"{type(trainer.strategy).__name__} lays out in parts; take another, or trainer.strategy ddp"
                )
            recommendation_tables.check(self.hparams, data.schema, trainer)
        if subcommand != "predict":
            check_precision(data.schema, trainer)
        if subcommand != "predict" and not data.download:
            data.encode_rows(subcommand, validate=trainer.limit_val_batches != 0)
            if subcommand == "fit":  # raises ValueError where the rows do not fill a batch of one process
                Loader(data.rows("train"), data.batch_size, shuffle=True)

    def check(self, data: Any) -> None:
        """Build the model without memory: raises what is wrong with the arguments before any work is done."""
        if self.hparams["activation_checkpointing"]:
            raise ValueError("activation_checkpointing: a recommendation model keeps too little to gain from it")
        self.preparation = data.preparation
        super().check(data)
        if self.model is not None:
            self.check_model(self.model, data)

    def check_model(self, model: Any, data: Any) -> None:
        """Raise ValueError when a model does not fit the data, or the weighting does not fit either."""
        if data is not None and (differ := model.schema.difference(data.schema)):
            raise ValueError(f"the model was made for another schema than that of {data.source}: {differ} differs")
        weighting = task_weighting(self.hparams["weighting"], self.tasks(model.schema))
        if weighting.needs_shared_parameters and not model.shared_parameters():
            raise ValueError("weighting: gradnorm compares gradients at shared parameters, and this model shares none")

    def _check_monitors(self, trainer: Any, schema: Schema) -> None:
        """Raise ValueError when a callback waits for a figure of a task that there is not."""
        names = figure_names(schema.tasks, schema.group is not None, self.hparams["ndcg_k"])
        known = [f"val/{name}" for name in names]
        figures = {name.split("/")[0] for name in names} | {"auc", "rmse"}
        for callback in trainer.callbacks:
            monitor = getattr(callback, "monitor", None)
            if monitor and monitor.count("/") == 2 and monitor not in known and monitor.split("/")[1] in figures:
                raise unknown("figure to monitor", monitor, known)

    def configure_model(self) -> None:
        """Build the model once the schema is known; Lightning calls this."""
        data = getattr(self._trainer, "datamodule", None)
        if data is not None:
            self.preparation = data.preparation
        if self._trainer is None and self.preparation is None:
            return  # a checkpoint is being loaded, and will say
        if self.model is None:
            self.model = self.build()
        self.check_model(self.model, data)
        if self.preparation is not None:
            self.model.preparation = self.preparation
        if not hasattr(self, "weighting"):
            self.weighting = task_weighting(self.hparams["weighting"], self.tasks(self.model.schema))
        self.prepare_model(lambda: None)
        self._fuse_tables()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the data object first; without one build the model as the checkpoint's data says.

        Raises ArgumentMistake for a checkpoint with another weighting, or to train on with other optimizers of tables.
        """
        super().on_load_checkpoint(checkpoint)
        self._check_alike(checkpoint.get("hyper_parameters", {}))
        if self.model is None:
            self.preparation = Preparation.read(checkpoint[RecommendationData.__qualname__]["preparation"])
            self.configure_model()

    def _check_alike(self, theirs: dict[str, Any]) -> None:
        from tasks.lightning_cli import ArgumentMistake

        def said(name: str, settings: Any) -> Any:
            value = settings.get(name, self.hparams[name])
            return value.get("name") if isinstance(value, dict) else value

        names = ["weighting", *(["embedding_optimizer"] if self._fits_tables() else [])]
        for name in names:
            if (there := said(name, theirs)) != (here := said(name, self.hparams)):
                raise ArgumentMistake(
                    f"{name}: the checkpoint was trained with {there}, not with {here}; go on with that, or start from "
                    "its export with model.pretrained"
                )

    def _fits_tables(self) -> bool:
        """Whether a run trains a model with embedding tables."""
        fitting = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        return (
            fitting and self.model is not None and any(isinstance(f, Categorical) for f in self.model.schema.features)
        )

    def _fuse_tables(self) -> None:
        """For training let embedding tables be updated in backward, by an optimizer of their own."""
        trainer = self._trainer
        fitting = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        if fitting and self._tables is None and recommendation_tables.wanted(self.hparams, self.model.schema):
            self._tables, self.left_alone = recommendation_tables.fuse(self.model, self.hparams, trainer)

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """AdamW, and where tables have an optimizer of their own that beside it."""
        main = super().optimizer(groups)
        return main if self._tables is None else Beside(main, self._tables)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What decays and what does not, and what the weighting learns."""
        own = list(self.weighting.parameters())
        return super().parameter_groups() + ([{"params": own, "weight_decay": 0.0}] if own else [])

    def count(self, batch: TableBatch) -> int:
        """Rows in a batch."""
        return len(batch)

    def training_step(self, batch: TableBatch, batch_idx: int) -> Tensor:
        """The weighted loss of all tasks plus auxiliary losses."""
        with zoo.moe.record(self.model) as step:
            outputs = self.model(batch)
        losses = self._over_processes(self.model.task_losses(outputs, batch), batch)
        loss = self.weighting(losses, self.model)
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            # The mean over processes of losses that are scaled as above is that over all rows.
            values = torch.stack([loss, *losses.values()]).detach()
            shown: Any = self.trainer.strategy.reduce(values, reduce_op="mean")
            self.log("loss", shown[0], prog_bar=True, logger=False)
            self.log("train/loss", shown[0])
            # A loss of exactly 0 is that of a task without a label in the batch.
            self.log_dict({f"train/loss/{name}": value for name, value in zip(losses, shown[1:]) if value != 0})
            if type(self.weighting) is not FixedWeighting:
                self.log_dict({f"train/weight/{name}": value for name, value in self.weighting.factors().items()})
        return self.with_auxiliary(loss, step)

    def _over_processes(self, losses: dict[str, Tensor], batch: TableBatch) -> dict[str, Tensor]:
        """Scaled so that the mean over processes, which the gradients become, is the mean over the rows of all."""
        world = self.trainer.world_size
        if world == 1:
            return losses
        own = self.model.task_counts(batch)
        total = self.trainer.strategy.reduce(own.clone(), reduce_op="sum")
        share = own * world / total.clamp(min=torch.finfo(own.dtype).tiny)
        return {name: loss * share[i] for i, (name, loss) in enumerate(losses.items())}

    def on_validation_epoch_start(self) -> None:
        """Start anew."""
        super().on_validation_epoch_start()
        self._metrics = TableMetrics(self.model.schema.tasks, self.hparams["ndcg_k"])
        self._use = ExpertUse(self.model)

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: TableBatch, batch_idx: int) -> None:
        """Keep what is predicted, and what the gates decide."""
        assert self._use is not None
        real = batch.row >= 0
        with self._use.watch(real, self.model.inputs.domain(batch)) as step:
            outputs = self.model(batch)
        # In float32 probabilities above 1 - 2^-24 are 1: such rows would tie, and lose twice what they do.
        wide = {name: out.double() for name, out in outputs.items()}
        self._metrics.add(self.model.predictions(wide), batch.labels, batch.group, batch.weight, real)
        self._balance.update(step, real)

    test_step = validation_step

    def _log_evaluation(self, stage: str) -> None:
        """Log every figure of every task that is defined, and say which are not."""
        assert self._use is not None
        figures = self._metrics.compute()
        for name, value in {**figures, **self._use.compute()}.items():
            if not math.isnan(value):
                # All processes have the same by now; sync_dist keeps Lightning from warning that they might not.
                self.log(f"{stage}/{name}", value, prog_bar=name.startswith(("auc/", "rmse/")), sync_dist=True)
        if not self.trainer.sanity_checking:
            for task, why in self._metrics.undefined.items():
                names = [n.split("/")[0] for n, v in figures.items() if n.split("/", 1)[1] == task and math.isnan(v)]
                self.print(f"{stage}: {', '.join(names)} of task {task} undefined: {why}")
                self._check_awaited([f"{stage}/{name}/{task}" for name in names], why)
        self._log_balance(stage, self._balance)

    def _check_awaited(self, undefined: list[str], why: str) -> None:
        """Raise ArgumentMistake when training waits for a figure that is not defined."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if (monitor := getattr(callback, "monitor", None)) in undefined:
                from tasks.lightning_cli import ArgumentMistake

                raise ArgumentMistake(f"{type(callback).__name__} waits for {monitor}, which is undefined: {why}")

    def first_row(self, paths: Sequence[Path]) -> int:
        """Make or take up the folder of predictions for these files; the number of the first row that is left.

        The data calls it once the weights are there. Raises ArgumentMistake for a folder of other predictions.
        """
        from tasks.lightning_cli import ArgumentMistake

        found: int | str = 0
        if self.trainer.is_global_zero:
            try:
                found = self._open_predictions(paths)
            except ValueError as error:
                found = str(error)
        found = self.trainer.strategy.broadcast(found)
        if isinstance(found, str):
            raise ArgumentMistake(found)
        return found

    def _open_predictions(self, paths: Sequence[Path]) -> int:
        h = self.hparams
        about = {"model": fingerprint(self.model, self.model.preparation), "input": input_files(paths)}
        names = [n for t in self.model.schema.tasks for n in (t.name, *([f"{t.name}_joint"] if t.given else []))]
        self._parts = Parts(h["predictions"], names, about, h["rows_per_part"])
        self._parts.start()
        return self._parts.take_up()

    def predict_step(self, batch: TableBatch, batch_idx: int) -> int:
        """Write what is predicted for the batches of all processes; the number of rows written here."""
        predictions = self.model.predictions(self.model(batch))
        rows, values = batch.row, torch.stack([value.float() for value in predictions.values()], dim=1)
        if self.trainer.world_size > 1:  # process by process the rows are in order
            rows, values = (self.all_gather(part).flatten(0, 1) for part in (rows, values))  # type: ignore[union-attr]
        if self._parts is None:
            return 0
        numbers, columns = rows.cpu().numpy(), values.cpu().numpy().T
        wanted = (numbers >= 0) & self._parts.wanted(numbers)
        self._parts.add(numbers[wanted], dict(zip(predictions, columns[:, wanted])))
        return int(wanted.sum())

    def on_predict_end(self) -> None:
        """Write the last part, unless the run was to leave out some of the rows."""
        if self._parts is not None and self._predicts_all():
            self._parts.finish()
            self._parts.close()

    def _predicts_all(self) -> bool:
        return math.isinf(self.trainer.predict_loop.max_batches[0])  # a stream does not know how many it has

    def on_fit_end(self) -> None:
        """Make tables plain and whole again, on every process, and export, where asked for."""
        if self._tables is not None:
            from zoo.parallel.embeddings import unfuse_embeddings

            unfuse_embeddings(self.model, self._tables)
            self._tables, self.left_alone = None, ()
        super().on_fit_end()

    def show_predictions(self, predictions: list[Any]) -> None:
        """Say where they are."""
        if self._parts is not None:
            left = "" if self._predicts_all() else "; run again without limit for the rest"
            print(f"{sum(predictions)} rows scored in {self._parts.folder}{left}")
