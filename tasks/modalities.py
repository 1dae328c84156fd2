"""Which experts images and texts go to, over a step or a whole evaluation (LIMoE 2206.02770, section 4)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from zoo.moe import Routing, Step, telemetry

MODALITIES = ("image", "text")  # by their numbers
SHARES = "modalities.json"  # beside a run's logs, for `zoo report`


class ModalityShares:
    """Sums over steps and processes, a layer and a modality apart.

    For every layer and modality `compute` gives share, what part of the modality's assignments each expert has, [E];
    used, how many experts that is, exp of its entropy (1 to E); and drop_rate.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, step: Step, labels: Sequence[Tensor], within: str = "") -> None:
        """Add what the layers decided in `step`; labels are those of each call's tokens, `LIMoE.call_labels`.

        Only layers whose names begin with `within` count: those that see such tokens.
        """
        for name, calls in step.routings.items():
            if not name.startswith(within):
                continue
            for routing, label in zip(calls, labels):
                if isinstance(routing, Routing):
                    sums = _sums(routing, label.to(routing.token_index.device))
                    self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def compute(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Figures by layer and modality so far, over all processes. All processes must call it together."""
        if not self._sums:
            return {}
        flat = torch.cat([sums.flatten() for sums in self._sums.values()])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(flat)
        parts = flat.cpu().split([sums.numel() for sums in self._sums.values()])
        return {
            name.removeprefix("model."): {
                kind: _figures(row) for kind, row in zip(MODALITIES, part.view(len(MODALITIES), -1)) if row[-1]
            }
            for name, part in zip(self._sums, parts)
        }


def log_shares(task: Any, stage: str, shares: dict[str, Any]) -> None:
    """Log what `ModalityShares` found: experts in use and tokens without any, by layer and modality."""
    for layer, kinds in shares.items():
        for kind, figures in kinds.items():
            named = {f"{stage}/{what}_{kind}/{layer}": figures[what] for what in ("used", "drop_rate")}
            task.log_dict(named, sync_dist=stage != "train")


def keep_shares(task: Any, shares: dict[str, Any]) -> None:
    """Leave what `zoo report` draws beside the logs of a training run."""
    trainer = task.trainer
    folder = next((logger.log_dir for logger in task.loggers if getattr(logger, "log_dir", None)), None)
    if not shares or folder is None or trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
        return
    if trainer.is_global_zero:
        Path(folder).mkdir(parents=True, exist_ok=True)
        kept = {"network": str(task.hparams.get("network", "")), "step": task.global_step, "layers": shares}
        (Path(folder) / SHARES).write_text(json.dumps(kept) + "\n", encoding="utf-8")


def _sums(routing: Routing, label: Tensor) -> Tensor:
    """Kept assignments by modality and expert, and how many were asked for, [2, E + 1] float64."""
    kinds, experts = len(MODALITIES), routing.num_experts
    flat = label[routing.token_index] * experts + routing.expert_index
    kept = torch.bincount(flat, minlength=kinds * experts).view(kinds, experts).double()
    asked = torch.zeros(kinds, dtype=torch.float64, device=kept.device)
    asked.index_add_(0, label, telemetry.asked_per_token(routing).double())
    return torch.cat([kept, asked[:, None]], dim=1)


def _figures(row: Tensor) -> dict[str, Any]:
    kept, asked = row[:-1], float(row[-1])
    share = kept / kept.sum().clamp(min=1)
    return {
        "share": share.tolist(),
        "used": math.exp(float(torch.special.entr(share).sum())),
        "drop_rate": 1 - float(kept.sum()) / asked,
    }
