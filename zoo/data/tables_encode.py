"""From columns to ids and numbers: what is learnt from the training rows, and how it is applied to any others."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..nearest import unknown
from .tables_columns import Feature, encoded_group, encoded_label, encoded_weight, values_of
from .tables_files import Chunk
from .tables_rows import Jagged, Rows
from .tables_schema import Bag, Categorical, Dense, Schema
from .tables_values import distinct, fnv1a

FILE = "preparation.json"


@dataclass(frozen=True)
class Preparation:
    """How rows of a table become what a model takes.

    schema: with the size of every embedding table. vocabularies: by table, the values with rows 1, 2, ..., the most
    frequent in training first, and those as frequent in the order of their texts. moments: by dense feature that is
    standardised, its mean and deviation in training.
    """

    schema: Schema
    vocabularies: Mapping[str, tuple[str, ...]]
    moments: Mapping[str, tuple[float, float]]

    @classmethod
    def fit(cls, schema: Schema, training: Mapping[str, Any] | Iterable[Chunk]) -> Preparation:
        """Learn from the training rows, given as columns by name or as chunks of them.

        A vocabulary with num_embeddings keeps the most frequent values. Raises ValueError for a column that is not
        there and for values that cannot be encoded, with feature, row and value.
        """
        tables = _tables(schema)
        counts: dict[str, Counter[str]] = {name: Counter() for name, f in tables.items() if f[0].ids == "vocabulary"}
        moments = {f.name: Moments() for f in schema.of(Dense) if "standard" in f.transform}
        for chunk in _chunks(training):
            for f in schema.features:
                if isinstance(f, Dense) and f.name in moments:
                    moments[f.name].add(values_of(f, chunk))
                elif isinstance(f, Categorical) and _table(f) in counts:
                    texts, index = Feature.read(f, chunk)[:2]
                    seen = np.bincount(index, minlength=len(texts)).tolist()
                    # Texts can be equal once the space around them is gone.
                    for word, count in zip(texts, seen):
                        counts[_table(f)][word] += count
        sizes = {
            name: next((f.num_embeddings for f in made if f.num_embeddings), None) for name, made in tables.items()
        }
        vocabularies = {name: _vocabulary(count, sizes[name]) for name, count in counts.items()}
        found = {name: sizes[name] or len(vocabularies[name]) + 1 for name in tables}
        features = tuple(
            replace(f, num_embeddings=found[_table(f)]) if isinstance(f, Categorical) else f for f in schema.features
        )
        return cls(replace(schema, features=features), vocabularies, {n: m.result() for n, m in moments.items()})

    @cached_property
    def _numbers(self) -> dict[str, dict[str, int]]:
        """By table, the row of each value of its vocabulary."""
        # Written as columns are now: one that was saved earlier may say 3.0. The more frequent of two goes last.
        return {
            name: dict(zip(reversed(distinct(list(words))[0]), range(len(words), 0, -1)))
            for name, words in self.vocabularies.items()
        }

    def encode(self, columns: Mapping[str, Any], first_row: int | np.ndarray = 0, labels: bool = True) -> Rows:
        """Columns [B] by name as rows.

        first_row is the number of the first row in the source, or the numbers of all [B]; errors and batches tell it.
        Without `labels` the columns of labels, groups and sample weights are not read: labels are nan then.
        Raises ValueError for a column that is not there and for values that cannot be encoded.
        """
        columns_needed(self.schema, columns, labels)
        size = len(next(iter(columns.values())))
        numbers = np.arange(first_row, first_row + size) if isinstance(first_row, int) else np.asarray(first_row)
        chunk, schema = Chunk(numbers, columns), self.schema
        dense = [self._dense(f, chunk) for f in schema.of(Dense)]
        ids = [self._ids(f, *Feature.read(f, chunk)[:2], chunk.rows) for f in schema.of(Categorical)]
        several = [f for f in schema.features if isinstance(f, Categorical) and type(f) is not Categorical]
        targets = [encoded_label(task, chunk) if labels else np.full(size, np.nan, np.float32) for task in schema.tasks]
        return Rows(
            schema,
            numbers,
            _columns(dense, size, np.float32),
            _columns(ids, size, np.int32),
            {f.name: self._jagged(f, chunk) for f in several},
            _columns(targets, size, np.float32),
            encoded_group(schema.group, chunk) if schema.group and labels else None,
            encoded_weight(schema.weight, chunk) if schema.weight and labels else None,
        )

    def _dense(self, f: Dense, chunk: Chunk) -> np.ndarray:
        values = values_of(f, chunk)
        if f.name in self.moments:
            mean, deviation = self.moments[f.name]
            values = (values - mean) / deviation
        return values.astype(np.float32)

    def _jagged(self, f: Categorical, chunk: Chunk) -> Jagged:
        texts, index, lengths, weights = Feature.read(f, chunk)
        values = self._ids(f, texts, index, np.repeat(chunk.rows, lengths))
        return Jagged(values, np.concatenate([[0], np.cumsum(lengths)]), weights)

    def _ids(self, f: Categorical, texts: list[str], index: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Rows of the embedding table for the values texts[index], each of which is in the row `rows` says."""
        size = f.num_embeddings
        assert size is not None
        if f.ids == "vocabulary":
            known = self._numbers[_table(f)]
            found = np.fromiter((known.get(value, 0) for value in texts), np.int32, len(texts))
        elif f.ids == "hash":
            found = (fnv1a(texts) % np.uint64(size)).astype(np.int32)
        else:
            found = np.fromiter((_index(value, size) for value in texts), np.int32, len(texts))
            if (found < 0).any() and f.out_of_range == "hash":
                hashed = (fnv1a(texts) % np.uint64(size)).astype(np.int32)
                found = np.where(found < 0, hashed, found)
            elif len(bad := np.flatnonzero(found[index] < 0)):
                raise ValueError(
                    f"feature {f.name!r}, row {rows[bad[0]]}: expected an id from 0 to {size - 1}, got "
                    f"{texts[index[bad[0]]]!r} (out_of_range: hash takes any)"
                )
        return found[index]

    def table(self) -> dict[str, Any]:
        """What `read` reads, for a JSON file or a checkpoint."""
        return {
            "schema": self.schema.table(),
            "vocabularies": {name: list(words) for name, words in self.vocabularies.items()},
            "moments": {name: list(values) for name, values in self.moments.items()},
        }

    @classmethod
    def read(cls, table: Mapping[str, Any]) -> Preparation:
        """From what `table` returned."""
        return cls(
            Schema.read(table["schema"]),
            {name: tuple(words) for name, words in table["vocabularies"].items()},
            {name: (values[0], values[1]) for name, values in table["moments"].items()},
        )

    def difference(self, other: Preparation) -> str | None:
        """The name of the first thing in which two differ, such as "vocabulary 'movie'", or None."""
        theirs, ours = self._facts(), other._facts()
        return next((name for name in [*theirs, *ours] if theirs.get(name) != ours.get(name)), None)

    def _facts(self) -> dict[str, Any]:
        schema = self.schema
        facts: dict[str, Any] = {f"feature {f.name!r}": f for f in schema.features}
        facts |= {f"task {task.name!r}": task for task in schema.tasks}
        facts |= {f"vocabulary {name!r}": words for name, words in self.vocabularies.items()}
        facts |= {f"mean and deviation of {name!r}": values for name, values in self.moments.items()}
        return {**facts, "schema": schema}

    def save(self, folder: str | Path) -> None:
        """Write preparation.json into a folder, which is made where there is none."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, FILE).write_text(json.dumps(self.table(), ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Preparation:
        """Read it back; raises FileNotFoundError or ValueError naming what is wrong with the file."""
        path = Path(folder, FILE)
        if not path.is_file():
            raise FileNotFoundError(f"there is no {FILE} in {folder} (from {Path.cwd()})")
        try:
            return cls.read(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not what Preparation.save writes ({type(error).__name__}: {error})") from error


class Moments:
    """Mean and deviation of numbers that come in parts, as exact as of all at once (Chan et al. 1983)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0
        self.least, self.most = math.inf, -math.inf

    def add(self, values: np.ndarray) -> None:
        """Count these numbers too."""
        if not len(values):
            return
        self.least, self.most = min(self.least, float(values.min())), max(self.most, float(values.max()))
        mean, count = float(values.mean()), self.count + len(values)
        delta = mean - self.mean
        self.squares += float(((values - mean) ** 2).sum()) + delta**2 * self.count * len(values) / count
        self.mean += delta * len(values) / count
        self.count = count

    def result(self) -> tuple[float, float]:
        """Mean, and the root of the mean squared distance from it; 1 where all numbers are equal."""
        if self.least == self.most:  # the sum of many equal numbers is rounded, and so would their deviation not be 0
            return self.least, 1.0
        return self.mean, (self.squares / max(self.count, 1)) ** 0.5 or 1.0


