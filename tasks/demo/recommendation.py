"""The recommendation part of the demo: MMoE and a shared bottom of its size on two tasks that are half related.

The tasks are the synthetic ones of the MMoE paper. As in the other parts both train side by side for the same time, at
a constant learning rate and with a running average of the weights, so that they can be compared at any moment.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.cli import CONFIGS

from .machine import cores_each, in_words
from .output import write_json
from .side_by_side import side_by_side

MODELS = {"moe": "MMoE", "dense": "shared bottom"}
NETWORKS = {"moe": "recommendation/mmoe", "dense": "recommendation/shared_bottom"}
CONFIG = CONFIGS / "recommendation" / "demo.yaml"
SHARE = 0.08  # of the language part's seconds


def run(folder: Path, config: Path = CONFIG, seconds: float = 12.0) -> bool:
    """Train both models for `seconds` and leave their figures and gates; False when Ctrl-C cut it short."""
    return side_by_side(list(MODELS), _prepare, _train, folder, config, seconds)


def _prepare(folder: Path, config: Path, seconds: float) -> None:
    data = _build("moe", config).datamodule
    print(f"\ntable: {data.table.description}", flush=True)
    each = in_words(cores_each(len(MODELS)))
    print(f"training MMoE and a shared bottom side by side for {seconds:.0f} s, {each}")


def _train(
    name: str,
    prepared: None,
    start: Callable[[], None],
    stopping: Callable[[], bool],
    folder: Path,
    config: Path,
    seconds: float,
) -> None:
    """Train one of the models, and leave what the report says about it."""
    from .entrants import train
    from .watch import TableWatch

    own = folder / name
    task, data, trainer = train(_build(name, config), TableWatch(name, own, start, stopping, seconds))
    total = sum(p.numel() for p in task.model.parameters())
    tasks = [t.name for t in data.schema.tasks]
    about = {"label": MODELS[name], "total": total, "table": data.table.description, "tasks": tasks}
    write_json(own / "about.json", {**about, "batch_size": data.batch_size, "steps": trainer.global_step})


def _build(name: str, config: Path) -> Any:
    """What `zoo recommendation fit` makes of the configuration: its model, datamodule and trainer, not yet run."""
    from tasks.recommendation import RecommendationData, RecommendationTask

    from .entrants import entrant

    options = {"trainer.logger": "false", "model.network": NETWORKS[name]}
    return entrant("recommendation", RecommendationTask, RecommendationData, config, options)
