"""The vision-language part of the demo: a tiny LIMoE and its dense twin on drawn digits with captions.

As in the other parts both train side by side for the same time, at a constant learning rate and with a running average
of the weights. What they are judged by, single digits told by their names, they were not trained on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .machine import cores_each, in_words
from .output import write_json
from .side_by_side import side_by_side

MODELS = {"moe": "LIMoE", "dense": "dense twin"}
CONFIG = Path(__file__).parents[2] / "configs" / "vision_language" / "demo.yaml"
SHARE = 0.25  # of the language part's seconds


def run(folder: Path, config: Path = CONFIG, seconds: float = 30.0) -> bool:
    """Train both models for `seconds` and leave data; False when Ctrl-C cut it short."""
    return side_by_side(list(MODELS), _prepare, _train, folder, config, seconds)


def _prepare(folder: Path, config: Path, seconds: float) -> None:
    data = _build("moe", config).datamodule
    print(f"\npictures with captions: {data.pairs.description}", flush=True)
    each = in_words(cores_each(len(MODELS)))
    print(f"training a LIMoE and its dense twin side by side for {seconds:.0f} s, {each}")


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
    from .watch import PairsWatch

    own = folder / name
    task, data, trainer = train(_build(name, config), PairsWatch(name, own, start, stopping, seconds))
    total, active = count_parameters(task.model)
    about = {"label": MODELS[name], "total": total, "active": active, "pictures": data.pairs.description}
    write_json(own / "about.json", {**about, "batch_size": data.batch_size, "steps": trainer.global_step})


def _build(name: str, config: Path) -> Any:
    """What `zoo vision_language fit` makes of the configuration: its model, datamodule and trainer, not yet run."""
    import yaml

    from tasks.vision_language import ContrastiveTask, VisionLanguageData

    from .entrants import entrant

    overrides = {**(yaml.safe_load(config.read_text())["model"].get("overrides") or {}), "dense": name == "dense"}
    options = {"trainer.logger": "false", "model.overrides": json.dumps(overrides)}
    return entrant("vision_language", ContrastiveTask, VisionLanguageData, config, options)
