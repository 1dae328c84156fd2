"""Predictions for a long table as a folder of Parquet parts, which grows by whole parts and can be taken up again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

MANIFEST = "_manifest.json"  # readers of Parquet folders pass over names that start with _
ROW = "row"
Array = np.ndarray[Any, np.dtype[Any]]


class Parts:
    """part-00000.parquet, part-00001.parquet, ... in a folder: part p has rows p R .. (p + 1) R - 1 of the input.

    Each has a column `row` and one of float32 a prediction, and is written under another name and renamed when whole.
    A manifest tells what the predictions are of (`about`: model, input, whatever must be the same) and, in the end, how
    many rows there are. One process writes.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        names: Sequence[str],
        about: Mapping[str, Any],
        rows_per_part: int = 100_000,
    ) -> None:
        if rows_per_part < 1:
            raise ValueError(f"rows_per_part must be at least 1, got {rows_per_part}")
        if ROW in names:
            raise ValueError(f"predictions have a column {ROW!r} of their own; expected another name for this task")
        self.folder, self.names, self.size = Path(folder).expanduser(), list(names), rows_per_part
        self._manifest = {"columns": [ROW, *names], "rows_per_part": rows_per_part, **about}
        self._there: Array = np.zeros(0, np.int64)
        self._pending: list[dict[str, Array]] = []
        self._count = 0

    def start(self) -> int | None:
        """Make or take up the folder; the number of rows where all are there already.

        Raises ValueError for a folder that holds something else or predictions of something else.
        """
        path, found = self.folder / MANIFEST, {}
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            theirs, rows = {name: value for name, value in found.items() if name != "rows"}, found.get("rows")
            # Through JSON and back, so that tuples compare as the lists they become.
            ours = json.loads(json.dumps(self._manifest))
            if theirs != ours:
                name = next(n for n in [*ours, *theirs] if theirs.get(n) != ours.get(n))
                raise ValueError(
                    f"predictions: {self.folder} holds predictions made with another {name.replace('_', ' ')} "
                    f"({_short(theirs.get(name))} there, {_short(ours.get(name))} here); name another folder"
                )
            return rows
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ValueError(f"predictions: {self.folder} exists and holds no predictions; name another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_manifest(None)
        return None

    def take_up(self) -> int:
        """See which parts are there; the number of the first row that is left."""
        numbers = {int(path.stem.removeprefix("part-")) for path in self.folder.glob("part-*.parquet")}
        self._there = np.array(sorted(numbers), np.int64)
        return next(part for part in count() if part not in numbers) * self.size

    def wanted(self, rows: Array) -> Array:
        """Which of the rows [B] are left to predict."""
        return ~np.isin(rows // self.size, self._there)

    def add(self, rows: Array, predictions: Mapping[str, Array]) -> None:
        """Predictions [B] of rows that are wanted, in order; a part is written as soon as it is whole."""
        columns = {ROW: rows, **{name: np.asarray(predictions[name], np.float32) for name in self.names}}
        part = rows // self.size
        edges = [0, *(np.flatnonzero(part[1:] != part[:-1]) + 1).tolist(), len(rows)]
        for start, stop in pairwise(edges):
            if start < stop:
                self._pending.append({name: values[start:stop] for name, values in columns.items()})
                self._count += stop - start
                if self._count == self.size:
                    self._write()

    def finish(self) -> None:
        """Write the last part, which may be shorter: all rows of the input have been added."""
        if self._count:
            self._write()

    def close(self) -> int:
        """Mark the folder as whole, after `finish`; the number of rows."""
        import pyarrow.parquet as pq

        paths = sorted(self.folder.glob("part-*.parquet"))
        rows = [pq.read_metadata(path).num_rows for path in paths]
        if [p.name for p in paths] != [_name(i) for i in range(len(paths))] or any(n != self.size for n in rows[:-1]):
            raise RuntimeError(f"predictions: parts are missing in {self.folder}")
        self._write_manifest(sum(rows))
        return sum(rows)

    def _write(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {name: np.concatenate([piece[name] for piece in self._pending]) for name in [ROW, *self.names]}
        self._pending, self._count = [], 0
        number = int(columns[ROW][0]) // self.size
        expected = number * self.size + np.arange(len(columns[ROW]))
        if not np.array_equal(columns[ROW], expected):
            raise RuntimeError(f"predictions: part {number} was given other rows than its own")
        path = self.folder / _name(number)
        draft = path.with_name(f".{path.name}.partial")
        pq.write_table(pa.table(columns), draft)
        draft.replace(path)

    def _write_manifest(self, rows: int | None) -> None:
        path = self.folder / MANIFEST
        draft = path.with_name(f".{path.name}.partial")
        draft.write_text(json.dumps({**self._manifest, "rows": rows}, indent=2) + "\n", encoding="utf-8")
        draft.replace(path)


def input_files(paths: Sequence[Path]) -> list[list[Any]]:
    """What tells files from others without reading them: name, bytes and time of the last change."""
    return [[path.name, (stat := path.stat()).st_size, stat.st_mtime_ns] for path in paths]


def fingerprint(model: Any, preparation: Any) -> str:
    """What tells a model from others: a hash of all its tensors, and of how the rows are prepared for it."""
    digest = hashlib.sha256(json.dumps(preparation.table(), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.numel():
            flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(flat.numpy().data)
    return digest.hexdigest()


def _name(number: int) -> str:
    return f"part-{number:05d}.parquet"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."
