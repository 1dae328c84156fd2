"""Conversations as batches: encoded, padded or packed, the same at every resumption.

B rows of S tokens. Packed rows hold several conversations, each attending to itself alone: positions start again with
each, which is how `transformers` tells them apart as long as there is no attention mask (see `zoo.data.packing`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .cache import cached
from .chat import Chat, Example
from .conversations import ConversationSource
from .packing import IGNORE, Sources


def lengths(source: ConversationSource, chat: Chat) -> np.ndarray:
    """Tokens of every conversation, [N] int64, from the cache where they were counted before."""

    def fill(folder: Path) -> None:
        found = [chat.length(source.conversation(i), source.sizes(i)) for i in range(len(source))]
        np.save(folder / "lengths.npy", np.array(found, dtype=np.int64))

    return np.load(cached("conversations", source.fingerprint, chat.fingerprint, fill=fill) / "lengths.npy")


def chosen(source: ConversationSource, sizes: np.ndarray, limit: int, skip: bool = False) -> np.ndarray:
    """Numbers of the conversations of at most `limit` tokens: all of them, or with `skip` those that there are.

    Raises ValueError naming the longest where one is longer, and where none is left.
    """
    longer = sizes > limit
    if longer.any() and not skip:
        worst = int(sizes.argmax())
        raise ValueError(
            f"{source.conversation(worst).name}: {sizes[worst]} tokens are more than the {limit} that fit, and "
            f"so it is with {int(longer.sum())} of {len(sizes)} conversations; shorten them, take fewer or smaller "
            "images, or leave them out with too_long=skip"
        )
    if longer.all():
        raise ValueError(f"{source.conversation(0).name} and all others are longer than {limit} tokens")
    return np.flatnonzero(~longer)


def pack(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Which of the numbers 0..N-1 share a row of `limit` tokens: first fit, the longest first."""
    rows: list[list[int]] = []
    # Rows by the room that is left in them: the fullest one that has room takes the next.
    by_room: list[list[int]] = [[] for _ in range(limit + 1)]
    for number in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = int(sizes[number])
        room = next((room for room in range(size, limit + 1) if by_room[room]), None)
        if room is None:
            row, room = len(rows), limit
            rows.append([])
        else:
            row = by_room[room].pop()
        rows[row].append(number)
        by_room[room - size].append(row)
    return rows


