"""Language modelling: train, evaluate and sample from a causal language model with MoE layers.

python -m tasks.language fit --config configs/language/mixtral_tiny.yaml
"""

from __future__ import annotations

if __name__ == "__main__":  # before the heavy imports, so that --help is instant
    from tasks.cli import main

    raise SystemExit(main("language"))

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zoo
from tasks import frozen, labels
from tasks.generation import check_sampling, generate
from tasks.language_data import LanguageData
from tasks.teacher import Teacher
from tasks.training import Overrides, Task
from zoo.data import Tokenizer, flash_lengths
from zoo.distillation import soft_loss
from zoo.pretrained.causal import check_published
from zoo.pretrained.generating import KEY, hears
from zoo.pretrained.packed import carries_state, mask_arguments

__all__ = ["LanguageData", "LanguageTask"]


class LanguageTask(Task):
    """A causal language model, its loss, and what to log.

    Args:
        network: the name of a model of ours ("language/mixtral_tiny", see `zoo models`), or a module.
        pretrained: a folder or hub repository to start from instead.
        overrides: fields of the model's configuration to change, the kinds of experts, attention, depth and
            shortcuts (`zoo.models.language.build`), or keywords of `zoo.from_pretrained`.
        router: the gate of every MoE layer, a name or {"class_path": ..., "init_args": {...}}, or a list of the latter
            for the first layers, its last for all the rest; the family's own by default.
        losses: auxiliary losses by name with their weights, such as {"switch": 0.01, "z": 0.001}.
        vocab_size: of a model made by name; the tokenizer's by default.
        teacher: a frozen model to learn from beside the text, {"pretrained": folder, "weight": 0.25} and what else
            `tasks.teacher.Teacher` takes.
        max_new_tokens: length of what `predict` generates.
        temperature: 0 takes the likeliest token.
        top_p: sample from the likeliest tokens that have this probability together.
        training: arguments of `tasks.training.Task`: learning rate, schedule and so on.
    """

    unit = "tokens"
    generates = True

    def __init__(
        self,
        network: str | nn.Module = "language/mixtral_tiny",
        pretrained: str | None = None,
        overrides: Overrides | None = None,
        router: dict[str, Any] | list[dict[str, Any]] | str | None = None,
        losses: dict[str, Any] | None = None,
        vocab_size: int | None = None,
        teacher: dict[str, Any] | None = None,
        max_new_tokens: int = 200,
        temperature: float = 0.8,
        top_p: float = 0.95,
        **training: Any,
    ) -> None:
        super().__init__(network, **training)
        check_sampling(max_new_tokens, temperature, top_p)
        self.overrides: dict[str, Any] = dict(overrides or {})
        self._teacher = Teacher(teacher) if teacher else None

    def build(self) -> nn.Module:
        """The model that the arguments describe, fresh or pretrained."""
        gate = {"router": self.hparams["router"], "losses": self.hparams["losses"]}
        gate = {name: value for name, value in gate.items() if value is not None}
        if self.hparams["pretrained"]:
            # The trainer's precision decides, not the checkpoint's: bfloat16 weights hardly move under AdamW.
            kind = {"dtype": torch.get_default_dtype()}
            return zoo.from_pretrained(self.hparams["pretrained"], **{**kind, **self.overrides, **gate})
        sizes = {} if self.hparams["vocab_size"] is None else {"vocab_size": self.hparams["vocab_size"]}
        assert isinstance(self.network, str)
        return zoo.create_model(self.network, **{**sizes, **self.overrides, **gate})

    def frozen_in_files(self) -> bool:
        """Whether a model is read whole, and nothing of it is made anew but by conversions that add what learns."""
        return frozen.in_files(self.hparams, self._conversions)

    def configure_model(self) -> None:
        """Build the model once the tokenizer is known; Lightning calls this."""
        if self.waits_for_checkpoint():
            return
        trainer = self._trainer
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        if self.model is None:
            if tokenizer is not None and self.hparams["vocab_size"] is None:
                self.hparams["vocab_size"] = self.overrides.get("vocab_size", tokenizer.vocab_size)
            self.model = self.converted(self.build())
        if tokenizer is not None:
            check_vocabulary(self.model, tokenizer)
        if self._teacher is not None and self._teacher.model is None and trainer is not None and trainer.training:
            self._teacher.model = self.build_teacher(self.model)
        self.prepare_model(self.recompute_layers)

    def build_teacher(self, model: Any) -> nn.Module:
        """The model's teacher; raises ValueError for one of another vocabulary."""
        assert self._teacher is not None
        size = model.config.get_text_config().vocab_size
        made = {"vocab_size": size} if self._teacher.spec.get("network") else {"dtype": torch.get_default_dtype()}
        teacher: Any = self._teacher.build(**made)
        if (theirs := teacher.config.get_text_config().vocab_size) != size:
            raise ValueError(f"teacher: its vocabulary has {theirs} tokens, the model's {size}; they must be the same")
        return teacher

    def checked_on_meta(self) -> bool:
        """Always: of a pretrained model that reads the configuration and the heads of its files."""
        return True

    def check_model(self, model: Any, data: Any) -> None:
        """Raise what would keep the trained model from being exported, where asked for, or from reading the tokens."""
        if carries_state(model):
            warnings.warn(
                f"{model.config.model_type} carries something from token to token, which does not end with a document: "
                "where several share a sequence, later ones hear of those before them",
                stacklevel=2,
            )
        known = self.hparams["pretrained"] or self.hparams["vocab_size"] or self.overrides.get("vocab_size")
        if self._teacher is not None and known:  # else the vocabulary is the tokenizer's, which may have to be learnt
            self.build_teacher(model)
        if self.hparams["export"]:
            check_published(model)
        if self.hparams["pretrained"] and not data.tokenizer_name.startswith("bpe:"):
            check_vocabulary(model, data.tokenizer)

    def count(self, batch: dict[str, Tensor]) -> int:
        """Tokens in a batch."""
        return batch["input_ids"].numel()

    def logits(self, batch: dict[str, Tensor], model: Any = None) -> Tensor:
        """What the model, or another one, gives at every place of a packed batch, [B, S, V]."""
        model = self.model if model is None else model
        # No attention mask and no cache: then positions that start again mark where documents begin.
        positions = batch["position_ids"]
        flash = "flash" in str(model.config._attn_implementation)
        apart = flash_lengths(positions) if flash else mask_arguments(model, positions)
        apart |= labels.told(model, batch)
        if not model.training and hears(model):
            # What fills up a sequence, or a batch, of an evaluation meets no expert, and takes the place of nothing.
            real = (batch["labels"] >= 0).int().flip(1).cummax(1).values.flip(1).bool()
            if not bool(real.all()):
                apart[KEY] = {**apart.get(KEY, {}), "mask": real}
        return model(input_ids=batch["input_ids"], position_ids=positions, use_cache=False, **apart).logits

    def nats(self, batch: dict[str, Tensor], logits: Tensor | None = None) -> Tensor:
        """Negative log-likelihood of every target of a packed batch, [B, S] float32, zero where there is none."""
        logits = self.logits(batch) if logits is None else logits
        return F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten(), reduction="none").view_as(
            batch["labels"]
        )

    def batch_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean negative log-likelihood of a packed batch's targets."""
        return self.nats(batch).sum() / (batch["labels"] >= 0).sum().clamp(min=1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean negative log-likelihood, or its mixture with the teacher's predictions, plus auxiliary losses."""
        with zoo.moe.record(self.model) as step:
            logits = self.logits(batch)
        nats = self.nats(batch, logits)
        targets = (batch["labels"] >= 0).sum()
        self.log_loss(nats.sum(), targets, batch_idx)
        if self._teacher is not None:
            of_teacher = self._teacher.logits(lambda model: self.logits(batch, model), logits)
            soft = soft_loss(logits, of_teacher, self._teacher.temperature).where(batch["labels"] >= 0, 0.0)
            self.log("train/loss_teacher", soft.detach().sum() / targets.clamp(min=1))
            nats = (1 - self._teacher.weight) * nats + self._teacher.weight * soft
        # Divide by the number of places, not of targets: then every target weighs the same in whatever micro-batch and
        # on whatever process it is, and accumulation and data parallelism give the gradient of the whole batch.
        return self.with_auxiliary(nats.sum() / nats.numel(), step)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add to the sums of an evaluation."""
        with zoo.moe.record(self.model) as step:
            nats = self.nats(batch).double()
        text = batch["target_bytes"] >= 0
        each = nats, batch["labels"] >= 0, nats.where(text, 0.0), batch["target_bytes"].clamp(min=0)
        rows = torch.stack([figure.double().sum(1) for figure in each], dim=1)  # [B, 4]
        source = batch.get("source", torch.zeros(len(rows), dtype=torch.int64, device=rows.device))
        sums = rows.new_zeros(max(len(self._sources()), 1), 4).index_add(0, source, rows)
        self.add_to_evaluation(step, sums.flatten(), (batch["labels"] >= 0).any(1))

    test_step = validation_step

    def evaluated(self, sums: list[float]) -> tuple[dict[str, float], str]:
        """Loss a token, perplexity and bits per byte; where sources have names, of each of them too."""
        rows = [sums[at : at + 4] for at in range(0, len(sums), 4)]
        figures = _figures([sum(column) for column in zip(*rows)])
        for name, row in zip(self._sources(), rows):
            figures |= {f"{figure}/{name}": value for figure, value in _figures(row).items()}
        return figures, "bits_per_byte"

    def _sources(self) -> list[str]:
        return getattr(self.trainer.datamodule, "names", [])  # type: ignore[attr-defined]

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> str:
        """The prompt and what the model makes of it."""
        h, tokenizer = self.hparams, self.trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        options = h["max_new_tokens"], h["temperature"], h["top_p"], labels.told(self.model, batch)
        return generate(self.model, tokenizer, batch["input_ids"], *options)

    def on_fit_end(self) -> None:
        """Export model and tokenizer, where asked for."""
        super().on_fit_end()
        if self.hparams["export"] and self.trainer.is_global_zero:
            self.trainer.datamodule.tokenizer.save_pretrained(self.hparams["export"])  # type: ignore[attr-defined]


def _figures(sums: list[float]) -> dict[str, float]:
    nats, targets, text_nats, size = sums
    loss = nats / max(targets, 1)
    # Bits of the text alone: that a document ends is no part of its bytes.
    bits = text_nats / math.log(2) / max(size, 1)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "bits_per_byte": bits}


def check_vocabulary(model: Any, tokenizer: Tokenizer) -> None:
    """Raise ValueError for a tokenizer with more tokens than a model has embeddings."""
    size = model.get_input_embeddings().num_embeddings
    if tokenizer.vocab_size > size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, but the model's vocabulary only {size}")
