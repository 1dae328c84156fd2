"""Text for language models: sources, tokens, sequences of fixed length, batches."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from tasks import labels
from tasks.generation import prompt_ids
from tasks.training import share_of
from zoo.data import Corpus, Loader, Packed, Tokenizer, open_corpus, open_tokenizer, tokenize
from zoo.data.corpus import joined
from zoo.data.mixing import Mixture, in_order
from zoo.data.packing import Sources
from zoo.nearest import unknown


class LanguageData(LightningDataModule):
    """Text, packed into sequences of fixed length.

    Args:
        source: "stdlib" (the running Python's own source, about 12 MB), "hub:NAME" or "hub:NAME:CONFIG" (a Hugging Face
            data set), or text files, folders and glob patterns, one or several. Or several of these by name, such as
            {law: my/law, code: stdlib}: then each name is evaluated by itself too, and its place, from 0, is what
            gates go by that are told a domain, a task or another label.
        tokenizer: "bytes", "bpe:SIZE" (learnt on the training split), or a transformers tokenizer's folder or hub id.
        sequence_length: tokens a sequence.
        batch_size: sequences a batch on each process.
        num_workers: processes that prepare batches.
        seed: of the order in which sequences come; with the epoch it is all the order depends on.
        text_column: where a `.jsonl` file or a hub data set keeps the text.
        prompts: what `predict` continues; where sources have names, lists by these names.
        weights: by the names of sources, how much of the training text is of each, in any unit; by default as much as
            there is of it. An epoch has as many sequences as all sources together: of a source with more than its
            share epochs take what earlier ones did not, one with less is repeated. 0 leaves a source to evaluation.
    """

    def __init__(
        self,
        source: dict[str, str | list[str]] | list[str] | str = "stdlib",
        tokenizer: str = "bytes",
        sequence_length: int = 256,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        text_column: str = "text",
        prompts: dict[str, list[str]] | list[str] | None = None,
        weights: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("sequence_length", sequence_length), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if isinstance(source, Mapping) and not source:
            raise ValueError("source: expected texts by name, got none")
        self.names = list(source) if isinstance(source, Mapping) else []
        if isinstance(prompts, Mapping):
            if not self.names:
                raise ValueError("prompts: expected a list, for only where sources have names do prompts go by them")
            for name in prompts:
                if name not in self.names:
                    raise unknown("source of prompts", name, self.names)
        self.source, self.tokenizer_name, self.text_column = source, tokenizer, text_column
        self.sequence_length, self.batch_size, self.num_workers = sequence_length, batch_size, num_workers
        self.seed, self.prompts = seed, prompts or []
        self.weights = None if weights is None else in_order(weights, self.names)

    @cached_property
    def corpora(self) -> list[Corpus]:
        """The text of each source, by split."""
        sources = self.source.values() if isinstance(self.source, Mapping) else [self.source]
        return [open_corpus(source, self.text_column) for source in sources]

    @property
    def corpus(self) -> Corpus:
        """All text, by split."""
        return joined(dict(zip(self.names, self.corpora))) if self.names else self.corpora[0]

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
            sources = self.source.values() if isinstance(self.source, Mapping) else [self.source]
            if not any(str(source).startswith("hub:") for source in sources):  # opening one of those downloads it
                _ = self.corpora
        elif not self.prompts:
            raise ValueError("nothing to predict: give data.prompts")

    def prepare_data(self) -> None:
        """Tokenize into the cache, on one process only."""
        stage = self.trainer.state.fn if self.trainer else None
        splits = {TrainerFn.VALIDATING: ("val",), TrainerFn.TESTING: ("test",), TrainerFn.PREDICTING: ()}
        for split in splits.get(stage or TrainerFn.FITTING, ("train", "val")):
            for corpus in self.corpora:
                tokenize(corpus, split, self.tokenizer)
        if stage == TrainerFn.FITTING:
            self.packed("train")  # raises what only training would find out after the sanity check

    def packed(self, split: str) -> Packed | Sources:
        """The sequences of a split, of one source each: for training what fills whole ones, else everything."""
        tokens = [tokenize(corpus, split, self.tokenizer) for corpus in self.corpora]
        parts = [Packed(t, self.sequence_length, self.tokenizer.pad, tail=split != "train") for t in tokens]
        if self.weights is not None and split == "train":
            return Mixture(parts, self.weights, self.seed)
        return Sources(parts) if self.names else parts[0]

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
        rows: list[dict[str, Any]] = []
        by_name = self.prompts if isinstance(self.prompts, Mapping) else {None: self.prompts}
        for name, prompts in by_name.items():
            own = {} if name is None else {"source": torch.tensor([self.names.index(name)])}
            rows += [{"prompt": p, "input_ids": prompt_ids(self.tokenizer, p), **own} for p in prompts]
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
        return {"tokenizer": self.tokenizer.fingerprint, "sources": self.names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise ValueError when the checkpoint was trained with another tokenizer, or sources had other numbers."""
        labels.check_sources(self.names, state_dict)
        if state_dict["tokenizer"] != self.tokenizer.fingerprint:
            raise ValueError(
                f"the checkpoint was trained with another tokenizer than {self.tokenizer_name!r} "
                f"of {self.corpus.description}"
            )
