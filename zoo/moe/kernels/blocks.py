"""Which rows the CPU backend computes together: experts of about equal load as one batch of equal matrices.

A assignments sorted by expert become P computed rows. Where oneDNN multiplies, every expert of a block gets as many
rows as its fullest, rounded up to one of a few sizes: it compiles a product for each new shape, in up to 20 times the
time that the product takes. Padding repeats the expert's last row and counts for nothing.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from . import products

# Computed rows per real one up to which neighbours share a block.
PADDING = 1.15
# Multiplications of padding that calls of its own for an expert would take longer than. On AMX, which splits one
# product of a few hundred rows badly over threads but several equal ones well, only PADDING limits.
CALLS = 6e7
# Pre-activations up to which a block grows, on AMX beyond two experts: they should stay in cache until they are used.
BLOCK = 5 << 19


class Block(NamedTuple):
    """`experts` selects G of them; each has M = `rows` rows, computed from row `start` on."""

    experts: slice
    start: int
    rows: int

    @property
    def size(self) -> int:
        """G."""
        return self.experts.stop - self.experts.start

    @property
    def span(self) -> slice:
        """The block's rows among all computed ones."""
        return slice(self.start, self.start + self.size * self.rows)


class Plan(NamedTuple):
    """The blocks, the token of each computed row [P], and which assignments those rows are (None: just those)."""

    blocks: list[Block]
    token: Tensor
    assignment: Tensor | None = None  # [P]
    real: Tensor | None = None  # [P] bool
    place: Tensor | None = None  # [A]

    @property
    def largest(self) -> int:
        """Rows of the largest block."""
        return max((b.size * b.rows for b in self.blocks), default=0)

    def spread(self, values: Tensor) -> Tensor:
        """Values [A] of the assignments as the rows lie, [P]; zero where a row is padding."""
        return values if self.assignment is None or self.real is None else values[self.assignment] * self.real

    def collect(self, values: Tensor) -> Tensor:
        """Values [P] of the rows as the assignments lie, [A]."""
        return values if self.place is None else values[self.place]


def kept_rows(assignments: int, experts: int, dtype: torch.dtype) -> int:
    """Rows of the pre-activations kept for the backward: enough for any padding."""
    return assignments * 5 // 4 + 32 * experts if products.compiles(dtype) else assignments


def plan(token_index: Tensor, offsets: Tensor, w_in: Tensor, w_out: Tensor, dtype: torch.dtype) -> Plan:
    """Blocks that cover every expert with rows, for weights w_in [E, H, D] and w_out [E, D, F]."""
    bounds = offsets.tolist()
    counts = [end - start for start, end in pairwise(bounds)]
    work = w_in[:1].numel() + w_out[:1].numel()
    if not products.is_compiled(dtype, work / 2 * token_index.numel() / max(1, len(counts))):
        blocks = [Block(slice(e, e + 1), bounds[e], count) for e, count in enumerate(counts) if count]
        return Plan(blocks, token_index)
    blocks = _group(counts, w_in.shape[1], work)
    rows = [0] * len(counts)
    for block in blocks:
        rows[block.experts] = [block.rows] * block.size
    if rows == counts:
        return Plan(blocks, token_index)
    first = torch.tensor([0, *accumulate(rows)])
    expert = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
    local = torch.arange(len(expert)) - first[expert]
    last = offsets.diff()[expert] - 1
    assignment, real = offsets[expert] + torch.minimum(local, last), local <= last
    return Plan(blocks, token_index[assignment], assignment, real, real.nonzero()[:, 0])


def _group(counts: list[int], wide: int, work: int) -> list[Block]:
    """Neighbours of like loads as blocks, where forward a row takes `work` multiplications, a third of all."""
    blocks: list[Block] = []
    filled = start = 0  # rows of the last block without its padding to equal loads; its end
    for e, count in enumerate(counts):
        if not count:
            continue
        m, last = _padded(count), blocks[-1] if blocks else None
        if last and last.experts.stop == e:
            size, most = last.size + 1, max(m, last.rows)
            few = (products.has_amx() and size == 2) or size * most * wide <= BLOCK
            added = size * most - (last.size * last.rows + m)
            cheap = products.has_amx() or 3 * work * added <= CALLS
            if few and cheap and size * most <= PADDING * (filled + m):
                blocks[-1] = Block(slice(last.experts.start, e + 1), last.start, most)
                filled, start = filled + m, blocks[-1].span.stop
                continue
        blocks.append(Block(slice(e, e + 1), start, m))
        filled, start = m, start + m
    return blocks


def _padded(rows: int) -> int:
    """Rows to compute for `rows` real ones: few sizes, and on AMX whole tiles of 32 rows, up to a third faster."""
    if rows <= 8:
        return rows
    least, fine = (32, 128) if products.has_amx() else (16, 512)
    step = 8 if rows <= 64 else 16 if rows <= fine else max(least, 1 << (rows.bit_length() - 5))
    return -(-rows // step) * step
