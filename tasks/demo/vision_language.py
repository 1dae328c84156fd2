"""The vision-language parts of the demo: a tiny LIMoE, a tiny MoE-LLaVA, and their dense twins, on drawn digits.

As in the other parts both models of a pair train side by side for the same time, at a constant learning rate and with a
running average of the weights. LIMoE is judged by single digits told by their names, which it was not trained on,
MoE-LLaVA by its answers to questions that count.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.cli import CONFIGS

from .machine import cores_each, in_words
from .output import write_json
from .side_by_side import side_by_side

FOLDER = CONFIGS / "vision_language"


@dataclass(frozen=True)
class Pair:
    """A mixture of experts and its dense twin, which differs by `twin` in the model's overrides."""

    label: str
    config: Path
    share: float  # of the language part's seconds
    task: str
    data: str
    watch: str
    twin: dict[str, Any]


PAIRS = {
    "vision_language": Pair(
        "LIMoE", FOLDER / "demo.yaml", 0.25, "ContrastiveTask", "VisionLanguageData", "PairsWatch", {"dense": True}
    ),
    "instruction": Pair(
        "MoE-LLaVA",
        FOLDER / "demo_instruction.yaml",
        0.35,
        "InstructionTask",
        "InstructionData",
        "AnswersWatch",
        {"moe": False, "text_config": {"intermediate_size": 144}},
    ),
}
ENTRANTS = ("moe", "dense")


def run(name: str, folder: Path, seconds: float = 30.0, config: Path | None = None) -> bool:
    """Train both models of a pair for `seconds` and leave data; False when Ctrl-C cut it short."""
    return side_by_side(ENTRANTS, _prepare, _train, name, folder, config or PAIRS[name].config, seconds)


def _prepare(name: str, folder: Path, config: Path, seconds: float) -> None:
    pair = PAIRS[name]
    print(f"\n{_description(_build('moe', name, config).datamodule)}", flush=True)
    each = in_words(cores_each(len(ENTRANTS)))
    print(f"training a {pair.label} and its dense twin side by side for {seconds:.0f} s, {each}")


def _description(data: Any) -> str:
    """What is trained on."""
    return data.pairs.description if hasattr(data, "pairs") else data.conversations[0].description


def _train(
    entrant: str,
    prepared: None,
    start: Callable[[], None],
    stopping: Callable[[], bool],
    name: str,
    folder: Path,
    config: Path,
    seconds: float,
) -> None:
    """Train one of the models, and leave what the report says about it."""
    from zoo.models import count_parameters

    from . import watch
    from .entrants import train

    own = folder / entrant
    clock = getattr(watch, PAIRS[name].watch)(entrant, own, start, stopping, seconds)
    task, data, trainer = train(_build(entrant, name, config), clock)
    total, active = count_parameters(task.model)
    label = PAIRS[name].label if entrant == "moe" else "dense twin"
    about = {"label": label, "total": total, "active": active, "pictures": _description(data)}
    write_json(own / "about.json", {**about, "batch_size": data.batch_size, "steps": trainer.global_step})


def _build(entrant: str, name: str, config: Path) -> Any:
    """What `zoo vision_language fit` makes of the configuration: its model, datamodule and trainer, not yet run."""
    import yaml

    import tasks.vision_language as classes

    from . import entrants

    pair = PAIRS[name]
    overrides = yaml.safe_load(config.read_text())["model"].get("overrides") or {}
    if entrant == "dense":
        for key, value in pair.twin.items():
            overrides[key] = {**overrides.get(key, {}), **value} if isinstance(value, dict) else value
    options = {"trainer.logger": "false", "model.overrides": json.dumps(overrides)}
    task, data = getattr(classes, pair.task), getattr(classes, pair.data)
    return entrants.entrant("vision_language", task, data, config, options)
