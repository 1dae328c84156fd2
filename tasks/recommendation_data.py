"""What recommendation models are trained and evaluated on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from tasks.training import share_of
from zoo.data import Loader
from zoo.data.tables import KNOWN, Preparation, Rows, Table, open_files, open_table
from zoo.data.tables_batch import TableBatch
from zoo.data.tables_schema import Schema
from zoo.data.tables_stream import Stream
from zoo.parallel import checkpoint as store


class RecommendationData(LightningDataModule):
    """Rows of a table, their features and labels.

    Args:
        source: "synthetic" (the MMoE paper's two regression tasks), "census:income", "census:education", "movielens",
            "criteo", "aliccp", or CSV or Parquet files, folders and patterns; a folder may have folders or files called
            train, val and test.
        schema: what the columns of files mean: features and tasks by name, or a YAML file with them.
        options: arguments of a known data set, such as {correlation: 0.9, rows: 100000} of "synthetic".
        batch_size: rows a batch on each process.
        num_workers: processes that put batches together.
        seed: of the order of rows; with the epoch it is all the order depends on.
        held_out: the share of the rows for val and for test, where the source has no such split.
        root: where known data sets lie.
        download: whether a known data set may be fetched, where its licence allows it.
        preparation: a folder with the preparation.json of a trained model, whose vocabularies and means to use; learnt
            from the rows to train on by default.
        input: files, folders and patterns that `predict` scores; they need no labels.
    """

    def __init__(
        self,
        source: str | list[str] = "synthetic",
        schema: dict[str, Any] | str | None = None,
        options: dict[str, Any] | None = None,
        batch_size: int = 1024,
        num_workers: int = 0,
        seed: int = 0,
        held_out: float = 0.1,
        root: str = "data",
        download: bool = False,
        preparation: str | None = None,
        input: str | list[str] | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.source, self.given_schema, self.options = source, schema, dict(options or {})
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.held_out, self.root, self.download = held_out, root, download
        self.input = input
        self._preparation = Preparation.load(preparation) if preparation else None
        self._rows: dict[str, Rows] = {}

    @cached_property
    def table(self) -> Table:
        """The rows by split; none is read yet."""
        schema: Any = self.given_schema
        if schema is None and self._preparation is not None and self.source not in list(KNOWN):
            schema = self._preparation.schema
        return open_table(
            self.source, schema, root=self.root, download=self.download, held_out=self.held_out, **self.options
        )

    @property
    def preparation(self) -> Preparation:
        """How rows are encoded; learnt from the rows to train on when first asked for, unless it was given."""
        if self._preparation is None:
            self._preparation = self.table.fit()
        return self._preparation

    @preparation.setter
    def preparation(self, given: Preparation) -> None:
        self._preparation = given
        self._rows.clear()

    @property
    def schema(self) -> Schema:
        """Features and tasks, with the size of every embedding table."""
        return self.preparation.schema

    def adopt(self, theirs: Preparation, whose: str) -> None:
        """Encode rows as a trained model does; raises ValueError when they were prepared in another way already."""
        if self._preparation is None:
            self.preparation = theirs
        elif differ := theirs.difference(self._preparation):
            raise ValueError(f"{whose} was trained on other data than {self.source}: its {differ} differs")

    def check(self, subcommand: str) -> None:
        """Raise what is wrong with the arguments, as far as it shows in the names of columns."""
        if subcommand == "predict":
            if not self.input:
                raise ValueError("nothing to predict: give data.input")
            self._stream(0).check()
        elif not self.download:  # opening would fetch the data
            self.table.check()
            self.table.split({"fit": "train", "validate": "val"}.get(subcommand, subcommand))
            if self._preparation is not None and (differ := self.table.schema.difference(self._preparation.schema)):
                raise ValueError(f"{self.source} has another schema than the trained model: its {differ} differs")

    def encode_rows(self, subcommand: str, validate: bool) -> None:
        """Encode what a subcommand will need, so that a value that cannot be shows before any work is done."""
        splits = {"fit": ["train", *(["val"] if validate else [])], "validate": ["val"]}
        if subcommand == "fit" and validate and "val" not in self.table.splits:
            raise ValueError(
                f"{self.source} has no rows to val on: set data.held_out above 0, or trainer.limit_val_batches to 0"
            )
        for split in splits.get(subcommand, [subcommand]):
            self.rows(split)

    def prepare_data(self) -> None:
        """Fetch what is to be fetched, on one process only, and say what there is."""
        stage = self.trainer.state.fn if self.trainer else None
        if self.download or stage == TrainerFn.FITTING:
            print(f"table: {self.table.description}", flush=True)

    def rows(self, split: str) -> Rows:
        """All rows of "train", "val" or "test", encoded, in memory."""
        if split not in self._rows:
            self._rows[split] = self.table.encode(split, self.preparation)
        return self._rows[split]

    def train_dataloader(self) -> Loader:
        """Shuffled batches that can be taken up again in the middle of an epoch."""
        return self._loader("train")

    def val_dataloader(self) -> Loader:
        """Every row of the validation split once."""
        return self._loader("val")

    def test_dataloader(self) -> Loader:
        """Every row of the test split once."""
        return self._loader("test")

    def predict_dataloader(self) -> Iterable[TableBatch]:
        """Every row of the input that is left to predict, in order, read as it is needed."""
        task: Any = getattr(self.trainer, "lightning_module", None)
        done = task.first_row(open_files(self.input or []).paths) if hasattr(task, "first_row") else 0
        return _Told(self._stream(done))

    def _stream(self, skip: int) -> Stream:
        trainer = self.trainer
        return Stream(
            open_files(self.input or []),
            self.preparation,
            self.batch_size,
            skip,
            **share_of(trainer),
        )

    def _loader(self, split: str) -> Loader:
        trainer = self.trainer
        return Loader(
            self.rows(split),
            self.batch_size,
            shuffle=split == "train",
            seed=self.seed,
            **share_of(trainer),
            num_workers=self.num_workers,
        )

    def state_dict(self) -> dict[str, Any]:
        """How the rows of a checkpoint's model are encoded."""
        return {"preparation": self.preparation.table()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Encode rows as the checkpoint does; raises ValueError when the data was already prepared in another way."""
        self.adopt(Preparation.read(state_dict["preparation"]), "the checkpoint")


@dataclass(frozen=True)
class _Told:
    """A stream in which a value that cannot be encoded is the user's mistake, not ours."""

    stream: Stream

    def __iter__(self) -> Iterator[TableBatch]:
        from tasks.lightning_cli import ArgumentMistake

        try:
            yield from self.stream
        except ValueError as error:
            raise ArgumentMistake(str(error)) from error


def of_checkpoint(path: str) -> Preparation:
    """How the rows of a checkpoint's model are encoded, a file or a folder of parts; ValueError for something else."""
    place = store.found(Path(path))
    file = place / store.META if place.is_dir() else place
    content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    name = RecommendationData.__qualname__
    if name not in content:
        raise ValueError(f"{path} is no checkpoint of a recommendation model: it has no {name}")
    return Preparation.read(content[name]["preparation"])
