"""Image classification: train, evaluate and use vision models with MoE layers.

python -m tasks.vision fit --config configs/vision/vmoe_digits.yaml
"""

from __future__ import annotations

if __name__ == "__main__":  # before the heavy imports, so that --help is instant
    from tasks.cli import main

    raise SystemExit(main("vision"))

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zoo
from tasks.optim import layered
from tasks.predictions import check_predictions, write_predictions
from tasks.teacher import Teacher
from tasks.training import Overrides, Task
from tasks.vision_data import VisionData, channels_of
from tasks.vision_models import check_alike, check_fits, check_timm, takes_any_size
from zoo.data.images_rows import IGNORE, real_rows
from zoo.distillation import soft_loss

__all__ = ["VisionData", "VisionTask"]


class VisionTask(Task):
    """An image classifier, its loss, and what to log.

    Args:
        network: the name of a model of ours ("vision/vmoe_tiny_test", see `zoo models`), or a module.
        pretrained: a folder, hub repository or the prefix of an original V-MoE checkpoint to start from instead.
        upcycle: a dense timm model to start from instead, with its MLPs copied into experts: {"model": name, arguments
            of `timm.create_model`} and, beside "model", the arguments of `zoo.upcycle`.
        overrides: keywords of the model to change, among them the kinds of experts, attention, depth and convolutions
            (`zoo.models.vision.build`).
        router: the gate of every MoE layer, {"class_path": ..., "init_args": {...}}; the model's own by default.
        losses: auxiliary losses by name with their weights, such as {"importance_vmoe": 0.005, "load_vmoe": 0.005}.
        teacher: a frozen model to learn from beside the labels, {"pretrained": folder, "weight": 0.25} and what else
            `tasks.teacher.Teacher` takes; it sees the same images, mixed ones too, normalised as it was trained.
        capacity: places an expert, a factor or the arguments of `zoo.moe.Capacity`.
        num_classes: of the model; the data's by default.
        image_size: of the model; the data's by default, and if that has none the model's own.
        channels: of the model; the data's by default.
        objective: "softmax" or, as V-MoE was pretrained, "sigmoid" cross-entropy; evaluation's loss and predicted
            probabilities are of the same kind.
        label_smoothing: share of the target that goes to all classes evenly.
        mixup: alpha of mixup, 0 for none.
        cutmix: alpha of CutMix, 0 for none; with both each batch gets one of them.
        optimizer: "adamw", or "sgd" with momentum 0.9, as V-MoE was fine-tuned.
        layer_decay: factor on the learning rate from each block to the one before it.
        predictions: the file that `predict` writes: path, class and probability of each image.
        training: arguments of `tasks.training.Task`: learning rate, schedule and so on.
    """

    unit = "images"
    reads = "timm"

    def __init__(
        self,
        network: str | nn.Module = "vision/vmoe_tiny_test",
        pretrained: str | None = None,
        upcycle: dict[str, Any] | None = None,
        overrides: Overrides | None = None,
        router: dict[str, Any] | str | None = None,
        losses: dict[str, Any] | None = None,
        capacity: float | dict[str, Any] | None = None,
        teacher: dict[str, Any] | None = None,
        num_classes: int | None = None,
        image_size: int | None = None,
        channels: int | None = None,
        objective: Literal["softmax", "sigmoid"] = "softmax",
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        layer_decay: float = 1.0,
        predictions: str = "predictions.csv",
        **training: Any,
    ) -> None:
        super().__init__(network, **training)
        self.overrides: dict[str, Any] = dict(overrides or {})
        self._predicting = False
        self._teacher = Teacher(teacher) if teacher else None
        self._classes: tuple[str, ...] | None = None  # of a pretrained model that only predicts; else those of the data
        if pretrained and upcycle:
            raise ValueError("pretrained and upcycle exclude each other: both say where the weights come from")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing is a share of the target, from 0 to 1, got {label_smoothing}")
        for name, alpha in (("mixup", mixup), ("cutmix", cutmix), ("layer_decay", layer_decay)):
            if alpha < 0:
                raise ValueError(f"{name} must be at least 0, got {alpha}")
        self._mix = self._mixing() if mixup or cutmix else None

    def _mixing(self) -> Any:
        from timm.data import Mixup

        # The number of classes is known later; what it is here does not matter for the images.
        return Mixup(self.hparams["mixup"], self.hparams["cutmix"], label_smoothing=0.0)

    def build(self) -> nn.Module:
        """The model that the arguments describe, fresh, pretrained or upcycled."""
        h = self.hparams
        names = {"num_classes": "num_classes", "image_size": "img_size", "channels": "in_chans"}
        sizes = {theirs: h[ours] for ours, theirs in names.items() if h[ours] is not None}
        gate = {name: h[name] for name in ("router", "losses", "capacity") if h[name] is not None}
        if h["pretrained"]:
            return zoo.from_pretrained(h["pretrained"], **{**sizes, **self.overrides, **gate})
        if h["upcycle"]:
            import timm

            how = dict(h["upcycle"])
            check_timm(how.get("model"))
            weights = how.pop("pretrained", False) and not torch.empty(0).is_meta
            if takes_any_size(how["model"]):
                sizes.pop("img_size", None)
            dense = timm.create_model(how.pop("model"), pretrained=weights, **sizes, **self.overrides)
            return zoo.upcycle(dense, **how, **gate)
        assert isinstance(self.network, str)
        if takes_any_size(self.network.removeprefix("vision/")):
            sizes.pop("img_size", None)
        return zoo.create_model(self.network, **{**sizes, **self.overrides, **gate})

    def check_run(self, trainer: Any, data: Any, subcommand: str, checkpoint: str | None) -> None:
        """Raise ValueError for what is wrong with a run of the command line, before any work is done."""
        self._predicting = subcommand == "predict" and checkpoint is None
        super().check_run(trainer, data, subcommand, checkpoint)

    def check(self, data: Any) -> None:
        """Build the model without memory: raises what is wrong with the arguments before any work is done."""
        if self._mix is not None and data.batch_size % 2:
            raise ValueError(f"mixup and cutmix mix pairs of images: batch_size must be even, got {data.batch_size}")
        check_predictions(self.hparams["predictions"], bool(data.to_predict))
        self._adopt_sizes(data)
        super().check(data)

    def check_model(self, model: Any, data: Any) -> None:
        """Raise ValueError when model and data differ in classes, channels or image size."""
        if self._teacher is not None and next(model.parameters()).is_meta:
            self.build_teacher(model)
        if data is None:
            return
        check_fits(model, data, None if self._classes is not None else len(data.classes))

    def _adopt_sizes(self, data: Any) -> None:
        """Take from the data what the arguments leave open."""
        found = {"image_size": data.image_size, "channels": data.channels}
        if not self._own_classes():
            found["num_classes"] = len(data.classes)
        keywords = {"image_size": "img_size", "channels": "in_chans"}
        for name, value in found.items():
            if self.hparams[name] is None and keywords.get(name, name) not in self.overrides:
                self.hparams[name] = value

    def _own_classes(self) -> bool:
        """Whether images are to be told apart by the classes of a pretrained model, whatever those of the data."""
        trainer = self._trainer
        predicting = self._predicting or (trainer is not None and trainer.predicting and trainer.ckpt_path is None)
        return predicting and bool(self.hparams["pretrained"]) and not self.overrides.get("new_head")

    def _class_names(self, data: Any) -> tuple[str, ...]:
        """Names of a pretrained model's classes: those kept with it, else the data's where as many, else numbers."""
        count, kept = self.model.num_classes, (getattr(self.model, "pretrained_cfg", None) or {}).get("label_names")
        return tuple(kept or (data.classes if len(data.classes) == count else map(str, range(count))))

    def configure_model(self) -> None:
        """Build the model once the classes are known; Lightning calls this."""
        if self.waits_for_checkpoint():
            return
        data = getattr(self._trainer, "datamodule", None)
        if self.model is None:
            if data is not None:
                self._adopt_sizes(data)
            self.model = self.converted(self.build())
            if data is not None and self._own_classes():
                self._classes = self._class_names(data)
        self.check_model(self.model, data)
        trainer = self._trainer
        if self._teacher is not None and self._teacher.model is None and trainer is not None and trainer.training:
            self._teacher.model = self.build_teacher(self.model)
        self.prepare_model(lambda: self.model.set_grad_checkpointing(True))

    def build_teacher(self, model: Any) -> nn.Module:
        """The model's teacher; raises ValueError for one of other classes, channels or images."""
        assert self._teacher is not None
        sizes: dict[str, Any] = {}
        if self._teacher.spec.get("network"):
            sizes = {"num_classes": model.num_classes, "in_chans": channels_of(model)}
            if self.hparams["image_size"] and not takes_any_size(self._teacher.spec["network"].removeprefix("vision/")):
                sizes["img_size"] = self.hparams["image_size"]
        teacher: Any = self._teacher.build(**sizes)
        check_alike(teacher, model)
        return teacher

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What decays and what does not, and each block's learning rate."""
        groups = super().parameter_groups()
        h = self.hparams
        return groups if h["layer_decay"] == 1 else layered(self.model, groups, h["lr"], h["layer_decay"])

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """AdamW or SGD over groups of parameters."""
        if self.hparams["optimizer"] == "sgd":
            return torch.optim.SGD(groups, lr=self.hparams["lr"], momentum=0.9)
        return super().optimizer(groups)

    def count(self, batch: dict[str, Tensor]) -> int:
        """Images in a batch."""
        return len(batch["label"])

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of logits [B, classes] with targets [B, classes] that sum to one, smoothed, [B] float32."""
        smoothing, classes = self.hparams["label_smoothing"], targets.shape[1]
        return self._cross_entropy(logits.float(), targets * (1 - smoothing) + smoothing / classes)

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.hparams["objective"] == "sigmoid":
            return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)
        return F.cross_entropy(logits, targets, reduction="none")

    def batch_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean loss of a batch's images as they are."""
        targets = F.one_hot(batch["label"], self.model.num_classes).float()
        return self.loss(self.model(batch["image"]), targets).mean()

    def soft_loss(self, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Cross-entropy of the objective's kind with what the teacher finds likely, [B] float32."""
        assert self._teacher is not None
        temperature = self._teacher.temperature
        if self.hparams["objective"] == "softmax":
            return soft_loss(logits, teacher_logits, temperature)
        wanted = (teacher_logits.float() / temperature).sigmoid()
        return self._cross_entropy(logits.float() / temperature, wanted) * temperature**2

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean loss of mixed images plus auxiliary losses."""
        images, labels = batch["image"], batch["label"]
        targets = F.one_hot(labels, self.model.num_classes).float()
        if self._mix is not None:
            self._mix.num_classes = self.model.num_classes
            images, targets = self._mix(images, labels)
        with zoo.moe.record(self.model) as step:
            logits = self.model(images)
        loss = hard = self.loss(logits, targets).mean()
        if hasattr(self.model, "embedding_loss"):
            of_embedding = self.model.embedding_loss(targets)
            self.log("train/loss_embedding", of_embedding.detach())
            loss = loss + of_embedding
        self.log_loss(loss * len(images), torch.tensor(len(images), device=loss.device), batch_idx)
        if self._teacher is not None:
            seen = self._as_teacher_sees(images)
            soft = self.soft_loss(logits, self._teacher.logits(lambda model: model(seen), logits)).mean()
            self.log("train/loss_teacher", soft.detach())
            loss = loss + self._teacher.weight * (soft - hard)
        self.log("train/skipped_images", batch["skipped"].sum().float(), reduce_fx="sum", on_step=False, on_epoch=True)
        return self.with_auxiliary(loss, step)

    def _as_teacher_sees(self, images: Tensor) -> Tensor:
        """Images normalised as the teacher was trained."""
        data = getattr(self.trainer, "datamodule", None)
        if data is None or self._teacher is None:
            return images
        return data.preparation(self.model).renormalised(images, data.preparation(self._teacher.model, given=False))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add to the sums of an evaluation."""
        skipped = batch["skipped"].sum()
        batch = real_rows(batch)
        with zoo.moe.record(self.model) as step:
            logits = self.model(batch["image"]).double()
        labels, real = batch["label"], batch["label"] != IGNORE
        targets = F.one_hot(labels.clamp(min=0), logits.shape[1]).to(logits.dtype)
        loss = (self._cross_entropy(logits, targets) * real).sum()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        sums = [loss, real.sum(), best[:, 0].sum(), best.sum(), skipped]
        self.add_to_evaluation(step, torch.stack([value.double() for value in sums]), real)

    test_step = validation_step

    def evaluated(self, sums: list[float]) -> tuple[dict[str, float], str]:
        """Loss an image, and shares of images whose class is the likeliest, or one of the five likeliest."""
        loss, images, first, fifth, skipped = sums
        total = max(images, 1.0)
        figures = {"loss": loss / total, "top1": first / total, "top5": fifth / total, "skipped_images": skipped}
        return figures, "top1"

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[dict[str, Any]]:
        """Path, class and probability of each image."""
        rows: Any = self.trainer.predict_dataloaders
        batch = real_rows(batch)
        classes = self._classes or self.trainer.datamodule.classes  # type: ignore[attr-defined]
        logits = self.model(batch["image"]).float()
        sigmoid = self.hparams["objective"] == "sigmoid"
        chances, best = (logits.sigmoid() if sigmoid else logits.softmax(-1)).max(-1)
        return [
            {"path": rows.data.split.names[index], "class": classes[label], "probability": round(chance, 6)}
            for index, label, chance in zip(batch["index"].tolist(), best.tolist(), chances.tolist())
            if index >= 0
        ]

    def rebuilt(self, state: Mapping[str, Tensor]) -> Any:
        """As of any task; what timm notes of a model goes along."""
        model = super().rebuilt(state)
        model.pretrained_cfg.update(**dict(self.model.pretrained_cfg))
        return model

    def on_fit_end(self) -> None:
        """Export the model with the names of its classes and how images are prepared for it, where asked for."""
        data = getattr(self.trainer, "datamodule", None)
        if self.hparams["export"] and data is not None:
            # Where timm looks for them; it drops names beside another number of classes.
            cfg = {"num_classes": self.model.num_classes, "label_names": list(data.classes)}
            self.model.pretrained_cfg.update(**cfg, **data.preparation(self.model).config())
        super().on_fit_end()

    def show_predictions(self, predictions: list[Any]) -> None:
        """Write the file of predictions, those of all processes."""
        write_predictions(self.hparams["predictions"], self.trainer, predictions)
