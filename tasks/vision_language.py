"""Vision-language models: LIMoE trained on images with texts, and MoE-LLaVA and others on answers about images.

Contrastive pre-training is here, instruction tuning in `tasks.instruction`.

python -m tasks.vision_language fit --config configs/vision_language/limoe_digits.yaml
"""

from __future__ import annotations

if __name__ == "__main__":  # before the heavy imports, so that --help is instant
    from tasks.cli import main

    raise SystemExit(main("vision_language"))

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import zoo
from tasks.instruction import InstructionTask
from tasks.instruction_data import InstructionData
from tasks.modalities import ModalityShares, keep_shares, log_shares
from tasks.predictions import check_predictions, write_predictions
from tasks.training import Overrides, Task, data_group
from tasks.vision_language_data import VisionLanguageData
from tasks.zero_shot import class_embeddings, retrieval
from zoo.data.images_rows import IGNORE, real_rows
from zoo.data.pairs_rows import check_text_length
from zoo.models.contrastive import contrastive_loss

__all__ = ["ContrastiveTask", "InstructionData", "InstructionTask", "VisionLanguageData"]


class ContrastiveTask(Task):
    """Contrastive pre-training of one space for images and texts, over the batches of all processes.

    Args:
        network: the name of a model of ours ("vision_language/limoe_tiny", see `zoo models`), or a module.
        pretrained: a folder to start from instead.
        overrides: keywords of the model to change; {"dense": true} makes the dense twin.
        router: the gate of every MoE layer, {"class_path": ..., "init_args": {...}}; the model's own by default.
        losses: auxiliary losses by name with their weights; the model's own by default.
        capacity: places an expert, a factor or the arguments of `zoo.moe.Capacity`.
        vocab_size: of the model; the tokenizer's by default.
        text_length: of the model; the data's by default, and of a pretrained model, or where these have none, its own.
        image_size: of the model; the data's by default, and if that has none the model's own.
        channels: of the model; the data's by default, and if that has none the model's own.
        predictions: the file that `predict` writes: path, class and probability of each image.
        training: arguments of `tasks.training.Task`: learning rate, schedule and so on.
    """

    unit = "pairs"
    reads = "limoe"

    def __init__(
        self,
        network: str | nn.Module = "vision_language/limoe_tiny",
        pretrained: str | None = None,
        overrides: Overrides | None = None,
        router: dict[str, Any] | str | None = None,
        losses: dict[str, Any] | None = None,
        capacity: float | dict[str, Any] | None = None,
        vocab_size: int | None = None,
        text_length: int | None = None,
        image_size: int | None = None,
        channels: int | None = None,
        predictions: str = "predictions.csv",
        **training: Any,
    ) -> None:
        super().__init__(network, **training)
        self.overrides: dict[str, Any] = dict(overrides or {})
        self._embedded: list[tuple[Tensor, ...]] = []
        self._classes: Tensor | None = None
        self._shares = ModalityShares()

    def build(self) -> nn.Module:
        """The model that the arguments describe, fresh or from a folder."""
        h = self.hparams
        names = ("vocab_size", "text_length", "image_size", "channels", "router", "losses", "capacity")
        given = {**{name: h[name] for name in names if h[name] is not None}, **self.overrides}
        if h["pretrained"]:
            return zoo.from_pretrained(h["pretrained"], **given)
        assert isinstance(self.network, str)
        return zoo.create_model(self.network, **given)

    def check(self, data: Any) -> None:
        """Build the model without memory: raises what is wrong with the arguments before any work is done."""
        check_predictions(self.hparams["predictions"], bool(data.to_predict))
        self._adopt_sizes(data)
        super().check(data)

    def check_model(self, model: Any, data: Any) -> None:
        """Raise ValueError when model and data differ in vocabulary, text length, channels or image size."""
        if data is None:
            return
        if data.tokenizer.vocab_size > model.vocab_size:
            raise ValueError(
                f"the model has {model.vocab_size} token ids, but the tokenizer {data.tokenizer_name!r} "
                f"{data.tokenizer.vocab_size}"
            )
        if data.text_length and data.text_length > model.text_length:
            raise ValueError(
                f"the model takes texts of {model.text_length} tokens, but data.text_length is {data.text_length}"
            )
        check_text_length(data.tokenizer, data.text_length or model.text_length)
        for name in ("image_size", "channels"):
            asked, own = getattr(data, name), getattr(model, name)
            if asked and asked != own:
                raise ValueError(f"the model's {name} is {own}, but data.{name} is {asked}")

    def _adopt_sizes(self, data: Any) -> None:
        """Take from the data what the arguments leave open; the data take the tokenizer beside a pretrained model."""
        if data.tokenizer_name is None:
            folder = self.hparams["pretrained"]
            data.tokenizer_name = folder if folder and (Path(folder) / "tokenizer.json").is_file() else "words"
        found = {name: getattr(data, name) for name in ("image_size", "channels")}
        if not self.hparams["pretrained"]:  # else those of the folder; `check_model` holds them against the data
            found |= {"vocab_size": data.tokenizer.vocab_size, "text_length": data.text_length}
        for name, value in found.items():
            if self.hparams[name] is None and name not in self.overrides:
                self.hparams[name] = value

    def configure_model(self) -> None:
        """Build the model once the vocabulary is known; Lightning calls this."""
        if self.waits_for_checkpoint():
            return
        data = getattr(self._trainer, "datamodule", None)
        if self.model is None:
            if data is not None:
                self._adopt_sizes(data)
            self.model = self.converted(self.build())
        self.check_model(self.model, data)
        self.prepare_model(lambda: self.model.set_grad_checkpointing(True))

    def count(self, batch: dict[str, Tensor]) -> int:
        """Pairs in a batch."""
        return len(batch["image"])

    def batch_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The contrastive loss of a batch."""
        out = self.model(batch["image"], batch["ids"], batch["mask"])
        return contrastive_loss(out.image, out.text, out.scale, data_group(self.trainer))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The contrastive loss over the batches of all processes plus auxiliary losses.

        Accumulated micro-batches are not each other's negatives.
        """
        with zoo.moe.record(self.model) as step:
            out = self.model(batch["image"], batch["ids"], batch["mask"])
        loss = contrastive_loss(out.image, out.text, out.scale, data_group(self.trainer))
        self.log_loss(loss, torch.ones_like(loss), batch_idx)
        self.log("train/temperature", 1 / out.scale.detach())
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            shares = ModalityShares()
            shares.update(step, self._labels(batch))
            log_shares(self, "train", shares.compute())
        return self.with_auxiliary(loss, step)

    def _labels(self, batch: dict[str, Tensor]) -> list[Tensor]:
        return self.model.call_labels(len(batch["image"]), *batch["ids"].shape)

    def on_validation_epoch_start(self) -> None:
        """Start anew."""
        super().on_validation_epoch_start()
        self._embedded, self._classes, self._shares = [], None, ModalityShares()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Keep the embeddings of pictures and texts, or count images whose class is recognised by its name."""
        if "ids" in batch:
            with zoo.moe.record(self.model) as step:
                out = self.model(batch["image"], batch["ids"], batch["mask"])
            self._embedded.append((out.image, out.text, batch["group"], batch["text_group"]))
            self._shares.update(step, self._labels(batch))
            self._balance.update(step)
            return
        batch = real_rows(batch)
        real = batch["label"] != IGNORE
        best = self._chances(batch["image"]).topk(min(5, len(self._names())), dim=1).indices == batch["label"][:, None]
        sums = torch.stack([best[:, 0].sum(), best.sum(), real.sum()]).double()
        self._sums = sums if self._sums is None else self._sums + sums

    test_step = validation_step

    def _names(self) -> tuple[str, ...]:
        return self.trainer.datamodule.classes  # type: ignore[attr-defined]

    def _chances(self, image: Tensor) -> Tensor:
        """Probabilities [n, C] of classes by their names."""
        if self._classes is None:
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            self._classes = class_embeddings(self.model, data.tokenizer, data.classes, data.templates)
        out = self.model(image)
        return (out.scale * out.image @ self._classes.T).softmax(-1)

    def _log_evaluation(self, stage: str) -> None:
        figures: dict[str, float] = {}
        if self._embedded:
            image, text, group, text_group = (torch.cat(parts) for parts in zip(*self._embedded))
            figures |= retrieval(image, text, group, text_group, processes=data_group(self.trainer))
        if self._sums is not None:
            first, fifth, images = self.trainer.strategy.reduce(self._sums, reduce_op="sum").tolist()
            figures |= {"zero_shot_top1": first / max(images, 1), "zero_shot_top5": fifth / max(images, 1)}
        for name, value in figures.items():
            # All processes have the same figures by now; sync_dist keeps Lightning from warning that they might not.
            self.log(f"{stage}/{name}", value, prog_bar=name in ("zero_shot_top1", "text_recall_1"), sync_dist=True)
        self._log_balance(stage, self._balance)
        shares = self.modality_shares()
        log_shares(self, stage, shares)
        if stage == "val":
            keep_shares(self, shares)

    def modality_shares(self) -> dict[str, Any]:
        """Which experts the images and texts of the latest evaluation went to, by layer and modality."""
        return self._shares.compute()

    def on_predict_epoch_start(self) -> None:
        """Forget the classes of another run."""
        self._classes = None

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[dict[str, Any]]:
        """Path, likeliest class and its probability of each image."""
        rows: Any = self.trainer.predict_dataloaders
        batch = real_rows(batch)
        names = self._names()
        chances, best = self._chances(batch["image"]).max(-1)
        return [
            {"path": rows.data.split.names[index], "class": names[label], "probability": round(chance, 6)}
            for index, label, chance in zip(batch["index"].tolist(), best.tolist(), chances.tolist())
            if index >= 0
        ]

    def show_predictions(self, predictions: list[Any]) -> None:
        """Write the file of predictions, those of all processes."""
        write_predictions(self.hparams["predictions"], self.trainer, predictions)

    def on_fit_end(self) -> None:
        """Export model and tokenizer, where asked for."""
        super().on_fit_end()
        if self.hparams["export"] and self.trainer.is_global_zero:
            self.trainer.datamodule.tokenizer.save_pretrained(self.hparams["export"])  # type: ignore[attr-defined]