def columns_needed(schema: Schema, known: Iterable[str], labels: bool = True) -> list[str]:
    """The columns that encoding reads; raises ValueError naming the nearest where one is not among the known."""
    wanted = [(f.column or f.name, f"feature {f.name!r}") for f in schema.features]
    wanted += [(f.weights, f"weights of feature {f.name!r}") for f in schema.of(Bag) if f.weights]
    if labels:
        wanted += [(task.column or task.name, f"label of task {task.name!r}") for task in schema.tasks]
        wanted += [(name, what) for name, what in ((schema.group, "group"), (schema.weight, "sample weight")) if name]
    names = list(known)
    for name, what in wanted:
        if name not in names:
            raise unknown(f"column ({what})", name, names)
    return list(dict.fromkeys(name for name, _ in wanted))


def _chunks(training: Mapping[str, Any] | Iterable[Chunk]) -> Iterable[Chunk]:
    if not isinstance(training, Mapping):
        return training
    size = len(next(iter(training.values())))
    return [Chunk(np.arange(size), training)]


def _table(f: Categorical) -> str:
    return f.table or f.name


def _tables(schema: Schema) -> dict[str, list[Any]]:
    """Features by the embedding table they look into; raises ValueError where they disagree on what it is like."""
    tables: dict[str, list[Any]] = {}
    for f in schema.features:
        if isinstance(f, Categorical):
            tables.setdefault(_table(f), []).append(f)
    for name, features in tables.items():
        first = features[0]
        for f in features[1:]:
            for key, kept in (("ids", False), ("num_embeddings", True), ("dim", True)):
                ours, theirs = getattr(first, key), getattr(f, key)
                if ours != theirs and not (kept and None in (ours, theirs)):
                    raise ValueError(
                        f"table {name!r}: expected one {key}, got {ours!r} from feature {first.name!r} and {theirs!r} "
                        f"from {f.name!r}"
                    )
    return tables


def _vocabulary(counts: Counter[str], size: int | None) -> tuple[str, ...]:
    words = sorted(counts, key=lambda word: (-counts[word], word))
    return tuple(words if size is None else words[: size - 1])


def _index(value: str, size: int) -> int:
    """The number that a text is, or -1 where it is none from 0 to size - 1."""
    number = int(value) if value.isdecimal() else -1
    return number if number < size else -1


def _columns(parts: list[np.ndarray], size: int, kind: type) -> np.ndarray:
    return np.stack(parts, 1, dtype=kind, casting="same_kind") if parts else np.zeros((size, 0), kind)
