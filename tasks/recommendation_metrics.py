"""Figures of recommendation models as plain functions: how well they rank, and how right their predictions are.

They take arrays of one length, a row each: scores or predictions, labels, where it matters the group of a row,
and sample weights (1 by default). What is undefined is nan, never a neutral value: the AUC of labels of one class, for
example. No loop runs over rows or groups, and the order of rows changes nothing beyond rounding.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
BINS = 20  # of the expected calibration error


def auc(scores: Array, labels: Array, weight: Array | None = None) -> float:
    """The chance that a positive row scores above a negative one, ties counting half; nan when a class is missing."""
    above, pairs, _ = _pairs(scores, labels, np.zeros(len(scores), np.int64), weight)
    return _ratio(above.sum(), pairs.sum())


def gauc(scores: Array, labels: Array, group: Array, weight: Array | None = None) -> float:
    """AUC within each group, averaged by the groups' rows: GAUC (Deep Interest Network 1706.06978, section 6.2).

    Groups of one class have no AUC and are left out; nan when none is left. Sample weights count in the AUC of a group
    and in its share of the average.
    """
    above, pairs, rows = _pairs(scores, labels, group, weight)
    both = pairs > 0
    return _ratio((above[both] / pairs[both] * rows[both]).sum(), rows[both].sum())


def ndcg(scores: Array, gains: Array, group: Array, k: int) -> float:
    """NDCG@k of each group, averaged over the groups that have any gain; nan when none has.

    DCG = sum over ranks i = 1..k of gain_i / log2(i + 1) (gains as they are, 0 or more, as in scikit-learn), over that
    of the best order. Rows of one score share their ranks: each gets their mean discount (McSherry & Najork, 2008).
    Sample weights have no meaning for ranks and are not taken.
    """
    best = _dcg(gains, gains, group, k)
    some = best > 0
    return _ratio((_dcg(scores, gains, group, k)[some] / best[some]).sum(), some.sum())


def log_loss(probability: Array, labels: Array, weight: Array | None = None) -> float:
    """-mean of y log p + (1 - y) log(1 - p), p kept within machine precision of 0 and 1; nan without rows."""
    eps = np.finfo(probability.dtype).eps
    p = np.clip(probability, eps, 1 - eps)
    return _mean(-np.where(labels > 0, np.log(p), np.log1p(-p)), weight)


def calibration(prediction: Array, labels: Array, weight: Array | None = None) -> float:
    """Mean prediction over mean label, 1 when neither too high nor too low; nan when the labels sum to 0."""
    return _ratio(_mean(prediction, weight), _mean(labels, weight))


def calibration_error(prediction: Array, labels: Array, weight: Array | None = None, bins: int = BINS) -> float:
    """Expected calibration error (1706.04599, eq. 3): sum over bins of |mean prediction - mean label|, by their rows.

    Bins hold equally many rows rather than equal ranges, since rare events are predicted within a small range; rows of
    one prediction stay together.
    """
    if not len(prediction):
        return math.nan
    edges = np.sort(prediction)[np.arange(1, bins) * len(prediction) // bins]
    where = np.searchsorted(edges, prediction, side="right")
    mass = np.ones(len(prediction)) if weight is None else weight.astype(np.float64)
    return _ratio(np.abs(np.bincount(where, mass * (prediction - labels))).sum(), mass.sum())


def rmse(prediction: Array, labels: Array, weight: Array | None = None) -> float:
    """Root of the mean squared error; nan without rows."""
    return math.sqrt(_mean(np.square(prediction - labels), weight))


def mae(prediction: Array, labels: Array, weight: Array | None = None) -> float:
    """Mean absolute error; nan without rows."""
    return _mean(np.abs(prediction - labels), weight)


def accuracy(classes: Array, labels: Array, weight: Array | None = None) -> float:
    """Share of rows whose class is right; nan without rows."""
    return _mean((classes == labels).astype(np.float64), weight)


def kappa(classes: Array, labels: Array, weight: Array | None = None) -> float:
    """Cohen's kappa with quadratic weights: 1 - E (p - y)^2 / the same for independent p and y; nan when that is 0.

    For independent p and y the expected square is var p + var y + (mean p - mean y)^2, so no matrix is needed.
    """
    means = [_mean(values, weight) for values in (classes, labels)]
    spread = sum(_mean(np.square(values - mean), weight) for values, mean in zip((classes, labels), means))
    return 1 - _ratio(_mean(np.square(classes - labels), weight), spread + (means[0] - means[1]) ** 2)


def _ranked(scores: Array, group: Array) -> tuple[Array, Array, Array]:
    """Rows in order of group and score, where ties begin in it, and at which of the ties each group begins."""
    order = np.lexsort((scores, group))
    if not len(order):
        return order, order, order
    begins = np.ones((2, len(order)), bool)
    for row, values in zip(begins, (group[order], scores[order])):
        np.not_equal(values[1:], values[:-1], out=row[1:])
    ties = np.flatnonzero(begins.any(0))
    return order, ties, np.flatnonzero(begins[0, ties])


def _up_to(values: Array, groups: Array) -> Array:
    """Sums of the ties' values from the start of their group, inclusive."""
    total = np.cumsum(values)
    before = np.concatenate([[0], total[groups[1:] - 1]])
    return total - np.repeat(before, np.diff(np.append(groups, len(values))))


def _pairs(scores: Array, labels: Array, group: Array, weight: Array | None) -> tuple[Array, Array, Array]:
    """Of each group: pairs of a positive row above a negative one (ties half), all such pairs, and rows; weighted."""
    order, ties, groups = _ranked(scores, group)
    if not len(order) or np.isnan(scores).any():
        return (np.full(1, np.nan),) * 3
    # Whole numbers are exact in float64 up to 2^53, and so is all of this without weights.
    mass = np.ones(len(order)) if weight is None else weight[order].astype(np.float64)
    positive = np.add.reduceat(np.where(labels[order] > 0, mass, 0), ties)
    negative = np.add.reduceat(np.where(labels[order] > 0, 0, mass), ties)
    above = np.add.reduceat(positive * (_up_to(negative, groups) - negative / 2), groups)
    positives, negatives = np.add.reduceat(positive, groups), np.add.reduceat(negative, groups)
    return above, positives * negatives, positives + negatives


def _dcg(scores: Array, gains: Array, group: Array, k: int) -> Array:
    """DCG@k of each group, in order of groups."""
    order, ties, groups = _ranked(scores, group)
    if not len(order):
        return np.zeros(0)
    gain = np.add.reduceat(gains[order].astype(np.float64), ties)
    count = np.diff(np.append(ties, len(order)))
    size = np.add.reduceat(count, groups)
    first = np.repeat(size, np.diff(np.append(groups, len(ties)))) - _up_to(count, groups)  # rank of the best, from 0
    discounts = np.concatenate([[0], np.cumsum(1 / np.log2(np.arange(k) + 2))])
    shared = discounts[np.minimum(first + count, k)] - discounts[np.minimum(first, k)]
    return np.add.reduceat(gain * shared / count, groups)


def _mean(values: Array, weight: Array | None) -> float:
    values = np.asarray(values, np.float64)
    if weight is None:
        return _ratio(values.sum(), len(values))
    return _ratio((values * weight).sum(), weight.sum(dtype=np.float64))


def _ratio(above: Any, below: Any) -> float:
    return float(above) / float(below) if below else math.nan
