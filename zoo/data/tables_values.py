"""Columns of a table as numbers: texts, distinct values, lists, and a hash that is the same everywhere.

A column is a pyarrow array, chunked or not, or anything pyarrow makes one of. Nothing here loops over rows; what has to
look at texts one by one does so for the distinct ones.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

# What stands for no number in a CSV file, besides nothing.
NO_NUMBER = ("", "nan", "na", "n/a", "null", "none")
# One DataFrame writes 3 with gaps as 3.0 to CSV and as a float to Parquet, and true as True and as a boolean.
_WHOLE, _TRUTH = r"^(-?[0-9]+)\.0+$", {"True": "true", "TRUE": "true", "False": "false", "FALSE": "false"}
# Of a date it writes the time to CSV where any has one, and to Parquet always, with as many digits as the unit has.
_TIME = r"^([0-9]{4}-[0-9]{2}-[0-9]{2})(?:[ T]00:00:00|([ T][0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]*[1-9])?))(?:\.?0+)?$"
_FNV_BASIS, _FNV_PRIME = 0xCBF29CE484222325, 0x100000001B3


def arrow(column: Any) -> Any:
    """One pyarrow array with the values of a column; nan of other libraries is no value."""
    import pyarrow as pa

    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    elif not isinstance(column, pa.Array):
        column = pa.array(column, from_pandas=True)
    if isinstance(column, pa.ChunkedArray):  # where one array cannot hold them
        column = pa.concat_arrays(column.chunks)
    kind = column.type
    if pa.types.is_dictionary(kind):
        return arrow(column.cast(kind.value_type))
    # What other writers take texts and lists for, and few functions of pyarrow know.
    if pa.types.is_string_view(kind) or pa.types.is_binary(kind) or pa.types.is_binary_view(kind):
        return column.cast(pa.string())
    if pa.types.is_large_binary(kind):
        return column.cast(pa.large_string())
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return pa.array(column.to_pylist(), pa.large_list(kind.value_type))  # pyarrow's cast is wrong for a slice
    return column


def distinct(column: Any) -> tuple[list[str], np.ndarray]:
    """Distinct values of a column [B] as texts, and which of them each row has [B].

    Texts have no space around them. A number that is whole is written as one, so that 3 is the same value in a column
    of integers, of floats and of texts, which may say 3.0, a truth value is true or false, and a time of day is left
    out where it is midnight. No value is the empty text. Raises ValueError for a column of lists.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    array = arrow(column)
    if _is_list(array.type):
        raise ValueError("expected one value a row, got lists")
    if pa.types.is_nested(array.type):
        raise ValueError(f"expected one value a row, got values of type {array.type}")
    if pa.types.is_null(array.type):
        array = array.cast(pa.string())
    encoded = array.dictionary_encode()
    texts = _texts(encoded.dictionary)
    index = pc.fill_null(encoded.indices, len(texts)).to_numpy(zero_copy_only=False)
    if encoded.null_count:
        texts.append("")
    return texts, index


def text(value: Any) -> str:
    """A value from a schema, written as `distinct` writes those of a column."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    word = str(value).strip()
    return _TRUTH.get(word) or re.sub(_TIME, r"\1\2", re.sub(_WHOLE, r"\1", word))


def _texts(values: Any) -> list[str]:
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_decimal(values.type):
        return [text(int(v)) if v == int(v) else f"{v.normalize():f}" for v in values.to_pylist()]
    if pa.types.is_floating(values.type):
        return ["" if v != v else text(v) for v in values.to_pylist()]
    if pa.types.is_timestamp(values.type):
        values = values.cast(pa.string())
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        words = pc.replace_substring_regex(pc.utf8_trim_whitespace(values), _WHOLE, r"\1")
        words = pc.replace_substring_regex(words, _TIME, r"\1\2").to_pylist()
        return [_TRUTH.get(word, word) for word in words]
    return values.cast(pa.string()).to_pylist()


def numbers(column: Any) -> np.ndarray:
    """A column [B] as float64, with nan for no value; raises NotANumber for a text that is none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    array = arrow(column)
    if _is_list(array.type):
        raise ValueError("expected one number a row, got lists")
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        array = pc.utf8_trim_whitespace(array)
        missing = pc.is_in(pc.utf8_lower(array), pa.array(NO_NUMBER, array.type))
        array = pc.if_else(missing, pa.scalar(None, array.type), array)
    try:
        values = array.cast(pa.float64(), safe=False)
    except pa.ArrowNotImplementedError as error:
        raise ValueError(f"expected numbers, got values of type {array.type}") from error
    except pa.ArrowInvalid as error:
        raise NotANumber(array) from error
    return pc.fill_null(values, np.nan).to_numpy(zero_copy_only=False)


class NotANumber(ValueError):
    """A text where a number was expected; `position` is the first one's in its column."""

    def __init__(self, texts: Any) -> None:
        self.position, found = next(
            (i, value) for i, value in enumerate(texts.to_pylist()) if value is not None and not _is_number(value)
        )
        super().__init__(f"expected a number, got {found!r}")


def _is_number(value: str) -> bool:
    import pyarrow as pa

    try:
        pa.array([value]).cast(pa.float64())
    except pa.ArrowInvalid:
        return False
    return True


def items(column: Any, separator: str) -> tuple[Any, np.ndarray]:
    """Items of all rows one after the other as a pyarrow array, and how many each row has [B] int64.

    A row is a list, a text of items joined by `separator`, or, in a column of anything else, one item. No value and the
    empty text are rows without items.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    array = arrow(column)
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        empty = pc.equal(pc.utf8_trim_whitespace(array), "")
        array = pc.split_pattern(pc.if_else(empty, pa.scalar(None, array.type), array), separator)
    if not _is_list(array.type):
        return array.drop_null(), array.is_valid().to_numpy(zero_copy_only=False).astype(np.int64)
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    return pc.list_flatten(array), lengths.astype(np.int64)


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Positions starts[i], starts[i] + 1, ... of lengths[i] items, for all i one after the other."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)


def fnv1a(texts: Sequence[str]) -> np.ndarray:
    """The 64-bit FNV-1a hash of each text [N] uint64: for each byte of its UTF-8, h = (h xor byte) * prime."""
    data = [value.encode() for value in texts]
    lengths = np.fromiter(map(len, data), np.int64, len(data))
    starts = np.cumsum(lengths) - lengths
    joined = np.frombuffer(b"".join(data), np.uint8).astype(np.uint64)
    hashes = np.full(len(data), _FNV_BASIS, np.uint64)
    live, at = np.arange(len(data)), 0
    while len(live := live[lengths[live] > at]):
        hashes[live] = (hashes[live] ^ joined[starts[live] + at]) * np.uint64(_FNV_PRIME)
        at += 1
    return hashes


def uniform(rows: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each row number [N], the same everywhere: SplitMix64's output function of it."""
    z = (rows.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53
