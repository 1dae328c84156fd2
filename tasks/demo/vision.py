"""The vision part of the demo: a small V-MoE and its dense twin on handwritten digits, and which patch goes where.

As in the language part both train side by side for the same time, at a constant learning rate and with a running
average of the weights, so that they can be compared both at equal steps and at equal time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.cli import CONFIGS

from .machine import cores_each, in_words
from .output import write_json
from .side_by_side import side_by_side

MODELS = {"moe": "V-MoE", "dense": "dense twin"}
CONFIG = CONFIGS / "vision" / "demo.yaml"
SHARE = 0.125  # of the language part's seconds


def run(folder: Path, config: Path = CONFIG, seconds: float = 20.0) -> bool:
    """Train both models for `seconds` and leave data and pictures; False when Ctrl-C cut it short."""
    return side_by_side(list(MODELS), _prepare, _train, folder, config, seconds)


def _prepare(folder: Path, config: Path, seconds: float) -> None:
    data = _build("moe", config).datamodule
    print(f"\nimages: {data.images.description}", flush=True)
    each = in_words(cores_each(len(MODELS)))
    print(f"training a V-MoE and its dense twin side by side for {seconds:.0f} s, {each}")


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
    from zoo.models import count_parameters

    from .entrants import train
    from .patches import routes
    from .watch import Watch

    own = folder / name
    task, data, trainer = train(_build(name, config), Watch(name, own, start, stopping, seconds))
    total, active = count_parameters(task.model)
    about = {"label": MODELS[name], "total": total, "active": active, "images": data.images.description}
    write_json(own / "about.json", {**about, "batch_size": data.batch_size, "steps": trainer.global_step})
    if name == "moe":
        write_json(own / "routes.json", routes(task.model.eval(), data))


def _build(name: str, config: Path) -> Any:
    """What `zoo vision fit` makes of the configuration: its model, datamodule and trainer, not yet run."""
    import yaml

    from tasks.vision import VisionData, VisionTask

    from .entrants import entrant

    overrides = {**yaml.safe_load(config.read_text())["model"].get("overrides", {}), "dense": name == "dense"}
    options = {"trainer.logger": "false", "model.overrides": json.dumps(overrides)}
    return entrant("vision", VisionTask, VisionData, config, options)
