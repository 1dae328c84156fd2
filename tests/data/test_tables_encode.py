"""Columns become what a model takes: against pandas and scikit-learn, and what is wrong with a value."""

import json
from itertools import pairwise

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.preprocessing import StandardScaler

from zoo.data.tables_encode import Preparation, columns_needed
from zoo.data.tables_files import Chunk, open_files
from zoo.data.tables_rows import Rows
from zoo.data.tables_schema import Bag, Categorical, Dense, Schema, Sequence, Target
from zoo.data.tables_values import fnv1a

CLICK = Target("click")


def schema(*features, tasks=(CLICK,), **rest):
    return Schema(features, tasks, **rest)


def encoded(feature, training, others=None, **rest):
    """Rows of one feature, learnt from `training`, of `others`."""
    made = schema(feature, **rest)
    name = feature.column or feature.name
    preparation = Preparation.fit(made, {name: training})
    return preparation.encode({name: training if others is None else others}, labels=False)


def ids(*args, **rest):
    return encoded(*args, **rest).ids[:, 0].tolist()


def listed(jagged):
    return [jagged.values[a:b].tolist() for a, b in zip(jagged.offsets[:-1], jagged.offsets[1:])]


def test_a_vocabulary_numbers_values_by_how_often_they_are_seen_and_0_is_any_other():
    random = np.random.default_rng()
    seen = random.choice([f"v{i}" for i in range(30)], 500, p=random.dirichlet(np.ones(30)))
    others = random.choice([f"v{i}" for i in range(60)], 200)
    counts = pd.Series(seen).value_counts().reset_index()
    counts.columns = ["value", "count"]
    order = counts.sort_values(["count", "value"], ascending=[False, True]).value.tolist()
    expected = pd.Series(others).map({v: i for i, v in enumerate(order, 1)}).fillna(0).astype(int).tolist()
    assert ids(Categorical("c"), seen, others) == expected
    preparation = Preparation.fit(schema(Categorical("c")), {"c": seen})
    assert preparation.schema["c"].num_embeddings == len(set(seen)) + 1
    # A smaller table keeps the most frequent.
    kept = [i if i < 10 else 0 for i in expected]
    assert ids(Categorical("c", num_embeddings=10), seen, others) == kept


def test_a_vocabulary_does_not_depend_on_types_chunks_or_the_order_of_rows():
    random = np.random.default_rng()
    values = random.integers(0, 50, 300)
    whole = Preparation.fit(schema(Categorical("c")), {"c": values})
    shuffled = random.permutation(values).astype(str)
    chunks = [Chunk(np.arange(7), {"c": shuffled[i : i + 7]}) for i in range(0, 300, 7)]
    assert Preparation.fit(schema(Categorical("c")), chunks) == whole
    found = whole.encode({"c": values}, labels=False).ids
    np.testing.assert_array_equal(whole.encode({"c": values.astype(float)}, labels=False).ids, found)


def test_one_frame_has_the_same_ids_from_csv_and_from_parquet(tmp_path):
    random = np.random.default_rng()
    frame = pd.DataFrame({"gaps": random.integers(0, 9, 200).astype(float), "yes": random.random(200) < 0.4})
    frame.loc[random.random(200) < 0.2, "gaps"] = np.nan
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    hashed, bag = Categorical("h", "gaps", ids="hash", num_embeddings=50), Bag("b", "gaps")
    made = schema(Categorical("gaps"), hashed, Categorical("yes"), bag)
    chunks = [next(open_files(str(tmp_path / f"a.{kind}")).chunks(["gaps", "yes"])) for kind in ("csv", "parquet")]
    for trained in chunks:
        preparation = Preparation.fit(made, trained.columns)
        one, other = (preparation.encode(chunk.columns, labels=False) for chunk in chunks)
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.jagged["b"].values, other.jagged["b"].values)
        assert (one.ids[:, [0, 2]] > 0).all()


