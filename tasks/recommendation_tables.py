"""When embedding tables of a recommendation model have an optimizer of their own, and what stands in the way of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy

from zoo.data.tables_schema import Categorical, Schema

WIDTH = 4  # of which tables are a multiple, as `zoo.parallel.fuse_embeddings` says; importing that takes seconds


def wanted(settings: Mapping[str, Any], schema: Schema) -> bool:
    """Whether there are tables and an optimizer is named for them."""
    return bool(settings["embedding_optimizer"]) and any(isinstance(f, Categorical) for f in schema.features)


def check(settings: Mapping[str, Any], schema: Schema, trainer: Any) -> None:
    """Raise ValueError where tables that want an optimizer of their own cannot have it."""
    if not wanted(settings, schema):
        return
    if settings["embedding_optimizer"] == "rowwise_adagrad" and settings["sharding"] == "column_wise":
        raise ValueError("sharding: column_wise splits rows, for which rowwise_adagrad has one step size")
    without = "or set model.embedding_optimizer to null"
    for f in schema.features:
        if isinstance(f, Categorical) and (width := f.dim or schema.dim) % WIDTH:
            raise ValueError(
                f"dim {width} of feature {f.name!r}: tables that learn in backward are a multiple of {WIDTH} wide; use "
                f"one, {without}"
            )
    if trainer.precision in ("16-mixed", "16-true", "bf16-true", "64-true"):
        other = "32-true" if trainer.precision == "64-true" else "bf16-mixed"
        raise ValueError(f"precision {trainer.precision}: tables learn in float32; use {other}, {without}")
    if (batches := trainer.accumulate_grad_batches) > 1:
        raise ValueError(
            f"accumulate_grad_batches {batches}: tables learn in every backward, from each batch apart; use a larger "
            f"data.batch_size, {without}"
        )
    if settings["non_finite"] == "skip":
        raise ValueError(f"non_finite skip: tables have moved by the time a gradient is seen; use stop, {without}")
    for callback in trainer.callbacks if trainer.world_size > 1 else ():
        if isinstance(callback, WeightAveraging):
            raise ValueError(
                f"{type(callback).__name__} averages whole weights, and tables are split over processes: use one "
                f"process, {without}"
            )
    if trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy):
        name = type(trainer.strategy).__name__
        raise ValueError(f"strategy {name} does not know sharded tables: use trainer.strategy ddp, {without}")


def fuse(model: Any, settings: Mapping[str, Any], trainer: Any) -> tuple[Any, set[str]]:
    """Let a model's tables learn in backward: their optimizer, and their names."""
    from zoo.parallel.embeddings import fuse_embeddings, fused_names

    tables = fuse_embeddings(
        model,
        settings["embedding_optimizer"],
        lr=settings["embedding_lr"],
        sharding=settings["sharding"],
        device=trainer.strategy.root_device,
    )
    return tables, set(fused_names(model))
