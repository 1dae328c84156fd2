"""Single columns of a chunk, checked: what is wrong with a value is said with its feature, row and value."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .tables_files import Chunk
from .tables_schema import Bag, Categorical, Dense, Sequence, Target
from .tables_values import NO_NUMBER, NotANumber, distinct, fnv1a, items, numbers, spans, text

_YES_OR_NO = {"0": 0.0, "1": 1.0, "false": 0.0, "true": 1.0, "0.0": 0.0, "1.0": 1.0}
# Words of columns that YAML reads as a truth value, so that a schema's `positive: [yes]` means them.
_WORDS = {True: ("true", "yes", "on"), False: ("false", "no", "off")}


def values_of(f: Dense, chunk: Chunk) -> np.ndarray:
    """A dense feature [B] float64 with missing values filled in, and its logarithm where the transform has one.

    Raises ValueError for a value that is missing without a stand-in, is no number, or is not finite in float32.
    """
    values = _numbers(f"feature {f.name!r}", f.column or f.name, chunk)
    missing = np.isnan(values)
    if f.missing is not None:
        values = np.where(missing, f.missing, values)
    elif missing.any():
        row = chunk.rows[missing.argmax()]
        raise ValueError(
            f"feature {f.name!r}, row {row}: expected a number in column {f.column or f.name!r}, got nan "
            "(missing: 0 would stand in)"
        )
    with np.errstate(over="ignore"):
        infinite = ~np.isfinite(values.astype(np.float32))
    if infinite.any():
        at = infinite.argmax()
        raise ValueError(f"feature {f.name!r}, row {chunk.rows[at]}: expected a finite number, got {values[at]}")
    return np.sign(values) * np.log1p(np.abs(values)) if f.transform.startswith("log") else values


class Feature(NamedTuple):
    """Ids of a feature before they are numbers: the values are texts[which], of which row i has lengths[i]."""

    texts: list[str]
    which: np.ndarray
    lengths: np.ndarray
    weights: np.ndarray | None

    @classmethod
    def read(cls, f: Categorical, chunk: Chunk) -> Feature:
        """Of a categorical feature, a bag with its weights or the end of a sequence.

        Raises ValueError for lists where one value is expected, and for weights that are not one an id.
        """
        column = chunk.columns[f.column or f.name]
        try:
            if not isinstance(f, Bag | Sequence):
                return cls(*distinct(column), np.ones(len(chunk.rows), np.int64), None)
            values, lengths = items(column, f.separator)
            if isinstance(f, Sequence):
                kept = np.minimum(lengths, f.max_length)
                values, lengths = values.take(spans(np.cumsum(lengths) - kept, kept)), kept
            weights = _weights(f, lengths, chunk) if isinstance(f, Bag) and f.weights else None
            return cls(*distinct(values), lengths, weights)
        except ValueError as error:
            raise _about(f"feature {f.name!r}", error) from error


def _weights(f: Bag, lengths: np.ndarray, chunk: Chunk) -> np.ndarray:
    assert f.weights is not None
    found, counts = items(chunk.columns[f.weights], f.separator)
    if (differ := counts != lengths).any():
        at = differ.argmax()
        raise ValueError(f"row {chunk.rows[at]}: expected a weight for each of {lengths[at]} ids, got {counts[at]}")
    weights = _numbers("weights", f.weights, Chunk(np.repeat(chunk.rows, lengths), {f.weights: found}))
    if not (finite := np.isfinite(weights)).all():
        raise ValueError(f"row {chunk.rows.repeat(lengths)[finite.argmin()]}: expected finite weights, got nan")
    return weights.astype(np.float32)


def encoded_label(task: Target, chunk: Chunk) -> np.ndarray:
    """Labels of a task [B] float32, nan where a row has none; raises ValueError for a value that is no label."""
    column, where = task.column or task.name, f"label of task {task.name!r}"
    if task.kind == "binary":
        return _binary(task, where, chunk)
    values = _numbers(where, column, chunk)
    if task.kind == "ordinal":
        assert task.classes is not None
        bad = ~np.isnan(values) & ~((values >= 0) & (values < task.classes) & (values == np.floor(values)))
        expected = f"a whole number from 0 to {task.classes - 1}"
    else:
        bad, expected = np.isinf(values), "a finite number"
    if bad.any():
        at = bad.argmax()
        raise ValueError(f"{where}, row {chunk.rows[at]}: expected {expected}, got {values[at]:g}")
    return values.astype(np.float32)


def _binary(task: Target, where: str, chunk: Chunk) -> np.ndarray:
    try:
        texts, index = distinct(chunk.columns[task.column or task.name])
    except ValueError as error:
        raise _about(where, error) from error
    none = [value.lower() in NO_NUMBER for value in texts]
    if task.positive is None:
        values = [np.nan if empty else _YES_OR_NO.get(value.lower()) for value, empty in zip(texts, none)]
    else:
        # Here "none" or "na" may be a value like any other, so that only nothing is no label.
        positive = [float(any(_is(value, other) for other in task.positive)) for value in texts]
        values = [yes if value or yes else np.nan for value, yes in zip(texts, positive)]
    for number, value in enumerate(values):
        if value is None and len(at := np.flatnonzero(index == number)):
            raise ValueError(f"{where}, row {chunk.rows[at[0]]}: expected 0 or 1, got {texts[number]!r}")
    return np.array(values, np.float32)[index]


def _is(value: str, positive: Any) -> bool:
    """Whether a text of a column is a value of a schema."""
    return value.lower() in _WORDS[positive] if isinstance(positive, bool) else value == text(positive)


def encoded_group(column: str, chunk: Chunk) -> np.ndarray:
    """Groups [B] int64: whole numbers as they are, and a hash of any other value."""
    try:
        texts, index = distinct(chunk.columns[column])
    except ValueError as error:
        raise _about(f"group {column!r}", error) from error
    hashed = (fnv1a(texts) >> np.uint64(1)).tolist()
    found = [int(value) if _is_whole(value) else code for value, code in zip(texts, hashed)]
    return np.array(found, np.int64)[index]


def _is_whole(value: str) -> bool:
    digits = value.removeprefix("-")
    return digits.isascii() and digits.isdigit() and len(digits) <= 18  # such numbers fit into 64 bits


def encoded_weight(column: str, chunk: Chunk) -> np.ndarray:
    """Sample weights [B] float32; raises ValueError for one that is missing or negative."""
    values = _numbers("sample weight", column, chunk)
    bad = ~(np.isfinite(values) & (values >= 0))
    if bad.any():
        at = bad.argmax()
        raise ValueError(f"sample weight {column!r}, row {chunk.rows[at]}: expected 0 or more, got {values[at]:g}")
    return values.astype(np.float32)


def _numbers(where: str, column: str, chunk: Chunk) -> np.ndarray:
    try:
        return numbers(chunk.columns[column])
    except NotANumber as error:
        raise _about(f"{where}, row {chunk.rows[error.position]}", error) from error
    except ValueError as error:
        raise _about(where, error) from error


def _about(where: str, error: Any) -> ValueError:
    joint = ", " if str(error).startswith("row ") else ": "
    return ValueError(f"{where}{joint}{error}")
