"""Epochs in which each source has a given share of the sequences, whatever there is of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..nearest import unknown
from .packing import Sources


class Mixture(Sources):
    """Sequences of several sources, `weights` of each: an epoch has as many as all sources hold together.

    A source with more than its share is gone through over several epochs, one with less several times in one: its
    sequences come in random orders, by `seed`, one order after another, so that over time each is met equally often.
    The loader tells the `epoch`.
    """

    def __init__(self, parts: Sequence[Any], weights: Sequence[float], seed: int = 0) -> None:
        super().__init__(parts)
        self.seed = seed
        self.shares = shares_of(len(self), weights)
        self.ends = np.cumsum(self.shares)
        self.facts |= {"shares": self.shares}
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def locate(self, index: int) -> tuple[int, int]:
        """The source of a sequence of this epoch, and its number there."""
        if index < 0:  # padding, which is no source's
            return 0, index
        source = int(np.searchsorted(self.ends, index, side="right"))
        share = self.shares[source]
        met = self.epoch * share + index - (int(self.ends[source]) - share)
        return source, self._row(source, *divmod(met, len(self.parts[source])))

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


def in_order(weights: Mapping[str, float], names: Sequence[str]) -> list[float]:
    """Weights in the order of the sources' names; raises ValueError for one missing or surplus, or that is none."""
    if not names:
        raise ValueError("weights: expected sources with names, such as {law: my/law, code: stdlib}")
    for name in weights:
        if name not in names:
            raise unknown("source of weights", name, names)
    if missing := [name for name in names if name not in weights]:
        raise ValueError(f"weights: none for {', '.join(missing)}; expected one of each source, 0 for none of it")
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"weights: expected numbers from 0, got {weight} for {name}")
    if not any(weights.values()):
        raise ValueError("weights: expected one above 0, all are 0")
    return [weights[name] for name in names]
