"""Language modelling: train, evaluate and sample from a causal language model with MoE layers.

python -m tasks.language fit --config configs/language/mixtral_tiny.yaml
"""

from __future__ import annotations

if __name__ == "__main__":  # before the heavy imports, so that --help is instant
    from tasks.cli import main

    raise SystemExit(main("language"))

import math
import warnings
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import zoo
from tasks.generation import check_sampling, generate, prompt_ids
from tasks.teacher import Teacher
from tasks.training import Overrides, Task, share_of
from zoo.data import Corpus, Loader, Packed, Tokenizer, flash_lengths, open_corpus, open_tokenizer, tokenize
from zoo.distillation import soft_loss
from zoo.pretrained.causal import check_published
from zoo.pretrained.packed import carries_state, mask_arguments


class LanguageData(LightningDataModule):
    """Text, packed into sequences of fixed length.

    Args:
        source: "stdlib" (the running Python's own source, about 12 MB), "hub:NAME" or "hub:NAME:CONFIG" (a Hugging Face
            data set), or text files, folders and glob patterns, one or several.
        tokenizer: "bytes", "bpe:SIZE" (learnt on the training split), or a transformers tokenizer's folder or hub id.
        sequence_length: tokens a sequence.
        batch_size: sequences a batch on each process.
        num_workers: processes that prepare batches.
        seed: of the order in which sequences come; with the epoch it is all the order depends on.
        text_column: where a `.jsonl` file or a hub data set keeps the text.
        prompts: what `predict` continues.
    """

    def __init__(
        self,
        source: str | list[str] = "stdlib",
        tokenizer: str = "bytes",
        sequence_length: int = 256,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        text_column: str = "text",
        prompts: list[str] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("sequence_length", sequence_length), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.source, self.tokenizer_name, self.text_column = source, tokenizer, text_column
        self.sequence_length, self.batch_size, self.num_workers = sequence_length, batch_size, num_workers
        self.seed, self.prompts = seed, prompts or []

    @cached_property
    def corpus(self) -> Corpus:
        """The text, by split."""
        return open_corpus(self.source, self.text_column)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Made when first asked for: learning a BPE takes a while the first time."""
        needs_text = self.tokenizer_name.startswith("bpe:")
        return open_tokenizer(self.tokenizer_name, self.corpus if needs_text else None)

    def check(self, subcommand: str) -> None:
        """Raise what is wrong with the arguments, as far as it shows before anything is read or learnt."""
        if not self.tokenizer_name.startswith("bpe:"):
            _ = self.tokenizer
        if subcommand != "predict":
            if not str(self.source).startswith("hub:"):  # opening one of those downloads it
                _ = self.corpus
        elif not self.prompts:
            raise ValueError("nothing to predict: give data.prompts")

    def prepare_data(self) -> None:
        """Tokenize into the cache, on one process only."""
        stage = self.trainer.state.fn if self.trainer else None
        splits = {TrainerFn.VALIDATING: ("val",), TrainerFn.TESTING: ("test",), TrainerFn.PREDICTING: ()}
        for split in splits.get(stage or TrainerFn.FITTING, ("train", "val")):
            tokenize(self.corpus, split, self.tokenizer)

    def packed(self, split: str) -> Packed:
        """The sequences of a split: for training what fills whole ones, else everything."""
        tokens = tokenize(self.corpus, split, self.tokenizer)
        return Packed(tokens, self.sequence_length, self.tokenizer.pad, tail=split != "train")

    def train_dataloader(self) -> Loader:
        """Shuffled batches that can be taken up again in the middle of an epoch."""
        return self._loader("train")

    def val_dataloader(self) -> Loader:
        """Every token of the validation split once."""
        return self._loader("val")

    def test_dataloader(self) -> Loader:
        """Every token of the test split once."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """The prompts, one at a time."""
        rows = [{"prompt": p, "input_ids": prompt_ids(self.tokenizer, p)} for p in self.prompts]
        return DataLoader(rows, batch_size=None)  # type: ignore[arg-type]

    def _loader(self, split: str) -> Loader:
        trainer = self.trainer
        return Loader(
            self.packed(split),
            self.batch_size,
            shuffle=split == "train",
            seed=self.seed,
            **share_of(trainer),
            num_workers=self.num_workers,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the data it continues with."""
        return {"tokenizer": self.tokenizer.fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise ValueError when the checkpoint was trained with another tokenizer."""
        if state_dict["tokenizer"] != self.tokenizer.fingerprint:
            raise ValueError(
                f"the checkpoint was trained with another tokenizer than {self.tokenizer_name!r} "
                f"of {self.corpus.description}"
            )


class LanguageTask(Task):
    """A causal language model, its loss, and what to log.

    Args:
        network: the name of a model of ours ("language/mixtral_tiny", see `zoo models`), or a module.
        pretrained: a folder or hub repository to start from instead.
        overrides: fields of the model's configuration to change, the kinds of experts, attention, depth and
            shortcuts (`zoo.models.language.build`), or keywords of `zoo.from_pretrained`.
        router: the gate of every MoE layer, {"class_path": ..., "init_args": {...}}, or a list of such for the first
            layers, its last for all the rest; the family's own by default.
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
        router: dict[str, Any] | list[dict[str, Any]] | None = None,
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
                f"{model.config.model_type} carries a state from token to token, which does not end with a document: "
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
        mean = nats.detach().sum() / targets.clamp(min=1)
        self.log("loss", mean, prog_bar=True, logger=False)
        self.log("train/loss", mean)
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
        targets, size = (batch["labels"] >= 0).sum(), batch["target_bytes"].clamp(min=0).sum()
        sums = torch.stack([nats.sum(), targets.double(), nats[text].sum(), size.double()])
        self.add_to_evaluation(step, sums, (batch["labels"] >= 0).any(1))

    test_step = validation_step

    def evaluated(self, sums: list[float]) -> tuple[dict[str, float], str]:
        """Loss a token, perplexity and bits per byte."""
        nats, targets, text_nats, size = sums
        loss = nats / max(targets, 1)
        # Bits of the text alone: that a document ends is no part of its bytes.
        bits = text_nats / math.log(2) / max(size, 1)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "bits_per_byte": bits}, "bits_per_byte"

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> str:
        """The prompt and what the model makes of it."""
        h, tokenizer = self.hparams, self.trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        return generate(self.model, tokenizer, batch["input_ids"], h["max_new_tokens"], h["temperature"], h["top_p"])

    def on_fit_end(self) -> None:
        """Export model and tokenizer, where asked for."""
        super().on_fit_end()
        if self.hparams["export"] and self.trainer.is_global_zero:
            self.trainer.datamodule.tokenizer.save_pretrained(self.hparams["export"])  # type: ignore[attr-defined]


def check_vocabulary(model: Any, tokenizer: Tokenizer) -> None:
    """Raise ValueError for a tokenizer with more tokens than a model has embeddings."""
    size = model.get_input_embeddings().num_embeddings
    if tokenizer.vocab_size > size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, but the model's vocabulary only {size}")
