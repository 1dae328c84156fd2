"""Tables in files: columns of CSV and Parquet, read in chunks, so that a table need not fit into memory."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..nearest import unknown

CSV, PARQUET = (".csv", ".tsv", ".csv.gz", ".tsv.gz"), (".parquet", ".pq")
CHUNK_ROWS = 1 << 16
_BLOCK_BYTES = 1 << 23  # of text at a time; a single row must fit


class Chunk(NamedTuple):
    """Some rows of a table: the number of each in its source [B] int64, counted from 0, and columns by name."""

    rows: np.ndarray
    columns: Mapping[str, Any]


class Reader(Protocol):
    """Rows of a table, read a chunk at a time."""

    @property
    def origin(self) -> str:
        """Where they are from."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """What columns there are."""
        ...

    def chunks(self, columns: Sequence[str], size: int = CHUNK_ROWS) -> Iterator[Chunk]:
        """All rows in order, `size` at most at a time, with the named columns only."""
        ...


@dataclass(frozen=True)
class Columns:
    """A table in memory: arrays of one length by name."""

    origin: str
    arrays: Mapping[str, Any]

    @property
    def names(self) -> Sequence[str]:
        """What columns there are."""
        return tuple(self.arrays)

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values()), ()))

    def chunks(self, columns: Sequence[str], size: int = CHUNK_ROWS) -> Iterator[Chunk]:
        """All rows in order, `size` at most at a time, with the named columns only."""
        for at in range(0, len(self), size):
            rows = np.arange(at, min(at + size, len(self)))
            yield Chunk(rows, {name: self.arrays[name][at : at + size] for name in columns})


@dataclass(frozen=True)
class Part:
    """The rows of a reader that `keep` says, which takes row numbers [B] and gives booleans [B]."""

    reader: Reader
    keep: Callable[[np.ndarray], np.ndarray]

    @property
    def origin(self) -> str:
        """Where they are from."""
        return self.reader.origin

    @property
    def names(self) -> Sequence[str]:
        """What columns there are."""
        return self.reader.names

    def chunks(self, columns: Sequence[str], size: int = CHUNK_ROWS) -> Iterator[Chunk]:
        """The chunks of the reader without the rows that are not kept; those with none are left out."""
        from .tables_values import arrow

        for rows, values in self.reader.chunks(columns, size):
            kept = np.flatnonzero(self.keep(rows))
            if len(kept) == len(rows):
                yield Chunk(rows, values)
            elif len(kept):
                yield Chunk(rows[kept], {name: arrow(column).take(kept) for name, column in values.items()})


@dataclass(frozen=True)
class TableFiles:
    """Rows of files, one behind the other; a subclass knows a format, and raises ValueError for a file not in it."""

    paths: tuple[Path, ...]

    @property
    def origin(self) -> str:
        """The file, or the first of several."""
        more = f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else ""
        return f"{self.paths[0]}{more}"

    @cached_property
    def names(self) -> Sequence[str]:
        """Columns of the first file."""
        with _reading(self.paths[0]):
            return self._names(self.paths[0])

    def chunks(self, columns: Sequence[str], size: int = CHUNK_ROWS, skip: int = 0) -> Iterator[Chunk]:
        """All rows in order but the first `skip`, `size` at most at a time; no chunk spans two files."""
        first = 0
        for path in self.paths:
            with _reading(path):
                known = self._names(path)
                for name in columns:
                    if name not in known:
                        raise unknown("column", name, known)
                    if known.count(name) > 1:
                        raise ValueError(f"expected one column {name!r}, got {known.count(name)}")
                # What a file need not decode, it skips itself.
                passed, batches = self._batches(path, list(columns), size, skip)
                first, skip = first + passed, skip - passed
                for table in _sized(batches, size):
                    kept = table.slice(min(skip, len(table)))
                    first, skip = first + len(table) - len(kept), skip - (len(table) - len(kept))
                    if len(kept):
                        numbers = np.arange(first, first + len(kept))
                        first += len(kept)
                        yield Chunk(numbers, {name: kept.column(name) for name in columns})

    def _names(self, path: Path) -> list[str]:
        """Columns of one file."""
        raise NotImplementedError

    def _batches(self, path: Path, columns: list[str], size: int, skip: int) -> tuple[int, Iterable[Any]]:
        """How many of the `skip` first rows were passed over unread, and record batches of those after them."""
        raise NotImplementedError


@dataclass(frozen=True)
class ParquetFiles(TableFiles):
    """Parquet files; columns have the types that the files say."""

    def _names(self, path: Path) -> list[str]:
        import pyarrow.parquet as pq

        return pq.read_schema(path).names

    def _batches(self, path: Path, columns: list[str], size: int, skip: int) -> tuple[int, Iterable[Any]]:
        import pyarrow.parquet as pq

        file = pq.ParquetFile(path)
        passed, groups = 0, list(range(file.num_row_groups))
        while groups and skip - passed >= (count := file.metadata.row_group(groups[0]).num_rows):
            passed += count
            groups.pop(0)
        return passed, file.iter_batches(size, groups, columns)


@dataclass(frozen=True)
class CsvFiles(TableFiles):
    """CSV files with a header or, with `header`, these names; every column is text, as nothing tells its type.

    Quotes mean something unless `quoted` is False. A name that ends in .gz is unpacked while it is read.
    """

    delimiter: str = ","
    header: tuple[str, ...] | None = None
    quoted: bool = True

    def _names(self, path: Path) -> list[str]:
        return list(self.header) if self.header else self._open(path, None).schema.names

    def _batches(self, path: Path, columns: list[str], size: int, skip: int) -> tuple[int, Iterable[Any]]:
        return 0, self._open(path, columns)

    def _open(self, path: Path, columns: list[str] | None) -> Any:
        import pyarrow as pa
        from pyarrow import csv

        if not path.stat().st_size:
            raise ValueError("the file is empty; expected a header line and rows")
        delimiter = "\t" if ".tsv" in path.suffixes else self.delimiter
        return csv.open_csv(
            path,
            csv.ReadOptions(block_size=_BLOCK_BYTES, column_names=self.header),
            csv.ParseOptions(
                delimiter=delimiter, quote_char='"' if self.quoted else False, newlines_in_values=self.quoted
            ),
            csv.ConvertOptions(
                column_types={name: pa.string() for name in columns or ()},
                include_columns=columns,
                strings_can_be_null=False,
            ),
        )


def _sized(batches: Iterable[Any], size: int) -> Iterator[Any]:
    """Record batches as tables of `size` rows and a last one of what is left."""
    import pyarrow as pa

    pending: list[Any] = []
    count = 0
    for batch in batches:
        pending.append(batch)
        count += len(batch)
        while count >= size:
            table = pa.Table.from_batches(pending)
            yield table.slice(0, size)
            pending, count = table.slice(size).to_batches(), count - size
    if count:
        yield pa.Table.from_batches(pending)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Put the name of the file before what pyarrow says is wrong with it."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, ValueError, OSError) as error:
        message = " ".join(str(error).split())
        raise ValueError(message if message.startswith(str(path)) else f"{path}: {message}") from error


def open_files(source: str | Sequence[str]) -> TableFiles:
    """The tables in files, folders (all tables below them) and glob patterns, of CSV or of Parquet.

    Raises FileNotFoundError where there is none, ValueError for both formats at once.
    """
    paths = table_files([source] if isinstance(source, str) else source)
    kinds = {is_parquet(path) for path in paths}
    if len(kinds) > 1:
        raise ValueError(f"{source}: expected files of one format, got CSV and Parquet")
    return ParquetFiles(paths) if kinds.pop() else CsvFiles(paths)


def table_files(sources: Sequence[str]) -> tuple[Path, ...]:
    """The files that sources name, those of a folder or pattern in the order of their names."""
    found: list[Path] = []
    for source in sources:
        path = Path(source).expanduser()
        if path.is_file() and not is_table(path):
            raise ValueError(f"{source} is no table; known are {', '.join(CSV + PARQUET)}")
        inside = [path] if path.is_file() else sorted(path.rglob("*") if path.is_dir() else _glob(path))
        inside = [p for p in inside if is_table(p)]
        if not inside:
            raise FileNotFoundError(
                f"there is no table {source!r} (from {Path.cwd()}); known: {', '.join(CSV + PARQUET)}"
            )
        found += inside
    return tuple(found)


def _glob(pattern: Path) -> list[Path]:
    return [Path(name) for name in glob.glob(str(pattern), recursive=True)]


def is_table(path: Path) -> bool:
    """Whether a file's name is that of a table; those that start with . or _ are a writer's own."""
    return path.name.endswith(CSV + PARQUET) and path.name[0] not in "._" and path.is_file()


def is_parquet(path: Path) -> bool:
    """Whether a file's name is that of a Parquet file."""
    return path.name.endswith(PARQUET)
