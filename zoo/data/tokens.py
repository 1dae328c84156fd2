"""A split of a corpus as one long row of tokens, kept on disk and read through memory maps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from .cache import cached
from .corpus import Corpus
from .tokenizer import Tokenizer

NOT_TEXT = -1  # in place of a number of bytes: the token opens or closes a document


@dataclass(frozen=True)
class Tokens:
    """N tokens: ids [N]; size [N], bytes of text each stands for or NOT_TEXT; starts, where documents begin."""

    ids: np.ndarray
    size: np.ndarray
    starts: np.ndarray


def tokenize(corpus: Corpus, split: str, tokenizer: Tokenizer) -> Tokens:
    """Tokens of a split, from the cache where this was done before. Raises ValueError when the split has no text."""

    def fill(folder: Path) -> None:
        _write(folder, corpus.documents(split), tokenizer)

    folder = cached("tokens", corpus.fingerprint, split, tokenizer.fingerprint, fill=fill)
    ids, size, starts = (_map(folder / name, kind) for name, kind in _FILES.items())
    if not len(starts):
        raise ValueError(f"{corpus.description}: nothing to {split} on; give more text")
    return Tokens(ids, size, starts)


_FILES = {"ids": np.int32, "size": np.int32, "starts": np.int64}


def _write(folder: Path, texts: Iterable[str], tokenizer: Tokenizer) -> None:
    """Stream documents to disk as start, tokens, end; empty ones are left out."""
    at = 0
    files = {name: (folder / name).open("wb") for name in _FILES}
    try:
        for batch in _batches((text for text in texts if text), 256):
            for ids, size in tokenizer.encode(batch):
                tail = [] if tokenizer.end is None else [tokenizer.end]
                row = np.concatenate([[tokenizer.start], ids, tail], dtype=np.int32, casting="unsafe")
                sizes = np.concatenate([[NOT_TEXT], size, [NOT_TEXT] * len(tail)], dtype=np.int32, casting="unsafe")
                for name, values in (("ids", row), ("size", sizes), ("starts", np.array([at]))):
                    values.astype(_FILES[name], copy=False).tofile(files[name])
                at += len(row)
    finally:
        for file in files.values():
            file.close()


def _batches(texts: Iterator[str], size: int) -> Iterator[list[str]]:
    while batch := list(islice(texts, size)):
        yield batch


def _map(path: Path, kind: type) -> np.ndarray:
    if not path.stat().st_size:  # an empty file cannot be mapped
        return np.zeros(0, dtype=kind)
    return np.memmap(path, dtype=kind, mode="r")
