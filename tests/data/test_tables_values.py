"""Columns as numbers: distinct values, lists, numbers, and hashes that are the same in every process."""

from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from zoo.data.tables_values import NotANumber, distinct, fnv1a, items, numbers, spans, text, uniform


def plain_fnv1a(data: bytes) -> int:
    value = 0xCBF29CE484222325
    for byte in data:
        value = ((value ^ byte) * 0x100000001B3) % 2**64
    return value


def test_the_hash_has_the_published_values_of_fnv1a():
    # Test vectors of the authors' FNV page.
    published = {"": 0xCBF29CE484222325, "a": 0xAF63DC4C8601EC8C, "foobar": 0x85944171F73967E8}
    assert dict(zip(published, fnv1a(list(published)).tolist())) == published


def test_the_hash_of_many_texts_is_that_of_each():
    random = np.random.default_rng()
    texts = ["".join(map(chr, random.integers(32, 3000, size))) for size in random.integers(0, 40, 200)]
    assert fnv1a(texts).tolist() == [plain_fnv1a(t.encode()) for t in texts]
    assert fnv1a([]).tolist() == []


def test_row_numbers_are_spread_evenly_by_splitmix64():
    # First outputs of the reference implementation seeded with 0.
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    np.testing.assert_array_equal(uniform(np.arange(3)), [(z >> 11) / 2**53 for z in published])
    counts = np.histogram(uniform(np.arange(100_000)), bins=20, range=(0, 1))[0]
    assert ((counts - 5000) ** 2 / 5000).sum() < 44  # chi-squared with 19 degrees of freedom, beyond the 0.999 quantile


def test_distinct_values_put_together_again_are_the_column():
    random = np.random.default_rng()
    words = random.choice(["red", " green", "blue ", "", "ñandú"], 300)
    texts, index = distinct(pa.chunked_array([words[:100].tolist(), words[100:].tolist()]))
    assert [texts[i] for i in index] == [w.strip() for w in words]
    assert len(set(texts)) == len(set(map(str.strip, words.tolist())))
    codes, _ = pd.factorize(pd.Series(words).str.strip())
    np.testing.assert_array_equal(pd.factorize(index)[0], codes)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([3, None, 12, 3]),
        pa.array([3.0, None, 12.0, 3.0]),
        pa.array([3.0, float("nan"), 12.0, 3.0]),
        pa.array(["3", None, "12 ", "3"]),
        pa.array(["3.0", None, "12.00 ", "3"]),
        pa.array(["3", None, "12 ", "3"]).cast(pa.string_view()),
        pa.array([b"3", None, b"12 ", b"3"]),
        pa.array([b"3", None, b"12 ", b"3"], pa.large_binary()),
        pa.array([Decimal("3.00"), None, Decimal("12.00"), Decimal("3.00")]),
        pa.array(["3", "", "12", "3"]).dictionary_encode(),
        [3, None, 12, 3],
        np.array([3.0, np.nan, 12.0, 3.0]),
        pd.Series([3, None, 12, 3]),
    ],
    ids=[
        "int",
        "float",
        "nan",
        "text",
        "written",
        "view",
        "binary",
        "large_binary",
        "decimal",
        "dictionary",
        "list",
        "numpy",
        "pandas",
    ],
)
def test_a_whole_number_is_the_same_value_in_a_column_of_any_type(column):
    texts, index = distinct(column)
    assert [texts[i] for i in index] == ["3", "", "12", "3"]


