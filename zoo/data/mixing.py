"""Epochs in which each source has a given share of the sequences, whatever there is of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Mixture:
    """Sequences of several sources, `weights` of each: an epoch has as many as all sources hold together.

    A source with more than its share is gone through over several epochs, one with less several times in one: its
    sequences come in random orders, by `seed`, one order after another, so that over time each is met equally often.
    Each sequence says which source it is of, as `source`, an int64 scalar. The loader tells the `epoch`.
    """

    def __init__(self, parts: Sequence[Any], weights: Sequence[float], seed: int = 0) -> None:
        self.parts, self.seed, self.epoch = parts, seed, 0
        self.shares = shares_of(sum(len(part) for part in parts), weights)
        self.ends = np.cumsum(self.shares)
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index < 0:  # padding, which is no source's
            return {**self.parts[0][index], "source": torch.tensor(0)}
        source = int(np.searchsorted(self.ends, index, side="right"))
        part, share = self.parts[source], self.shares[source]
        met = self.epoch * share + index - (int(self.ends[source]) - share)
        return {**part[self._row(source, *divmod(met, len(part)))], "source": torch.tensor(source)}

    def _row(self, source: int, turn: int, place: int) -> int:
        """The sequence in that place of a source's order number `turn`."""
        if (source, turn) not in self._orders:
            size = len(self.parts[source])
            first = self.epoch * self.shares[source] // size  # what epochs before this one went through is over
            self._orders = {key: order for key, order in self._orders.items() if key[0] != source or key[1] >= first}
            self._orders[source, turn] = np.random.default_rng((self.seed % 2**64, source, turn)).permutation(size)
        return int(self._orders[source, turn][place])


def shares_of(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers that sum to total, in the proportion of the weights: those cut most are rounded up."""
    exact = [total * weight / sum(weights) for weight in weights]
    found = [int(value) for value in exact]
    most_cut = sorted(range(len(found)), key=lambda i: found[i] - exact[i])
    for i in most_cut[: total - sum(found)]:
        found[i] += 1
    return found
