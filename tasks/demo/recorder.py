"""A Lightning callback that writes down what a report needs while a model trains."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from zoo.analysis import decisions, overlap
from zoo.moe import Decision, MoE, Routing, telemetry

from .entrants import Clocked
from .output import write_json


class Recorder(Clocked):
    """Keeps train.csv, val.csv and experts.csv in `folder`, and ends training when it is time to.

    Put it before other callbacks: its checkpoint at the end must see weights as they were in training.
    """

    EVERY = 10  # steps between rows of experts.csv
    unit = "tokens"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the gates first."""
        self._layers: dict[int, _Layer] = {
            layer_number(name): _Layer(module) for name, module in pl_module.named_modules() if isinstance(module, MoE)
        }
        self._sample: Any = None  # of unseen text, to watch where its tokens go
        self._went: list[tuple[int, dict[str, Decision]]] = []
        super().on_train_start(trainer, pl_module)

    def after_step(self, trainer: Trainer, batch: Any) -> None:
        """Write a row, at intervals one an expert layer too."""
        self.seen += batch["input_ids"].numel()
        nats = float(trainer.callback_metrics["train/loss"]) * int((batch["labels"] >= 0).sum())
        size = max(int(batch["target_bytes"].clamp(min=0).sum()), 1)
        self.write("train.csv", self.when(trainer), bits_per_byte=nats / math.log(2) / size)
        if trainer.global_step % self.EVERY == 0:
            self._write_experts(trainer)

    def after_evaluation(self, trainer: Trainer) -> str:
        """Write a row."""
        self._look(trainer)
        figures = trainer.callback_metrics
        bits = float(figures["val/bits_per_byte"])
        self.write("val.csv", self.when(trainer), bits_per_byte=bits, perplexity=float(figures["val/perplexity"]))
        return f"{bits:.3f} bits per byte"

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave a checkpoint from which training can go on."""
        self.watch.halt()
        if trainer.global_step % self.EVERY:
            self._write_experts(trainer)
        for layer in self._layers.values():
            layer.handle.remove()
        self._compare()
        trainer.save_checkpoint(self.folder / "last.ckpt")

    def _look(self, trainer: Any) -> None:
        """Note where the gates send the tokens of the first unseen batch by now."""
        task = trainer.lightning_module
        if self._sample is None:
            self._sample = next(iter(trainer.datamodule.val_dataloader()))
        [(_, layers)] = decisions(task.model, [self._sample], task.nats)
        chosen: dict[str, Decision] = {
            name: calls[0] for name, calls in layers.items() if isinstance(calls[0], Routing)
        }
        self._went.append((trainer.global_step, chosen))

    def _compare(self) -> None:
        """Write how many choices were already the last ones at each evaluation."""
        if len(self._went) < 2 or not self._went[-1][1]:
            return
        last = self._went[-1][1]
        agreement = {
            f"layer {layer_number(name)}": [(step, round(overlap(went[name], final), 5)) for step, went in self._went]
            for name, final in last.items()
        }
        write_json(self.folder / "agreement.json", agreement)

    def _write_experts(self, trainer: Trainer) -> None:
        for number, layer in self._layers.items():
            load, entropy = layer.take()
            figures = {"entropy": round(entropy, 4), "max_violation": round(float(load.max() * len(load) - 1), 4)}
            loads = {f"load_{e}": round(share, 5) for e, share in enumerate(load.tolist())}
            self.write("experts.csv", {"step": trainer.global_step, "layer": number}, **figures, **loads)


class _Layer:
    """Sums of what one gate decided in training since they were last taken."""

    def __init__(self, moe: MoE) -> None:
        self.counts, self.entropy, self.steps = torch.zeros(moe.experts.num_experts), 0.0, 0
        self.handle = moe.router.register_forward_hook(self._add)

    @torch.no_grad()
    def _add(self, router: nn.Module, args: Any, routing: Any) -> None:
        if router.training and isinstance(routing, Routing):
            self.counts += routing.counts
            self.entropy += float(telemetry.entropy(routing)) if routing.probs is not None else 0.0
            self.steps += 1

    def take(self) -> tuple[torch.Tensor, float]:
        """Load of every expert, [E], and mean entropy in nats."""
        load = self.counts / self.counts.sum().clamp(min=1)
        entropy = self.entropy / max(self.steps, 1)
        self.counts, self.entropy, self.steps = torch.zeros_like(self.counts), 0.0, 0
        return load, entropy


def layer_number(name: str) -> int:
    """The number in a layer's name, such as 3 in model.layers.3.mlp; 0 without one."""
    found = re.search(r"\d+", name)
    return int(found[0]) if found else 0
