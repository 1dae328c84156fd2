"""Sequences of fixed length out of a long row of tokens, with document boundaries respected.

Documents follow one another without padding; S + 1 tokens make a sequence of S inputs and S targets, and the next
sequence begins with the last target, so that every token is predicted exactly once. Positions start again at 0 with
each document and each sequence: this is how `transformers` recognises packed sequences, and attention then stays inside
them by a mask (eager, sdpa, flex), provided that no attention mask and no cache is given. Flash attention takes no
mask, and must be given `flash_lengths` where a batch has more than one row.
The first token of a document is no target: the text before it belongs to another document.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .tokens import NOT_TEXT, Tokens

IGNORE = -100  # cross_entropy's own default


def flash_lengths(position_ids: Tensor) -> dict[str, Any]:
    """The arguments by which `transformers` tells flash attention where documents lie in position_ids [B, S]."""
    starts = (position_ids.flatten() == 0).nonzero().flatten()
    ends = F.pad(starts, (0, 1), value=position_ids.numel()).int()
    longest = int(ends.diff().max())
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


class Sources:
    """Sequences of several sources, one after another, each with the number of its own as `source`, an int64 scalar."""

    epoch = 0  # which one the order is of, where that matters

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts])
        self.facts = {name: [part.facts[name] for part in parts] for name in parts[0].facts}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        source, row = self.locate(index)
        return {**self.parts[source][row], "source": torch.tensor(source)}

    def locate(self, index: int) -> tuple[int, int]:
        """The source of a sequence, and its number there."""
        source = int(np.searchsorted(self.ends, index, side="right"))  # 0 for the padding at -1
        return source, index if index < 0 else index - int(self.ends[source]) + len(self.parts[source])


class Packed:
    """Sequences by index, each a dict of input_ids, position_ids, labels and target_bytes, all [S] int64.

    target_bytes is the number of bytes the target stands for, -1 where it is no text. With `tail` the last sequence is
    filled up with padding, so that nothing is left out; without, what does not fill a sequence is dropped.
    An index of -1 gives a sequence of padding only, which counts nowhere.
    """

    def __init__(self, tokens: Tokens, length: int, pad: int, tail: bool = False) -> None:
        self.tokens, self.length, self.pad = tokens, length, pad
        self.facts = {"sequence_length": length, "tokens": len(tokens.ids)}
        targets = len(tokens.ids) - 1
        self.size = -(-targets // length) if tail else targets // length
        if self.size < 1:
            raise ValueError(f"{len(tokens.ids)} tokens do not fill one sequence of {length} and its targets")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        s = self.length
        lo = index * s if index >= 0 else len(self.tokens.ids)
        ids = np.full(s + 1, self.pad, dtype=np.int64)
        size = np.full(s + 1, NOT_TEXT, dtype=np.int64)
        real = self.tokens.ids[lo : lo + s + 1]
        ids[: len(real)] = real
        size[: len(real)] = self.tokens.size[lo : lo + s + 1]

        first, last = np.searchsorted(self.tokens.starts, [lo, lo + len(real)])
        begins = self.tokens.starts[first:last] - lo
        is_target = np.arange(s + 1) < len(real)
        is_target[begins] = False
        opens = np.zeros(s, dtype=np.int64)
        # Padding is a document of its own: nothing real attends to it, nor it to anything real.
        edges = [*begins, len(real)]
        for edge in edges:
            if edge < s:
                opens[edge] = edge
        position = np.arange(s) - np.maximum.accumulate(opens)
        return {
            "input_ids": torch.from_numpy(ids[:-1].copy()),
            "position_ids": torch.from_numpy(position),
            "labels": torch.from_numpy(np.where(is_target[1:], ids[1:], IGNORE)),
            "target_bytes": torch.from_numpy(np.where(is_target[1:], size[1:], NOT_TEXT)),
        }
