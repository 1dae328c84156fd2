"""Where text comes from: the standard library of the running Python, local files, or a hub data set.

A corpus is a list of documents with keys. Documents go to train, val or test by a hash of their key, so a split never
depends on the machine, on file order or on a seed.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

SPLITS = ("train", "val", "test")
HELD_OUT = 0.05  # of the documents, for val and for test each
FEW = 20  # fewer documents than this are cut in three instead of being dealt out whole

# Not part of every installation, or written for the machine at hand.
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib-dynload"}


@dataclass(frozen=True)
class Corpus:
    """Documents by split; `description` says what it is, `fingerprint` changes when the text does."""

    description: str
    fingerprint: str
    documents: Callable[[str], Iterator[str]]


def open_corpus(source: str | Sequence[str] = "stdlib", text_column: str = "text") -> Corpus:
    """Open "stdlib", "hub:NAME" or "hub:NAME:CONFIG", or files, folders and glob patterns (one or several).

    A `.jsonl` file holds one document a line, under `text_column`; any other file is one document. Folders and patterns
    leave out files with zero bytes, which are not text. Raises FileNotFoundError when a pattern matches nothing,
    ValueError when a file named by itself is not text, ConnectionError when the hub cannot be reached.
    """
    if source == "stdlib":
        return stdlib()
    if isinstance(source, str) and source.startswith("hub:"):
        return hub(source.removeprefix("hub:"), text_column)
    return local([source] if isinstance(source, str) else list(source), text_column)


def joined(corpora: Mapping[str, Corpus]) -> Corpus:
    """Several corpora by name as one, one after another."""

    def documents(split: str) -> Iterator[str]:
        for corpus in corpora.values():
            yield from corpus.documents(split)

    described = "; ".join(f"{name}: {corpus.description}" for name, corpus in corpora.items())
    return Corpus(described, _digest(*(corpus.fingerprint for corpus in corpora.values())), documents)


def stdlib() -> Corpus:
    """The Python source of the running interpreter's standard library, tests excluded (about 12 MB)."""
    root = Path(sysconfig.get_path("stdlib"))
    files = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in _NOT_STDLIB and not s.startswith("config-")]
        for name in names:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = Path(folder, name)
                files[path.relative_to(root).as_posix()] = path
    if not files:
        raise FileNotFoundError(f"this Python has no standard library source under {root}; name your own files")
    size = sum(path.stat().st_size for path in files.values())
    return _from_files(
        files,
        f"source of Python {platform.python_version()}'s standard library: {len(files)} files, {size} bytes",
        "text",
    )


def local(patterns: Sequence[str], text_column: str = "text") -> Corpus:
    """Files, folders (all text files below them) and glob patterns; a file that several of them mean is read once."""
    files: dict[str, Path] = {}
    known: set[Path] = set()
    for pattern in patterns:
        found = _match(pattern)
        if not found:
            raise FileNotFoundError(f"no text file matches {pattern!r} (from {Path.cwd()})")
        for key, path in found:
            if (real := path.resolve()) not in known:
                known.add(real)
                # Files of one name, in two folders, are numbered in the order in which they are named.
                files[next(k for k in _numbered(key) if k not in files)] = path
    size = sum(path.stat().st_size for path in files.values())
    return _from_files(files, f"{', '.join(patterns)}: {len(files)} files, {size} bytes", text_column)


def hub(name: str, text_column: str = "text") -> Corpus:
    """A Hugging Face data set, "NAME" or "NAME:CONFIG"; its own splits where it has them, else by hash."""
    import datasets

    path, _, config = name.partition(":")
    try:
        data = datasets.load_dataset(path, config or None)
    except Exception as error:
        raise ConnectionError(f"data set {name!r} could not be loaded: {error}") from error
    for split, rows in data.items():
        if text_column not in rows.column_names:
            raise ValueError(
                f"data set {name!r}, split {split!r}: no column {text_column!r}; it has {', '.join(rows.column_names)}"
            )
    own = {"val": next((s for s in ("validation", "valid", "val", "dev") if s in data), None)}
    own["test"] = "test" if "test" in data else None

    def documents(split: str) -> Iterator[str]:
        given = own.get(split)
        if given:
            yield from data[given][text_column]
            return
        held_out = {s for s, theirs in own.items() if theirs is None}
        for i, text in enumerate(data["train"][text_column]):
            # What the data set does not hold out itself comes out of its training split.
            home = split_of(str(i))
            if (home if home in held_out else "train") == split:
                yield text

    prints = ",".join(f"{s}:{rows._fingerprint}" for s, rows in data.items())
    count = sum(len(rows) for rows in data.values())
    return Corpus(f"data set {name}: {count} documents", _digest(prints, text_column), documents)


