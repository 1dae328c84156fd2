"""Lightning callbacks that keep the clock of a model's training in the demo, and what it reached when."""

from __future__ import annotations

import re
from typing import Any

from lightning.pytorch import Trainer

from .entrants import Clocked
from .output import write_json


class Watch(Clocked):
    """Keeps a vision model's val.csv, and ends training when it is time to."""

    unit = "images"

    def after_step(self, trainer: Trainer, batch: Any) -> None:
        """Count the images."""
        self.seen += len(batch["label"])

    def after_evaluation(self, trainer: Trainer) -> str:
        """Write a row."""
        figures = trainer.callback_metrics
        right = float(figures["val/top1"])
        self.write("val.csv", self.when(trainer), loss=float(figures["val/loss"]), error=1 - right)
        return f"{right:.1%} of unseen digits"


class PairsWatch(Clocked):
    """Keeps a vision-language model's val.csv, its experts by modality, and ends training when it is time to."""

    unit = "pairs"

    def after_step(self, trainer: Trainer, batch: Any) -> None:
        """Count the pairs."""
        self.seen += len(batch["image"])

    def after_evaluation(self, trainer: Trainer) -> str:
        """Write a row, and where the latest images and texts went."""
        figures = trainer.callback_metrics
        right, found = float(figures["val/zero_shot_top1"]), float(figures["val/text_recall_1"])
        self.write("val.csv", self.when(trainer), error=1 - right, missed=1 - found)
        _keep_modalities(self, trainer.lightning_module, trainer.global_step)
        return f"{right:.1%} of unseen digits by name"


class AnswersWatch(Clocked):
    """Keeps the val.csv of a model that answers, its experts by modality, and ends training when it is time to."""

    unit = "questions"

    def after_step(self, trainer: Trainer, batch: Any) -> None:
        """Count the answers."""
        self.seen += int(batch["answers"].amax(1).sum())

    def after_evaluation(self, trainer: Trainer) -> str:
        """Write a row, and where the latest images and texts went."""
        figures, module = trainer.callback_metrics, trainer.lightning_module
        right = float(figures["val/answers_right"])
        self.write("val.csv", self.when(trainer), error=1 - right, loss=float(figures["val/loss"]))
        _keep_modalities(self, module, trainer.global_step)
        return f"{right:.1%} of unseen pictures counted right"


def _keep_modalities(watch: Clocked, module: Any, step: int) -> None:
    if layers := module.modality_shares():
        write_json(watch.folder / "modalities.json", {"step": step, "layers": layers})


class TableWatch(Clocked):
    """Keeps a recommendation model's val.csv, its gates in gates.json, and ends training when it is time to."""

    unit = "rows"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._steps: list[int] = []
        self._gates: dict[str, list[list[float]]] = {}

    def after_step(self, trainer: Trainer, batch: Any) -> None:
        """Count the rows."""
        self.seen += len(batch)

    def after_evaluation(self, trainer: Trainer) -> str:
        """Write the squared error of every task, and the mean weight that its gate gives to every expert."""
        found: dict[str, Any] = dict(trainer.callback_metrics)
        errors = {
            f"mse_{name.removeprefix('val/rmse/')}": float(value) ** 2
            for name, value in found.items()
            if name.startswith("val/rmse/")
        }
        mean = sum(errors.values()) / len(errors)
        self.write("val.csv", self.when(trainer), mse=mean, **errors)
        gates = [(m[1], int(m[2]), float(value)) for name, value in found.items() if (m := _GATE.fullmatch(name))]
        if gates:
            self._steps.append(trainer.global_step)
            for task in dict.fromkeys(task for task, _, _ in gates):
                weights = sorted((expert, weight) for t, expert, weight in gates if t == task)
                self._gates.setdefault(task, []).append([round(weight, 5) for _, weight in weights])
            write_json(self.folder / "gates.json", {"steps": self._steps, "tasks": self._gates})
        return f"squared error {mean:.4f}"


_GATE = re.compile(r"val/gate/(.+)/(\d+)")