def test_other_types_have_texts_too():
    texts, index = distinct(pa.array([True, False, None]))
    assert [texts[i] for i in index] == ["true", "false", ""]
    assert distinct(pa.array([2.5]))[0] == ["2.5"]
    assert distinct(pa.array(["True", "FALSE", "true", "Truelove"]))[0] == ["true", "false", "true", "Truelove"]
    kept = ["1.0.0", "v1.0", "1.05", "10", ".0"]
    assert distinct(pa.array([*kept, "-4.0"]))[0] == [*kept, "-4"]
    kept = ["2024-01-01", "2024-01-01 10:30:00", "2024-01-01 00:00", "00:00:00", "2024-01-01T00:00:00Z", "x 00:00:00.0"]
    dated = ["2024-01-01 00:00:00.000000", "2024-01-01T00:00:00", "2024-01-01 00:00:00.250", "2024-01-01 10:00:00.0"]
    written = ["2024-01-01", "2024-01-01", "2024-01-01 00:00:00.25", "2024-01-01 10:00:00"]
    assert distinct(pa.array([*kept, *dated]))[0] == [*kept, *written]
    assert [text(value) for value in [*kept, *dated]] == [*kept, *written]
    assert distinct(pa.nulls(3))[0] == [""]
    assert distinct(pa.array([], pa.string()))[0] == []
    assert [text(v) for v in (True, 4.0, 4, 2.5, " a ", "4.0", "True")] == ["true", "4", "4", "2.5", "a", "4", "true"]
    assert distinct(pa.array([Decimal("2.50"), Decimal("0.05")]))[0] == ["2.5", "0.05"]
    with pytest.raises(ValueError, match="expected one value a row, got lists"):
        distinct(pa.array([[1]]))
    with pytest.raises(ValueError, match="expected one value a row, got values of type struct"):
        distinct(pa.array([{"a": 1}]))


def test_numbers_are_those_that_python_reads_and_nan_where_there_is_none():
    random = np.random.default_rng()
    values = random.standard_normal(100) * 10.0 ** random.integers(-20, 20, 100)
    texts = [f" {v!r}" for v in values.tolist()] + ["1e3", "+5", "-0 "]
    nothing = ["", " ", "NaN", "NA", "null", "None", "n/a", None]
    expected = [*map(float, texts), *[np.nan] * len(nothing)]
    np.testing.assert_array_equal(numbers(pa.array(texts + nothing)), expected)


def test_numbers_of_any_numeric_type():
    for column in (pa.array([1, None, 0]), pa.array([1.0, None, 0.0], pa.float32()), pa.array([True, None, False])):
        np.testing.assert_array_equal(numbers(column), [1, np.nan, 0])
    np.testing.assert_array_equal(numbers(pa.nulls(2)), [np.nan, np.nan])


def test_a_text_that_is_no_number_is_found():
    with pytest.raises(NotANumber, match="expected a number, got '1_0'") as raised:
        numbers(["1", "", "1_0", "x"])
    assert raised.value.position == 2
    with pytest.raises(ValueError, match="expected numbers, got values of type struct"):
        numbers(pa.array([{"a": 1}]))


def test_items_of_texts_and_of_lists_are_the_same():
    rows = [["a", "b"], [], ["c"], ["", "d"], None]
    joined = ["|".join(row) if row is not None else None for row in rows]
    expected = [item for row in rows for item in row or []]
    kinds = (pa.list_(pa.string()), pa.large_list(pa.string()), pa.list_view(pa.string()))
    texts = (pa.string(), pa.string_view(), pa.binary())
    for column in (*(pa.array(rows, kind) for kind in kinds), *(pa.array(joined).cast(kind) for kind in texts)):
        for cut in (column, pa.concat_arrays([column[:1], column])[1:]):  # also one that starts inside its buffers
            values, lengths = items(cut, "|")
            assert values.to_pylist() == expected
            assert lengths.tolist() == [2, 0, 1, 2, 0]
    values, lengths = items(pa.array([5, None, 7]), "|")
    assert (values.to_pylist(), lengths.tolist()) == ([5, 7], [1, 0, 1])


def test_spans_are_ranges_one_after_the_other():
    random = np.random.default_rng()
    starts, lengths = random.integers(0, 1000, 50), random.integers(0, 5, 50)
    expected = [at for start, length in zip(starts, lengths) for at in range(start, start + length)]
    assert spans(starts, lengths).tolist() == expected
    assert spans(np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []
