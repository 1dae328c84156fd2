"""Text to tokens: bytes, words, a BPE learnt on the corpus, or any fast tokenizer of `transformers`.

Every tokenizer also says how many bytes of text each token stands for, which makes bits per byte comparable between
tokenizers, and saves itself in the layout `transformers` reads.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..nearest import unknown
from .cache import cached
from .corpus import Corpus

START, END, PAD, UNKNOWN = "<|start|>", "<|end|>", "<|pad|>", "<|unknown|>"


class Tokenizer(Protocol):
    """What the data pipeline and the task need; start and end are ids that open and close a document."""

    vocab_size: int
    start: int
    end: int | None
    pad: int
    fingerprint: str

    def encode(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids of each text, and the number of UTF-8 bytes each id stands for (they add up to the text)."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens."""
        ...

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files from which `transformers.AutoTokenizer` makes the same tokenizer."""
        ...


class ByteTokenizer:
    """256 bytes, then start, end and padding."""

    vocab_size, start, pad = 259, 256, 258
    end: int | None = 257
    fingerprint = "bytes"

    def encode(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Bytes of each text, one each."""
        ids = [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]
        return [(i, np.ones(len(i), dtype=np.int32)) for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; bytes that are not UTF-8 become the replacement character."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write it as a BPE without merges, which `transformers` reads."""
        from tokenizers import Tokenizer as Backend
        from tokenizers import models

        # GPT-2's byte alphabet, in the order of the bytes.
        letters = [chr(b) if b in _PRINTABLE else chr(256 + i) for b, i in _RANK]
        backend = Backend(models.BPE(vocab={letter: b for b, letter in enumerate(letters)}, merges=[]))
        backend.add_special_tokens([START, END, PAD])
        _wrap(_as_bytes(backend)).save_pretrained(str(folder))


class SubwordTokenizer:
    """A fast `transformers` tokenizer. Raises ValueError when it cannot open a document or report offsets."""

    def __init__(self, fast: Any) -> None:
        self.fast = fast
        self.backend: Any = getattr(fast, "backend_tokenizer", None)
        if self.backend is None:
            raise ValueError(
                f"{type(fast).__name__} is not a fast tokenizer: it cannot tell where in the text a token is"
            )
        # Text that happens to spell a special token is text.
        self.backend.encode_special_tokens = True
        start = fast.bos_token_id if fast.bos_token_id is not None else fast.eos_token_id
        if start is None:
            raise ValueError(f"{type(fast).__name__} has neither a bos nor an eos token to open a document with")
        self.start: int = start
        self.end: int | None = fast.eos_token_id
        self.pad: int = next(i for i in (fast.pad_token_id, fast.eos_token_id, start) if i is not None)
        self.vocab_size: int = 1 + max(self.backend.get_vocab().values())  # ids may leave gaps
        described = self.backend.to_str()
        self.fingerprint = hashlib.sha256(described.encode()).hexdigest()[:16]
        self._cuts = _can_cut(json.loads(described))
        # Some files say both, for batches of sentences; a document is encoded whole.
        self.backend.no_truncation()
        self.backend.no_padding()

    def encode(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids and bytes of each text."""
        found: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in texts]
        for group in _groups(
            (n, part) for n, text in enumerate(texts) for part in (cut(text) if self._cuts else [text])
        ):
            encoded = self.backend.encode_batch([part for _, part in group], add_special_tokens=False)
            for (n, part), e in zip(group, encoded):
                found[n].append((np.array(e.ids, dtype=np.int32), _bytes_of(part, e.offsets)))
        return [(np.concatenate([ids for ids, _ in own]), np.concatenate([size for _, size in own])) for own in found]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens."""
        return str(self.fast.decode(list(ids), skip_special_tokens=True))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer's own files."""
        self.fast.save_pretrained(str(folder))


def open_tokenizer(name: str, corpus: Corpus | None = None) -> Tokenizer:
    """Open "bytes", "bpe:SIZE" (learnt on the training split of `corpus`), a folder, or a hub repository.

    Raises ValueError for a name that is none of these.
    """
    if name == "bytes":
        return ByteTokenizer()
    kind, _, size = name.partition(":")
    if kind == "bpe" and size:
        if not size.isdecimal() or int(size) < 260:
            raise ValueError(f"tokenizer {name!r}: the size of a BPE must be a number of at least 260")
        if corpus is None:
            raise ValueError(f"tokenizer {name!r} is learnt on a corpus, and there is none")
        return learn_bpe(corpus, int(size))
    if not Path(name).is_dir() and "/" not in name:
        raise unknown("tokenizer", name, ["bytes", "bpe:4096", "a folder", "a hub repository (owner/name)"])
    from transformers import AutoTokenizer

    try:
        return SubwordTokenizer(AutoTokenizer.from_pretrained(name))
    except OSError as error:
        raise ValueError(f"tokenizer {name!r} could not be loaded: {error}") from error


def open_or_learn_words(name: str, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """Learn "words" (those of `texts()`) or "words:SIZE" (the most frequent), or open as `open_tokenizer`.

    Raises ValueError for a size that is no number, and as `open_tokenizer`.
    """
    kind, _, size = name.partition(":")
    if kind != "words":
        return open_tokenizer(name)
    if size and not size.isdecimal():
        raise ValueError(f"tokenizer {name!r}: expected words:SIZE with a number")
    return learn_words(texts(), int(size) if size else None)


def learn_bpe(corpus: Corpus, vocab_size: int) -> SubwordTokenizer:
    """A byte-level BPE of `vocab_size` tokens learnt on the training split; the same corpus gives the same one."""
    from tokenizers import Tokenizer as Backend

    def fill(folder: Path) -> None:
        (folder / "tokenizer.json").write_text(_train_bpe(corpus.documents("train"), vocab_size))

    folder = cached("bpe", corpus.fingerprint, str(vocab_size), fill=fill)
    return SubwordTokenizer(_wrap(Backend.from_file(str(folder / "tokenizer.json"))))


def learn_words(texts: Iterable[str], most: int | None = None) -> SubwordTokenizer:
    """A token a word or punctuation mark of `texts` in lower case, the `most` frequent ones; others are unknown."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers, pre_tokenizers

    split, counts = pre_tokenizers.Whitespace(), Counter[str]()
    for text in texts:
        counts.update(word for word, _ in split.pre_tokenize_str(text.lower()))
    # By the alphabet where frequencies are equal, so that the order of the texts does not matter.
    kept = sorted(counts, key=lambda word: (-counts[word], word))[:most]
    vocabulary = {word: i for i, word in enumerate((START, END, PAD, UNKNOWN, *kept))}
    backend = Backend(models.WordLevel(vocab=vocabulary, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = split
    backend.add_special_tokens([START, END, PAD, UNKNOWN])
    return SubwordTokenizer(_wrap(backend))


def _train_bpe(texts: Iterable[str], vocab_size: int) -> str:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    backend = _as_bytes(Backend(models.BPE()))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[START, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((part for text in texts for part in cut(text)), trainer=trainer)
    return str(backend.to_str())


# What a tokenizer says of each token takes some two hundred times the text's memory.
PIECE, GROUP = 1 << 16, 1 << 20  # characters
_EDGE = re.compile(r"(?<=\S\n)(?=\S)")


def cut(text: str) -> list[str]:
    """Parts of a text that a byte-level BPE encodes one by one as it does the whole, each a little above PIECE long.

    They end after the one line feed between two lines that begin and end with no white space: the BPE splits there, and
    in the same way at the end of a text. A text without such places is one part.
    """
    parts, at = [], 0
    while at + PIECE < len(text):
        found = _EDGE.search(text, at + PIECE)
        if found is None:
            break
        parts.append(text[at : found.start()])
        at = found.start()
    return [*parts, text[at:]]


def _can_cut(described: dict[str, Any]) -> bool:
    """Whether a tokenizer is a BPE that splits text as GPT-2's does, and changes nothing before that."""
    splits, added = described["pre_tokenizer"] or {}, described["added_tokens"]
    known = all(t["special"] or not (t["lstrip"] or t["rstrip"] or "\n" in t["content"]) for t in added)
    plain = described["normalizer"] is None and not splits.get("add_prefix_space") and known
    return plain and splits.get("type") == "ByteLevel" and splits.get("use_regex", True)


def _groups(parts: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Parts in groups of at most GROUP characters, or of one."""
    group: list[tuple[int, str]] = []
    size = 0
    for part in parts:
        if group and size + len(part[1]) > GROUP:
            yield group
            group, size = [], 0
        group.append(part)
        size += len(part[1])
    if group:
        yield group


def _as_bytes(backend: Any) -> Any:
    from tokenizers import decoders, pre_tokenizers

    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _wrap(backend: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=START, eos_token=END, pad_token=PAD)


def _bytes_of(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Bytes per token: each gets the text from where the one before it ended; the last one gets the rest."""
    if not offsets:
        return np.zeros(0, dtype=np.int32)
    ends = np.maximum.accumulate(np.array(offsets, dtype=np.int64)[:, 1])
    ends[-1] = len(text)
    if not text.isascii():
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        width = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
        ends = np.concatenate([[0], width.cumsum()])[ends]
    return np.diff(ends, prepend=0).astype(np.int32)


_PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
_RANK = [(b, sum(c not in _PRINTABLE for c in range(b))) for b in range(256)]