@pytest.mark.parametrize("frequency", ["D", "12h", "7min", "250ms"])
@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_a_date_has_one_id_whatever_writes_it(frequency, unit, tmp_path):
    """Pandas' CSV and Parquet of any unit, and Python's ISO format; a model must not take them for unseen."""
    dates = pd.date_range("2024-02-28 00:00", periods=30, freq=frequency)
    if unit == "s" and frequency == "250ms":
        dates = dates.floor("s")
    frame = pd.DataFrame({"day": dates})
    frame.to_csv(tmp_path / "a.csv", index=False)
    pq.write_table(pa.table({"day": pa.array(dates.as_unit(unit))}), tmp_path / "a.parquet")
    forms = [next(open_files(str(tmp_path / f"a.{kind}")).chunks(["day"])).columns for kind in ("csv", "parquet")]
    forms.append({"day": [date.isoformat(" ") for date in dates.to_pydatetime()]})
    for trained in forms:
        for ids in ({}, {"ids": "hash", "num_embeddings": 10**6}):
            preparation = Preparation.fit(schema(Categorical("day", **ids)), trained)
            found = [preparation.encode(form, labels=False).ids[:, 0].tolist() for form in forms]
            assert found[0] == found[1] == found[2]
            assert len(set(found[0])) == dates.nunique()


def test_a_vocabulary_that_was_saved_with_fractions_is_still_known():
    preparation = Preparation(schema(Categorical("c", num_embeddings=4)), {"c": ("3.0", "x", "3")}, {})
    assert preparation.encode({"c": ["3.0", "3", "x", "y"]}, labels=False).ids[:, 0].tolist() == [1, 1, 2, 0]


def test_features_that_share_a_table_share_its_vocabulary():
    features = Categorical("item"), Sequence("seen", table="item"), Categorical("other", column="item", table="mine")
    columns = {"item": ["a", "b", "b"], "seen": ["c|b", "", "c|c|c"]}
    preparation = Preparation.fit(schema(*features), columns)
    assert preparation.vocabularies == {"item": ("c", "b", "a"), "mine": ("b", "a")}
    assert [f.num_embeddings for f in preparation.schema.features] == [4, 4, 3]
    rows = preparation.encode(columns, labels=False)
    assert rows.ids.tolist() == [[3, 2], [2, 1], [2, 1]]
    assert listed(rows.jagged["seen"]) == [[1, 2], [], [1, 1, 1]]


def test_features_that_share_a_table_must_agree_on_it():
    features = Categorical("a", table="t", num_embeddings=5), Bag("b", table="t", num_embeddings=6)
    with pytest.raises(
        ValueError, match="table 't': expected one num_embeddings, got 5 from feature 'a' and 6 from 'b'"
    ):
        Preparation.fit(schema(*features), {"a": ["x"], "b": ["y"]})
    features = Categorical("a", table="t", num_embeddings=5), Categorical("b", table="t", ids="hash", num_embeddings=5)
    with pytest.raises(ValueError, match="table 't': expected one ids, got 'vocabulary' from"):
        Preparation.fit(schema(*features), {"a": ["x"], "b": ["y"]})


def test_hashed_ids_are_the_hash_of_the_text_below_the_size_of_the_table():
    random = np.random.default_rng()
    values = random.integers(0, 10**12, 500)
    expected = (fnv1a([str(v) for v in values]) % np.uint64(97)).tolist()
    feature = Categorical("c", ids="hash", num_embeddings=97)
    assert ids(feature, values) == ids(feature, values.astype(str)) == expected
    assert len(set(expected)) > 80  # they spread


def test_an_index_is_the_number_itself():
    feature = Categorical("c", ids="index", num_embeddings=8)
    assert ids(feature, [3, 0, 7]) == ids(feature, ["3", "0", " 7"]) == ids(feature, [3.0, 0.0, 7.0]) == [3, 0, 7]


