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
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import zoo
from tasks.balance import LayerBalance
from tasks.callbacks import ExactResume, Throughput
from tasks.generation import generate, prompt_ids
from tasks.optim import learning_rate, parameter_groups
from zoo.data import Corpus, Loader, Packed, Tokenizer, flash_lengths, open_corpus, open_tokenizer, tokenize


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
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
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


class LanguageTask(LightningModule):
    """A causal language model, its loss and optimizer, and what to log.

    Args:
        network: the name of a model of ours ("language/mixtral_tiny", see `zoo models`), or a module.
        pretrained: a folder or hub repository to start from instead.
        overrides: fields of the model's configuration to change, or keywords of `zoo.from_pretrained`.
        router: the gate of every MoE layer, {"class_path": ..., "init_args": {...}}; the family's own by default.
        losses: auxiliary losses by name with their weights, such as {"switch": 0.01, "z": 0.001}.
        vocab_size: of a model made by name; the tokenizer's by default.
        lr: peak learning rate.
        schedule: after warm-up "cosine", "wsd" (stable, then a linear decay) or "constant".
        warmup_steps: steps of linear warm-up.
        schedule_steps: where the schedule ends; the trainer's number of steps by default.
        decay_fraction: the share of the steps in which "wsd" decays.
        min_lr_ratio: the learning rate at the end, as a share of the peak.
        weight_decay: of AdamW, on matrices; norms, biases and embeddings do not decay.
        decay_router: whether gates decay.
        betas: of AdamW.
        activation_checkpointing: recompute layers in backward instead of keeping what they computed.
        compile: run the model through torch.compile.
        export: a folder that gets model and tokenizer in the family's published layout when training ends.
        max_new_tokens: length of what `predict` generates.
        temperature: 0 takes the likeliest token.
        top_p: sample from the likeliest tokens that have this probability together.
    """

    def __init__(
        self,
        network: str | nn.Module = "language/mixtral_tiny",
        pretrained: str | None = None,
        overrides: dict[str, Any] | None = None,
        router: dict[str, Any] | None = None,
        losses: dict[str, Any] | None = None,
        vocab_size: int | None = None,
        lr: float = 1e-3,
        schedule: Literal["cosine", "wsd", "constant"] = "cosine",
        warmup_steps: int = 100,
        schedule_steps: int | None = None,
        decay_fraction: float = 0.2,
        min_lr_ratio: float = 0.1,
        weight_decay: float = 0.1,
        decay_router: bool = True,
        betas: tuple[float, float] = (0.9, 0.95),
        activation_checkpointing: bool = False,
        compile: bool = False,
        export: str | None = None,
        max_new_tokens: int = 200,
        temperature: float = 0.8,
        top_p: float = 0.95,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["network"] if isinstance(network, nn.Module) else [])
        self.network, self.overrides = network, dict(overrides or {})
        self.model: Any = network if isinstance(network, nn.Module) else None
        if pretrained and router is not None:
            raise ValueError("router: a pretrained model keeps its own gates; losses can be given")
        if export and Path(export).exists() and any(Path(export).iterdir()):
            raise ValueError(f"export: {export} exists and is not empty")
        self._compiled = False
        self._sums: Tensor | None = None
        self._balance = LayerBalance()

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

    def check(self) -> None:
        """Build the model without memory: raises what is wrong with the arguments before any work is done."""
        if self.model is None and not self.hparams["pretrained"]:
            with torch.device("meta"):
                self.build()
        learning_rate(self.hparams["schedule"], self.hparams["warmup_steps"], 1)

    def configure_model(self) -> None:
        """Build the model once the tokenizer is known; Lightning calls this."""
        trainer = self._trainer
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        if self.model is None:
            if tokenizer is not None and self.hparams["vocab_size"] is None:
                self.hparams["vocab_size"] = self.overrides.get("vocab_size", tokenizer.vocab_size)
            self.model = self.build()
        size = self.model.get_input_embeddings().num_embeddings
        if tokenizer is not None and tokenizer.vocab_size > size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, but the model's vocabulary only {size}")
        self.model.train()
        if self.hparams["activation_checkpointing"]:
            with warnings.catch_warnings():
                # Its successor is younger than the oldest transformers that we run on.
                warnings.simplefilter("ignore", FutureWarning)
                self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.hparams["compile"] and not self._compiled and trainer is not None and not trainer.predicting:
            self.model.compile()
            self._compiled = True

    def configure_callbacks(self) -> list[Callback]:
        """Exact resumption, throughput, and export where asked for."""
        return [ExactResume(), Throughput()]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the data object first: with another tokenizer the weights' shapes would fail less clearly."""
        data = getattr(self._trainer, "datamodule", None)
        if isinstance(data, LanguageData) and "LanguageData" in checkpoint:
            data.load_state_dict(checkpoint["LanguageData"])

    def configure_optimizers(self) -> Any:
        """AdamW with two parameter groups, and the schedule a step at a time."""
        h = self.hparams
        steps = h["schedule_steps"] or self.trainer.estimated_stepping_batches
        factor = learning_rate(h["schedule"], h["warmup_steps"], steps, h["min_lr_ratio"], h["decay_fraction"])
        groups = parameter_groups(self.model, h["weight_decay"], h["decay_router"])
        optimizer = torch.optim.AdamW(groups, lr=h["lr"], betas=tuple(h["betas"]), fused=True)
        # It could unscale fp16 gradients itself, but Lightning then refuses to clip them; let Lightning unscale.
        optimizer._step_supports_amp_scaling = False
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then move selection biases: once a step, however many micro-batches it had."""
        super().optimizer_step(*args, **kwargs)
        zoo.moe.balance.update_biases(self.model)

    def nats(self, batch: dict[str, Tensor]) -> Tensor:
        """Negative log-likelihood of every target of a packed batch, [B, S] float32, zero where there is none."""
        # No attention mask and no cache: then positions that start again mark where documents begin.
        positions = batch["position_ids"]
        flash = "flash" in str(self.model.config._attn_implementation)
        lengths = flash_lengths(positions) if flash else {}
        logits = self.model(input_ids=batch["input_ids"], position_ids=positions, use_cache=False, **lengths).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten(), reduction="none").view_as(
            batch["labels"]
        )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean negative log-likelihood plus auxiliary losses."""
        with zoo.moe.record(self.model) as step:
            nats = self.nats(batch)
        targets = (batch["labels"] >= 0).sum()
        # Divide by the number of places, not of targets: then every target weighs the same in whatever micro-batch and
        # on whatever process it is, and accumulation and data parallelism give the gradient of the whole batch.
        loss = nats.sum() / nats.numel()
        for name, value in step.losses().items():
            loss = loss + value
            self.log(f"train/loss_{name}", value.detach())
        mean = nats.detach().sum() / targets.clamp(min=1)
        self.log("loss", mean, prog_bar=True, logger=False)
        self.log("train/loss", mean)
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            balance = LayerBalance()
            balance.update(step)
            self._log_balance("train", balance, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add to the sums of an evaluation."""
        with zoo.moe.record(self.model) as step:
            nats = self.nats(batch).double()
        self._balance.update(step)
        text = batch["target_bytes"] >= 0
        targets, size = (batch["labels"] >= 0).sum(), batch["target_bytes"].clamp(min=0).sum()
        sums = torch.stack([nats.sum(), targets.double(), nats[text].sum(), size.double()])
        self._sums = sums if self._sums is None else self._sums + sums

    test_step = validation_step

    def on_validation_epoch_start(self) -> None:
        """Start the sums anew."""
        self._sums, self._balance = None, LayerBalance()

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        """Log loss a token, perplexity, bits per byte, and balance."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log loss a token, perplexity, bits per byte, and balance."""
        self._log_evaluation("test")

    def _log_evaluation(self, stage: str) -> None:
        assert self._sums is not None
        sums = self.trainer.strategy.reduce(self._sums, reduce_op="sum")
        nats, targets, text_nats, size = sums.tolist()
        loss = nats / max(targets, 1)
        # Bits of the text alone: that a document ends is no part of its bytes.
        bits = text_nats / math.log(2)
        # All processes have the same sums by now; sync_dist keeps Lightning from warning that they might not.
        self.log(f"{stage}/loss", loss, sync_dist=True)
        self.log(f"{stage}/perplexity", math.exp(min(loss, 700.0)), sync_dist=True)
        self.log(f"{stage}/bits_per_byte", bits / max(size, 1), prog_bar=True, sync_dist=True)
        self._log_balance(stage, self._balance)

    def _log_balance(self, stage: str, balance: LayerBalance, prog_bar: bool = False) -> None:
        layers = balance.compute()
        for layer, figures in layers.items():
            named = {f"{stage}/{figure}/{layer}": value for figure, value in figures.items()}
            self.log_dict(named, sync_dist=stage != "train")
        if layers:
            worst = max(figures["load_max"] for figures in layers.values())
            self.log("balance", worst, prog_bar=prog_bar, logger=False, sync_dist=stage != "train")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> str:
        """The prompt and what the model makes of it."""
        h, tokenizer = self.hparams, self.trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        return generate(self.model, tokenizer, batch["input_ids"], h["max_new_tokens"], h["temperature"], h["top_p"])

    def on_fit_end(self) -> None:
        """Export, where asked for."""
        if self.hparams["export"] and self.trainer.is_global_zero:
            zoo.save_pretrained(self.model, self.hparams["export"])
            self.trainer.datamodule.tokenizer.save_pretrained(self.hparams["export"])  # type: ignore[attr-defined]