def split_of(key: str) -> str:
    """The split a document belongs to, from a hash of its key alone."""
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return "val" if place < HELD_OUT else "test" if place < 2 * HELD_OUT else "train"


def _from_files(files: dict[str, Path], description: str, text_column: str) -> Corpus:
    """A corpus of files by key.

    Few documents, or none whose key falls to one of the splits, are cut in three: one file is enough to train and test.
    """
    order = sorted(files)
    stats = [(key, files[key].stat().st_size, files[key].stat().st_mtime_ns) for key in order]

    def everything() -> Iterator[tuple[str, str]]:
        for key in order:
            yield from _read(key, files[key], text_column)

    homes: set[str] = set()
    for number, (key, _) in enumerate(everything(), 1):
        homes.add(split_of(key))
        if number >= FEW and len(homes) == len(SPLITS):
            few = False
            break
    else:
        few = True

    def documents(split: str) -> Iterator[str]:
        for key, text in everything():
            if few:
                yield _cut(text)[SPLITS.index(split)]
            elif split_of(key) == split:
                yield text

    return Corpus(description, _digest(json.dumps(stats), text_column), documents)


def _read(key: str, path: Path, text_column: str) -> Iterator[tuple[str, str]]:
    if path.suffix.lower() != ".jsonl":
        yield key, _decoded(path.read_bytes(), path)
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):  # as json_lines has them, one at a time
            text = _decoded(line, path)
            if not text.strip():
                continue
            try:
                found = json.loads(text)[text_column]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected a JSON object with {text_column!r}: {error}"
                ) from error
            if not isinstance(found, str | None):
                raise ValueError(f"{path}, line {number}: expected text in {text_column!r}, got {type(found).__name__}")
            if found:
                # JSON can spell halves of a character alone, which no encoding of text has.
                yield f"{key}:{number}", found.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _decoded(text: bytes, path: Path) -> str:
    """UTF-8, without a byte order mark; warns where it is another encoding, of which letters are lost."""
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = f"byte {error.start} is {text[error.start]:#x}"
        warnings.warn(f"{path} is not UTF-8 ({place}); what cannot be read becomes U+FFFD", stacklevel=2)
        return text.decode("utf-8-sig", errors="replace")


def json_lines(text: str) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of the lines of a `.jsonl` file that are not empty.

    Only line feeds end one: `str.splitlines` would cut strings at characters that JSON allows in them, such as U+2028.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line


def _cut(text: str) -> tuple[str, str, str]:
    """Train, val and test part of one text, cut after a line where there is one."""
    ends: list[int] = []
    for share in (1 - 2 * HELD_OUT, 1 - HELD_OUT):
        near = int(len(text) * share)
        ends.append(text.rfind("\n", ends[-1] if ends else 0, near) + 1 or near)
    return text[: ends[0]], text[ends[0] : ends[1]], text[ends[1] :]


def _numbered(key: str) -> Iterator[str]:
    yield key
    yield from (f"{key}#{number}" for number in count(2))


def _match(pattern: str) -> list[tuple[str, Path]]:
    """Keys and files a pattern stands for, in order; a key is the path below the folder named, or the file's name."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        below = (p for p in path.rglob("*") if p.is_file())
        visible = ((p.relative_to(path), p) for p in below)
        return sorted(
            (relative.as_posix(), p)
            for relative, p in visible
            if not any(part.startswith(".") for part in relative.parts) and b"\0" not in _head(p)
        )
    files = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]
    if files == [path] and b"\0" in _head(path):
        raise ValueError(f"{pattern} is not text: it has zero bytes; expected UTF-8, not compressed")
    return [(p.name, p) for p in files if b"\0" not in _head(p)]


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(8192)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