@pytest.mark.parametrize("value", ["8", "-1", "two", "", "1.5", "9" * 30])
def test_an_id_out_of_range_is_an_error_that_says_where_or_hashed_by_choice(value):
    columns = {"c": ["3", "7", value, "0", value]}
    made = schema(Categorical("c", ids="index", num_embeddings=8))
    message = rf"^feature 'c', row 12: expected an id from 0 to 7, got '{value}'"
    with pytest.raises(ValueError, match=message):
        Preparation.fit(made, columns).encode(columns, first_row=10, labels=False)
    hashed = ids(Categorical("c", ids="index", num_embeddings=8, out_of_range="hash"), columns["c"])
    [elsewhere] = (fnv1a([value]) % np.uint64(8)).tolist()
    assert hashed == [3, 7, elsewhere, 0, elsewhere]


def test_an_id_out_of_range_in_a_list_is_found_in_its_row():
    made = schema(Bag("c", ids="index", num_embeddings=8))
    columns = {"c": [[1], [], [2, 3, 9], [4]]}
    with pytest.raises(ValueError, match=r"feature 'c', row 2: expected an id from 0 to 7, got '9'"):
        Preparation.fit(made, columns).encode(columns, labels=False)


@pytest.mark.parametrize("form", ["list", "text"])
def test_bags_keep_all_their_ids_and_weights(form):
    random = np.random.default_rng()
    rows = [random.integers(0, 9, size).tolist() for size in random.integers(0, 5, 50)]
    weights = [random.random(len(row)).astype(np.float32).tolist() for row in rows]
    if form == "text":
        columns = {"b": ["|".join(map(str, r)) for r in rows], "w": ["|".join(map(str, w)) for w in weights]}
    else:
        columns = {"b": pa.array(rows), "w": pa.array(weights)}
    features = (
        Bag("b", ids="index", num_embeddings=9, weights="w"),
        Bag("plain", column="b", ids="index", num_embeddings=9),
    )
    found = Preparation.fit(schema(*features), columns).encode(columns, labels=False).jagged
    assert listed(found["b"]) == listed(found["plain"]) == rows
    np.testing.assert_allclose(found["b"].weights, [w for row in weights for w in row], rtol=1e-6)
    assert found["plain"].weights is None


def test_another_separator():
    rows = encoded(Bag("b", ids="index", num_embeddings=9, separator=";"), ["1;2", "3"])
    assert listed(rows.jagged["b"]) == [[1, 2], [3]]


def test_weights_must_be_numbers_and_one_an_id():
    made = schema(Bag("b", weights="w"))
    for weights, message in (
        (["1|2", "1|2|3", "1"], r"^feature 'b', row 1: expected a weight for each of 2 ids, got 3$"),
        (["1|2", "1|x", "1"], r"^feature 'b': weights, row 1: expected a number, got 'x'$"),
        (["1|2", "1|3", "nan"], r"^feature 'b', row 2: expected finite weights, got nan$"),
    ):
        with pytest.raises(ValueError, match=message):
            Preparation.fit(made, {"b": ["p|q", "q|r", "p"], "w": weights})


def test_a_sequence_keeps_its_last_ids_in_order():
    random = np.random.default_rng()
    rows = [random.integers(0, 100, size).tolist() for size in random.integers(0, 9, 60)]
    found = encoded(Sequence("s", ids="index", num_embeddings=100, max_length=4), pa.array(rows)).jagged["s"]
    assert listed(found) == [row[-4:] for row in rows]
    # What is cut off is not learnt either.
    assert Preparation.fit(schema(Sequence("s", max_length=2)), {"s": ["a|b|c"]}).vocabularies == {"s": ("b", "c")}


@pytest.mark.parametrize("transform", ["none", "log", "standard", "log_standard"])
def test_dense_features_are_transformed_as_scikit_learn_does(transform):
    random = np.random.default_rng()
    training, others = random.standard_normal((2, 300)) * 50 + 1000
    expected = np.stack([training, others])
    if "log" in transform:
        expected = np.sign(expected) * np.log(1 + np.abs(expected))
    if "standard" in transform:
        scaler = StandardScaler().fit(expected[:1].T)
        expected[1] = scaler.transform(expected[1:].T)[:, 0]
    found = encoded(Dense("d", transform=transform), training, others).dense
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[:, 0], expected[1], rtol=1e-5, atol=1e-5)


