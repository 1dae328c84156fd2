"""Criteo's click logs, one terabyte of 24 days or the Kaggle challenge, with the column names of torchrec's reader."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .tables_files import CHUNK_ROWS, Chunk, CsvFiles, Part
from .tables_schema import Categorical, Dense, Schema, Target
from .tables_split import HELD_OUT, Table, between, held_out_of

PARTS = ("dense", "sparse", "labels")


def criteo_schema(num_embeddings: int = 100_000, logarithms: bool = False) -> Schema:
    """13 numbers, 26 hashed categories and the task click; logarithms are taken unless the data holds them."""
    labels, numbers, categories = _names()
    dense = [Dense(name, transform="none" if logarithms else "log", missing=0.0) for name in numbers]
    sparse = [Categorical(name, num_embeddings=num_embeddings, ids="hash") for name in categories]
    return Schema((*dense, *sparse), (Target("click", labels[0]),))


def criteo_table(root: str = "data", num_embeddings: int = 100_000, held_out: float = HELD_OUT) -> Table:
    """The days in `root`: train on all but the last, validate and test on halves of that; a share of a single one.

    A day is the three files that torchrec.datasets.criteo's BinaryCriteoUtils.tsv_to_npys writes (day_0_dense.npy,
    _sparse and _labels; its numbers are logarithms already, and the first half of the last day is for validation, as
    in torchrec), or the original lines separated by tabs (day_0, day_0.gz or day_0.tsv; train.txt of the challenge),
    where a hash of its number puts a row of the last day into either half. The licence lets nobody hand on the files.
    Raises FileNotFoundError where there is none.
    """
    folder = Path(root).expanduser()
    binary = [CriteoDay(path.with_name(path.name.removesuffix("_dense.npy"))) for path in _days(folder, r"_dense\.npy")]
    lines = _days(folder, r"(\.tsv)?(\.gz)?")
    if not binary and not lines and (challenge := folder / "train.txt").is_file():
        lines = [challenge]
    if not binary and not lines:
        raise FileNotFoundError(
            f"there is no day_N_dense.npy, day_N (or .tsv, .gz) or train.txt in {root!r} (from {Path.cwd()}); get "
            "the logs from Criteo"
        )
    schema = criteo_schema(num_embeddings, logarithms=bool(binary))
    splits: dict[str, Any]
    if binary:
        last = len(binary[-1])
        splits = {"train": Days(tuple(binary[:-1]))}
        splits |= {"val": binary[-1].rows(0, last - last // 2), "test": binary[-1].rows(last - last // 2, last)}
        whole: Any = Days(tuple(binary))
    else:
        whole, final = _lines(lines), _lines(lines[-1:])
        splits = {"train": _lines(lines[:-1] or lines)}
        splits |= {"val": Part(final, partial(between, 0.0, 0.5)), "test": Part(final, partial(between, 0.5, 1.0))}
    several = len(binary or lines) > 1
    return Table(
        f"Criteo's click logs in {root}", schema, splits if several else held_out_of({"train": whole}, held_out)
    )


@dataclass(frozen=True)
class CriteoDay:
    """A day that torchrec preprocessed, read from disk as needed: rows start to stop of its arrays."""

    path: Path
    start: int = 0
    stop: int | None = None

    @property
    def origin(self) -> str:
        """What its files' names begin with."""
        return str(self.path)

    @property
    def names(self) -> Sequence[str]:
        """The label, numbers and categories."""
        return [name for names in _names() for name in names]

    def __len__(self) -> int:
        return len(range(*slice(self.start, self.stop).indices(len(self._arrays()["labels"]))))

    def rows(self, start: int, stop: int) -> CriteoDay:
        """Some rows of the day."""
        return CriteoDay(self.path, start, stop)

    def chunks(self, columns: Sequence[str], size: int = CHUNK_ROWS) -> Iterator[Chunk]:
        """All rows in order, `size` at most at a time, with the named columns only."""
        arrays, (labels, numbers, categories) = self._arrays(), _names()
        where = {labels[0]: ("labels", 0)}
        where |= {name: ("dense", i) for i, name in enumerate(numbers)}
        where |= {name: ("sparse", i) for i, name in enumerate(categories)}
        for at in range(self.start, self.start + len(self), size):
            stop = min(at + size, self.start + len(self))
            read = {part: np.asarray(arrays[part][at:stop]) for part in PARTS}
            found = {name: np.ascontiguousarray(read[where[name][0]][:, where[name][1]]) for name in columns}
            yield Chunk(np.arange(at, stop), found)

    def _arrays(self) -> Mapping[str, np.ndarray]:
        names = {part: self.path.with_name(f"{self.path.name}_{part}.npy") for part in PARTS}
        for name in names.values():
            if not name.is_file():
                raise FileNotFoundError(f"there is no {name}, which belongs to {self.path.name}")
        arrays = {part: np.load(name, mmap_mode="r") for part, name in names.items()}
        widths = {part: len(columns) for part, columns in zip(("labels", "dense", "sparse"), _names())}
        for part, array in arrays.items():
            if array.ndim != 2 or array.shape[1] != widths[part]:
                raise ValueError(f"{names[part]}: expected {widths[part]} columns, got an array of {array.shape}")
        return arrays


@dataclass(frozen=True)
class Days:
    """Days one behind the other."""

    days: tuple[CriteoDay, ...]

    @property
    def origin(self) -> str:
        """The first and the last."""
        return f"{self.days[0].origin} to {self.days[-1].path.name}"

    @property
    def names(self) -> Sequence[str]:
        """The label, numbers and categories."""
        return self.days[0].names

    def chunks(self, columns: Sequence[str], size: int = CHUNK_ROWS) -> Iterator[Chunk]:
        """All rows in order, `size` at most at a time, with the named columns only."""
        first = 0
        for day in self.days:
            for rows, values in day.chunks(columns, size):
                yield Chunk(rows + first, values)
            first += len(day)


def _names() -> tuple[list[str], list[str], list[str]]:
    from torchrec.datasets.criteo import DEFAULT_CAT_NAMES, DEFAULT_INT_NAMES, DEFAULT_LABEL_NAME

    return [DEFAULT_LABEL_NAME], DEFAULT_INT_NAMES, DEFAULT_CAT_NAMES


def _lines(paths: Sequence[Path]) -> CsvFiles:
    header = tuple(name for names in _names() for name in names)
    return CsvFiles(tuple(paths), delimiter="\t", header=header, quoted=False)


def _days(folder: Path, ending: str) -> list[Path]:
    """Files day_0, day_1, ... with an ending, in the order of their numbers; the shortest name where a day has two."""
    found: dict[int, Path] = {}
    for path in sorted(folder.glob("day_*"), key=lambda path: -len(path.name)):
        if match := re.fullmatch(rf"day_(\d+){ending}", path.name):
            found[int(match[1])] = path
    return [found[day] for day in sorted(found)]
