"""Training-time schemes that end in fewer experts or one: callbacks for `trainer.callbacks`.

trainer:
  callbacks:
    - class_path: tasks.schemes.ExpertPruning
      init_args: {every_n_steps: 100, until_step: 1000}
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn

import zoo
from zoo.convert.numbers_said import say_numbers
from zoo.convert.usage import usage_of
from zoo.moe import Experts, MoE
from zoo.moe.kept import check_kept, keep_experts, rows_of
from zoo.parallel.parts import is_spread


class ExpertPruning(Callback):
    """Drop experts that are hardly used, step by step, until one is left a layer (MoE-Pruning, 2206.00277).

    Every `every_n_steps` optimizer steps up to `until_step` each layer loses the experts whose share of its use so far
    is below threshold / E, where E is how many are left; at until_step all but the `keep` most used ones go, and then
    training goes on with these. Use is the sum of combine weights, or with by="counts" of tokens met, since training
    began. At least `keep` stay in any case. Gate, optimizer state and the model's configuration go along, k goes down
    where it must. A layer with one expert is dense: `zoo.to_dense(model, method={"expert": 0})`.

    After the paper: use accumulates over windows and what stays below a threshold is dropped, all but one by the middle
    of fine-tuning. Its equations could not be read: thresholds in units of an even share are ours.
    A checkpoint is read by runs with this callback, which shrinks the model as far first.

    Raises ValueError for numbers that are none, and on starting: for several processes, for a callback that averages
    whole weights, for a model without experts, naming a gate that one cannot take experts from, all but `keep` of them
    or one at a time, and for a model to be exported whose layout cannot say that it has lost some (LIMoE), or whose
    training ends before until_step, with layers of different sizes.
    """

    def __init__(
        self,
        every_n_steps: int,
        until_step: int,
        threshold: float = 0.5,
        keep: int = 1,
        by: Literal["weight", "counts"] = "weight",
    ) -> None:
        if every_n_steps < 1 or until_step < 1 or keep < 1 or not threshold >= 0:
            raise ValueError(
                "ExpertPruning: expected every_n_steps, until_step and keep of at least 1 and threshold of at least "
                f"0, got {every_n_steps}, {until_step}, {keep} and {threshold}"
            )
        if by not in ("weight", "counts"):
            raise ValueError(f"ExpertPruning: by is 'weight' or 'counts', got {by!r}")
        self.every_n_steps, self.until_step, self.threshold = every_n_steps, until_step, threshold
        self.keep, self.by = keep, by
        self._use: dict[str, Tensor] = {}
        self._step, self._hooked = 0, False
        self._recording: tuple[ExitStack, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the model shrink to what a checkpoint holds before that is loaded."""
        if trainer.world_size > 1:
            raise ValueError(
                f"ExpertPruning: layers change their size, which {trainer.world_size} processes would not see alike; "
                "train in one process"
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging):
                raise ValueError(
                    f"ExpertPruning: {type(callback).__name__} averages weights whose shapes change; leave one out"
                )
        if not self._hooked:
            pl_module.register_load_state_dict_pre_hook(shrink_to)
            self._hooked = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that every layer can lose experts, and the model then be exported, where asked for."""
        layers = sparse_layers("ExpertPruning", pl_module)
        owners: dict[int, str] = {}
        for name, moe in layers.items():
            for tensor in rows_of(f"ExpertPruning: {name}", moe).values():
                if (owner := owners.setdefault(id(tensor), name)) != name:
                    raise ValueError(f"ExpertPruning: {name} and {owner} share their weights; expected each its own")
            check_kept(f"ExpertPruning: {name}", moe, range(min(self.keep, moe.router.num_experts)))
        export = pl_module.hparams.get("export")
        made: Any = getattr(getattr(pl_module, "model", None), "made_with", None)
        if made and export:
            raise ValueError(
                f"ExpertPruning: export: the layout of {made['network']} cannot say that experts were dropped; leave "
                "out model.export, and keep the checkpoint"
            )
        if export and (steps := trainer.estimated_stepping_batches) < self.until_step:
            raise ValueError(
                f"ExpertPruning: until_step is {self.until_step}, but training ends after {steps} steps, with layers "
                f"that may differ in their experts, which no layout says; expected at most {steps}, or no model.export"
            )
        self._step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch what gates decide, while there is anything to decide."""
        if trainer.global_step < self.until_step:
            stack = ExitStack()
            self._recording = stack, stack.enter_context(zoo.moe.record(pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count, and drop experts when this batch ended a step at which that is due."""
        if self._recording is None:
            return
        recording, step = self._recording
        recording.close()
        self._recording = None
        for name, calls in step.routings.items():
            for decision in calls:
                use = getattr(usage_of(decision), self.by)
                self._use[name] = self._use[name].to(use.device) + use if name in self._use else use
        now = trainer.global_step
        if now == self._step:  # in the middle of an accumulation
            return
        self._step = now
        if now % self.every_n_steps == 0 or now == self.until_step:
            self.drop(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop watching."""
        if self._recording is not None:
            self._recording[0].close()
            self._recording = None

    def drop(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop what is used too little by now."""
        changed = False
        for name, moe in sparse_layers("ExpertPruning", pl_module).items():
            if name not in self._use:
                continue
            kept = self.kept(self._use[name], trainer.global_step >= self.until_step)
            if len(kept) == moe.router.num_experts:
                continue
            parameters = keep_experts(f"ExpertPruning: {name}", moe, kept)
            for optimizer in trainer.optimizers:
                take_rows(optimizer, parameters)
            self._use[name] = self._use[name][torch.tensor(kept, device=self._use[name].device)]
            changed = True
        if changed:
            model: Any = getattr(pl_module, "model", pl_module)
            say_numbers(model)
            model.reshaped = True
        for name, moe in sparse_layers("ExpertPruning", pl_module).items():
            pl_module.log(f"train/experts/{name}", float(moe.router.num_experts))

    def kept(self, use: Tensor, last: bool) -> list[int]:
        """Which experts of a layer stay, by their use [E]."""
        order = use.sort(descending=True, stable=True).indices.tolist()
        share = use / use.sum().clamp(min=torch.finfo(use.dtype).tiny)
        left = [e for e in order if not last and share[e] >= self.threshold / len(use)]
        return sorted(left if len(left) >= self.keep else order[: self.keep])

    def state_dict(self) -> dict[str, Any]:
        """Use so far."""
        return {"use": {name: use.tolist() for name, use in self._use.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._use = {name: torch.tensor(use, dtype=torch.float64) for name, use in state_dict["use"].items()}


class ExpertAveraging(Callback):
    """Pull the experts of every layer to their mean after each optimizer step (EWA, 2308.06093).

    W_e <- (1 - r) W_e + r mean_e W_e, r growing linearly to `rate` over warmup_steps; when training ends, and unless
    merge=False, every expert is their mean, so that `zoo.to_dense(model)` is exact and a ViT is a ViT again. The paper
    averages at the end of every iteration and has tokens go to experts by a random uniform partition, which is
    `RandomRouter` with train_level="partition"; its equation could not be read, and may pull to the mean of the others,
    which is the same with r E / (E - 1). An optimizer's state stays each expert's own. Checkpoints, also the one made
    when training ends, hold the experts before they are merged.

    Raises ValueError for a rate outside [0, 1], and on starting for a model without experts, with others than stacked
    MLPs, or spread over processes.
    """

    def __init__(self, rate: float, warmup_steps: int = 0, merge: bool = True) -> None:
        if not 0 <= rate <= 1 or warmup_steps < 0:
            raise ValueError(
                f"ExpertAveraging: expected 0 <= rate <= 1 and warmup_steps >= 0, got {rate}, {warmup_steps}"
            )
        self.rate, self.warmup_steps, self.merge = rate, warmup_steps, merge
        self._step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the model has experts, all of them here."""
        for name, moe in sparse_layers("ExpertAveraging", pl_module).items():
            if type(moe.experts) is not Experts:
                kind = type(moe.experts).__name__
                raise ValueError(f"ExpertAveraging: {name} has {kind}; expected Experts, stacked MLPs")
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Pull, where this batch ended a step."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        pull(pl_module, self.rate * min(1.0, self._step / max(self.warmup_steps, 1)))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge, after the last checkpoint, which is to continue with experts that differ."""
        if self.merge:
            pull(pl_module, 1.0)


@torch.no_grad()
def pull(model: nn.Module, rate: float) -> None:
    """Move every expert of every layer by `rate` of the way to their mean, in place."""
    for moe in model.modules():
        if isinstance(moe, MoE):
            for parameter in moe.experts.parameters():
                exact = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
                mean = exact.mean(0, keepdim=True)
                parameter.copy_(mean.expand_as(exact) if rate == 1 else exact.lerp(mean, rate))


def sparse_layers(what: str, model: nn.Module) -> dict[str, MoE]:
    """Every `MoE` by name; raises ValueError for a model without, or with experts spread over processes."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
    if not layers:
        raise ValueError(f"{what}: the model has no mixture of experts (zoo.moe.MoE)")
    if is_spread(model) or any(moe._parallel() is not None for moe in layers.values()):
        raise ValueError(f"{what}: the model's experts are spread over processes; expected all of them in each")
    return layers


def take_rows(optimizer: torch.optim.Optimizer, changed: dict[nn.Parameter, Tensor]) -> None:
    """Let an optimizer's state lose the rows that parameters lost, as `zoo.moe.kept.keep_experts` tells them."""
    for parameter, index in changed.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.dim() == parameter.dim() and value.shape[1:] == parameter.shape[1:]:
                optimizer.state[parameter][key] = value[index]


def shrink_to(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before a state is loaded: drop as many experts as it lacks; which ones does not matter, their weights come."""
    changed = False
    for name, moe in ((n, m) for n, m in module.named_modules() if isinstance(m, MoE)):
        stored = state.get(f"{prefix}{name}.experts.down_proj")
        if stored is not None and len(stored) < moe.experts.num_experts:
            keep_experts(name, moe, range(len(stored)))
            changed = True
    if changed:
        model: Any = getattr(module, "model", module)
        say_numbers(model)
        model.reshaped = True