def test_moments_learnt_in_chunks_are_those_of_all_rows():
    values = np.random.default_rng().standard_normal(1000) + 1e4
    chunks = [Chunk(np.arange(n), {"d": values[at : at + n]}) for at, n in ((0, 1), (1, 0), (1, 600), (601, 399))]
    mean, deviation = Preparation.fit(schema(Dense("d", transform="standard")), chunks).moments["d"]
    assert (mean, deviation) == pytest.approx((values.mean(), values.std()), rel=1e-12)
    constant = encoded(Dense("d", transform="standard"), [7.0, 7.0, 7.0]).dense
    assert constant.tolist() == [[0], [0], [0]]


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e15 + 0.3, -7e-20])
def test_a_number_that_never_changed_in_training_is_not_divided_by_a_rounding_error(value):
    chunks = [Chunk(np.arange(n), {"d": np.full(n, value)}) for n in (3, 7, 1000)]
    for transform in ("standard", "log_standard"):
        feature = Dense("d", transform=transform)
        preparation = Preparation.fit(schema(feature), chunks)
        logged = [np.sign(v) * np.log1p(abs(v)) if "log" in transform else v for v in (value, value + 1)]
        found = preparation.encode({"d": [value, value + 1]}, labels=False).dense[:, 0]
        np.testing.assert_allclose(found, np.array(logged) - logged[0], rtol=1e-6, atol=0)


def test_a_missing_number_is_an_error_that_names_row_and_column_unless_something_stands_in():
    columns = {"price": ["1", "", "2"]}
    message = r"^feature 'd', row 1: expected a number in column 'price', got nan"
    with pytest.raises(ValueError, match=message):
        encoded(Dense("d", column="price"), columns["price"])
    filled = encoded(Dense("d", column="price", transform="log", missing=5.0), columns["price"]).dense
    np.testing.assert_allclose(filled[:, 0], np.log1p([1, 5, 2]), rtol=1e-6)
    # It counts in the mean as any other.
    standard = Dense("d", transform="standard", missing=0.0)
    assert Preparation.fit(schema(standard), {"d": [None, 4.0]}).moments == {"d": (2.0, 2.0)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, np.inf], r"feature 'd', row 1: expected a finite number, got inf"),
        ([1.0, 1e60], r"feature 'd', row 1: expected a finite number, got 1e\+60"),
        (["1", "two"], r"feature 'd', row 1: expected a number, got 'two'"),
        ([[1.0], [2.0]], r"feature 'd': expected one number a row, got lists"),
    ],
)
def test_a_dense_value_that_is_no_finite_number_is_an_error(values, message):
    with pytest.raises(ValueError, match=message):
        encoded(Dense("d"), values)


def labels(task, values):
    made = Schema((Categorical("c"),), (task,))
    columns = {"c": ["x"] * len(values), "y": values}
    return Preparation.fit(made, columns).encode(columns, first_row=5).labels[:, 0]


def test_binary_labels_are_0_and_1_in_any_writing():
    expected = [1, 0, np.nan]
    for values in ([1, 0, None], ["1", "0", ""], [1.0, 0.0, np.nan], [True, False, None], ["True", "False", "nan"]):
        np.testing.assert_array_equal(labels(Target("t", "y"), values), expected)
    with pytest.raises(ValueError, match=r"^label of task 't', row 7: expected 0 or 1, got '2'$"):
        labels(Target("t", "y"), [0, 1, 2, 3])