class ConversationRows:
    """Rows of a split for `Loader`: input_ids, labels, answers and real [B, S], attention_mask or position_ids [B, S].

    labels are -100 where no answer stands, answers number those of a row from 1, real is 0 for padding. What the model
    takes of images is there by name, those of all rows one after another. Rows are `limit` tokens long if packed, else
    as the longest in the batch; an index of -1 gives a conversation that counts nowhere.
    numbers: the conversations to take, all by default; sizes: their tokens, which packing needs; keep: have each
    encoded once, and keep it in memory.
    """

    def __init__(
        self,
        source: ConversationSource,
        chat: Chat,
        numbers: np.ndarray | None = None,
        sizes: np.ndarray | None = None,
        limit: int | None = None,
        keep: bool = False,
    ) -> None:
        self.source, self.chat, self.limit = source, chat, limit
        self.kept: dict[int, Example] | None = {} if keep else None
        numbers = np.arange(len(source)) if numbers is None else numbers
        self.pad = next((i for i in (chat.tokenizer.pad_token_id, chat.tokenizer.eos_token_id) if i is not None), 0)
        self.rows = [[int(n)] for n in numbers]
        self.facts = {"length": limit}  # of packed rows
        if limit is not None:
            assert sizes is not None
            self.rows = [[int(numbers[i]) for i in row] for row in pack(sizes[numbers].tolist(), limit)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, list[Example]]:
        return index, [self._example(number) for number in self.rows[max(index, 0)]]

    def _example(self, number: int) -> Example:
        if self.kept is not None and number in self.kept:
            return self.kept[number]
        found = self.chat.encode(self.source.conversation(number), self.source.load(number))
        if self.kept is not None:
            self.kept[number] = found
        return found

    def collate(self, rows: Sequence[tuple[int, list[Example]]]) -> dict[str, Tensor]:
        """A batch of rows."""
        examples = [example for _, row in rows for example in row]
        longest = self.limit or max(sum(len(e.ids) for e in row) for _, row in rows)
        for _, row in rows:
            if sum(len(e.ids) for e in row) > longest:
                raise ValueError(f"{row[0].name}: its images became more tokens than their size told")
        numbered = [(index, _renumbered(row)) for index, row in rows]

        def put(parts: Sequence[Tensor], fill: int) -> Tensor:
            found = torch.cat(list(parts))
            return F.pad(found, (*(0, 0) * (found.dim() - 1), 0, longest - len(found)), value=fill)

        batch = {
            "input_ids": torch.stack([put([e.ids for e in row], self.pad) for _, row in rows]),
            "labels": torch.stack([put([_labels(e, i >= 0) for e in row], IGNORE) for i, row in rows]),
            "answers": torch.stack([put(row if i >= 0 else [r * 0 for r in row], 0) for i, row in numbered]),
        }
        batch["real"] = torch.stack([put([e.ids * 0 + (i >= 0) for e in row], 0) for i, row in rows])
        if self.limit is None:
            batch["attention_mask"] = torch.stack([put([torch.ones_like(e.ids) for e in row], 0) for _, row in rows])
        else:
            positions = [[torch.arange(len(e.ids)) for e in row] for _, row in rows]
            # Padding is one more conversation.
            rest = [torch.arange(longest - sum(len(p) for p in row)) for row in positions]
            batch["position_ids"] = torch.stack([torch.cat([*row, end]) for row, end in zip(positions, rest)])
        for name in dict.fromkeys(name for e in examples for name in e.along):
            values = [[e.along.get(name, e.ids * 0) for e in row] for _, row in rows]
            batch[name] = torch.stack([put(row, 0) for row in values])
        for name in dict.fromkeys(name for e in examples for name in e.images):
            batch[name] = _joined(name, [e for e in examples if name in e.images])
        return batch


class NamedConversationRows:
    """Rows of several sources in an order; a batch says which sources its rows are of, `source` [B], by `numbers`."""

    def __init__(self, order: Sources, numbers: Sequence[int]) -> None:
        self.order, self.numbers, self.facts = order, numbers, order.facts

    @property
    def epoch(self) -> int:
        """Of which epoch the rows are, where they differ."""
        return self.order.epoch

    @epoch.setter
    def epoch(self, number: int) -> None:
        self.order.epoch = number

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple[int, int, list[Example]]:
        source, row = self.order.locate(index)
        return (self.numbers[source], *self.order.parts[source][row])

    def collate(self, rows: Sequence[tuple[int, int, list[Example]]]) -> dict[str, Tensor]:
        """A batch of rows."""
        batch = self.order.parts[0].collate([row for _, *row in rows])
        return {**batch, "source": torch.tensor([source for source, *_ in rows])}


def _labels(example: Example, counts: bool) -> Tensor:
    """A conversation's labels; its first token has none, for what stands before it in a packed row is another's."""
    labels = example.labels.clone() if counts else torch.full_like(example.ids, IGNORE)
    labels[:1] = IGNORE
    return labels


def _renumbered(row: list[Example]) -> list[Tensor]:
    """The answers of all conversations of a row, counted on."""
    found, before = [], 0
    for example in row:
        found.append(torch.where(example.answers > 0, example.answers + before, 0))
        before += int(example.answers.max())
    return found


def _joined(name: str, examples: Sequence[Example]) -> Tensor:
    first = examples[0].images[name]
    for example in examples:
        if example.images[name].shape[1:] != first.shape[1:]:
            raise ValueError(
                f"{example.name}: {name} has the shape {list(example.images[name].shape)}, and that of "
                f"{examples[0].name} {list(first.shape)}; images of different shapes do not make a batch, take "
                "data.batch_size=1"
            )
    return torch.cat([example.images[name] for example in examples])