def test_with_positive_a_label_is_1_where_the_column_holds_one_of_the_values():
    grades = [5, 4, 3, None, 1]
    for values in (grades, [None if g is None else float(g) for g in grades], ["5 ", "4", "3", "", "1"]):
        np.testing.assert_array_equal(labels(Target("t", "y", positive=(4, 5)), values), [1, 1, 0, np.nan, 0])
    np.testing.assert_array_equal(labels(Target("t", "y", positive=("buy",)), ["buy", "none", "Buy"]), [1, 0, 0])
    np.testing.assert_array_equal(labels(Target("t", "y", positive=(True,)), [True, False]), [1, 0])
    # YAML reads `positive: [yes]` as true, and other programs write True, or 1 as 1.0.
    for values in (["True", "False", ""], ["yes", "no", ""], ["on", "off", None]):
        np.testing.assert_array_equal(labels(Target("t", "y", positive=(True,)), values), [1, 0, np.nan])
        np.testing.assert_array_equal(labels(Target("t", "y", positive=(False,)), values), [0, 1, np.nan])
    np.testing.assert_array_equal(labels(Target("t", "y", positive=(1, 3)), ["1.0", "3.00", "2", "x"]), [1, 1, 0, 0])


def test_regression_and_ordinal_labels():
    np.testing.assert_array_equal(labels(Target("t", "y", "regression"), ["1.5", "", "-2"]), [1.5, np.nan, -2])
    with pytest.raises(ValueError, match=r"label of task 't', row 5: expected a finite number, got inf"):
        labels(Target("t", "y", "regression"), [np.inf])
    ordinal = Target("t", "y", "ordinal", classes=5)
    np.testing.assert_array_equal(labels(ordinal, [0, 4, None]), [0, 4, np.nan])
    for value in (5, -1, 1.5):
        with pytest.raises(ValueError, match=rf"row 6: expected a whole number from 0 to 4, got {value}"):
            labels(ordinal, [0.0, value])


def test_a_label_that_is_given_another_is_read_everywhere():
    tasks = CLICK, Target("buy", given="click")
    columns = {"c": ["x"] * 4, "click": [0, 0, 1, 1], "buy": [0, None, 0, 1]}
    made = Schema((Categorical("c"),), tasks)
    found = Preparation.fit(made, columns).encode(columns).labels
    np.testing.assert_array_equal(found, [[0, 0], [0, np.nan], [1, 0], [1, 1]])


def test_groups_are_whole_numbers_or_hashes_and_weights_are_read():
    made = schema(Categorical("c"), group="user", weight="w")
    columns = {"c": ["x"] * 4, "click": [0, 1, 0, 1], "user": ["7", "bob", "-3", "bob"], "w": [1, 0.5, 0, 2]}
    rows = Preparation.fit(made, columns).encode(columns)
    [bob] = (fnv1a(["bob"]) // 2).tolist()
    assert rows.group.tolist() == [7, bob, -3, bob]
    assert rows.weight.tolist() == [1, 0.5, 0, 2]
    for bad, found in ((-1.0, "-1"), (None, "nan")):
        with pytest.raises(ValueError, match=rf"sample weight 'w', row 1: expected 0 or more, got {found}"):
            Preparation.fit(made, columns).encode({**columns, "w": [1.0, bad, 1.0, 1.0]})


def test_without_labels_only_features_are_read():
    made = schema(Categorical("c"), group="user", weight="w")
    rows = Preparation.fit(made, {"c": ["x"]}).encode({"c": ["x", "y"]}, first_row=np.array([4, 9]), labels=False)
    assert rows.numbers.tolist() == [4, 9]
    assert np.isnan(rows.labels).all()
    assert rows.labels.shape == (2, 1)
    assert rows.group is None
    assert rows.weight is None


def test_a_column_that_is_not_there_is_named_with_the_nearest_and_who_wants_it():
    made = schema(Dense("age"), Bag("tags", weights="tag_weights"), tasks=(Target("buy", "bought"),), group="user")
    names = ["age", "tags", "tag_weights", "bought", "user"]
    assert columns_needed(made, names) == names
    assert columns_needed(made, names, labels=False) == names[:3]
    for gone, who in (
        ("age", "feature 'age'"),
        ("tag_weights", "weights of feature 'tags'"),
        ("bought", "label of task 'buy'"),
        ("user", "group"),
    ):
        near = [name if name != gone else f"{gone}s" for name in names]
        message = rf"unknown column \({who}\) '{gone}'; did you mean {gone}s"
        with pytest.raises(ValueError, match=message):
            columns_needed(made, near)
    with pytest.raises(ValueError, match=r"unknown column \(feature 'age'\) 'age'"):
        Preparation.fit(made, {name: ["1"] for name in names}).encode({"ages": ["1"]})


def everything():
    """A schema with all there is, and random columns for it."""
    random = np.random.default_rng()
    lists = [random.integers(0, 20, n).tolist() for n in random.integers(0, 6, 100)]
    features = (
        Dense("d", transform="log_standard", missing=0.0),
        Categorical("c"),
        Bag("b", table="shared"),
        Bag("w", column="b", weights="weights", ids="hash", num_embeddings=11),
        Sequence("s", column="b", table="shared", max_length=3),
        Categorical("i", column="c", ids="hash", num_embeddings=5),
    )
    tasks = Target("t", positive=("yes", 1)), Target("r", kind="regression", weight=0.5)
    columns = {
        "d": [None if v < -1 else v for v in random.standard_normal(100)],
        "c": random.choice(["a", "b", "ü"], 100),
        "b": pa.array(lists),
        "weights": pa.array([random.random(len(row)).tolist() for row in lists]),
        "t": random.choice(["yes", "no", ""], 100),
        "r": random.standard_normal(100),
        "g": random.integers(0, 5, 100),
        "v": random.random(100),
    }
    return Schema(features, tasks, dim=4, group="g", domain="c", weight="v"), columns


def same(a, b):
    for name in ("numbers", "dense", "ids", "labels", "group", "weight"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    for name, jagged in a.jagged.items():
        for part in ("values", "offsets", "weights"):
            np.testing.assert_array_equal(getattr(jagged, part), getattr(b.jagged[name], part))


def test_a_preparation_that_was_saved_encodes_as_before(tmp_path):
    made, columns = everything()
    preparation = Preparation.fit(made, columns)
    preparation.save(tmp_path / "model")
    loaded = Preparation.load(tmp_path / "model")
    assert loaded == preparation
    assert loaded.difference(preparation) is None
    same(loaded.encode(columns), preparation.encode(columns))
    json.loads((tmp_path / "model" / "preparation.json").read_text())


def test_what_is_wrong_with_a_saved_preparation_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no preparation\.json in"):
        Preparation.load(tmp_path)
    (tmp_path / "preparation.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"preparation\.json is not what Preparation\.save writes \(KeyError: 'schema'\)"
    ):
        Preparation.load(tmp_path)


def test_rows_encoded_in_parts_are_those_encoded_at_once():
    made, columns = everything()
    preparation = Preparation.fit(made, columns)
    cuts = [0, 1, 1, 40, 100]
    parts = [
        preparation.encode({name: column[a:b] for name, column in columns.items()}, first_row=a)
        for a, b in pairwise(cuts)
    ]
    same(Rows.joined(parts), preparation.encode(columns))


def test_two_preparations_differ_in_what_is_named():
    made, columns = everything()
    preparation = Preparation.fit(made, columns)
    fewer = Preparation.fit(made, {name: column[:50] for name, column in columns.items()})
    first = ("vocabulary 'c'", "vocabulary 'shared'", "feature 'b'", "mean and deviation of 'd'")
    assert preparation.difference(fewer) in first  # as the rows were drawn
    other = Preparation.fit(Schema(made.features, made.tasks[:1], group="g", dim=4), columns)
    assert preparation.difference(other) == "task 'r'"


def test_what_is_kept_is_compact():
    made, columns = everything()
    rows = Preparation.fit(made, columns).encode(columns)
    assert rows.ids.dtype == rows.jagged["b"].values.dtype == np.int32
    assert rows.dense.dtype == rows.labels.dtype == rows.jagged["w"].weights.dtype == np.float32
