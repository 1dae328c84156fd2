"""What is wrong with a schema is said when it is read, not by what fails later, or silently learns something else."""

import numpy as np
import pytest

from zoo.data.tables_encode import Preparation
from zoo.data.tables_schema import Bag, Categorical, Dense, Schema, Target

FEATURES = {"x": {"kind": "dense"}, "c": {"kind": "categorical"}}
TASKS = {"click": {}, "buy": {"given": "click"}}


def schema(features=None, tasks=None, **rest):
    return {"features": {**FEATURES, **(features or {})}, "tasks": {**TASKS, **(tasks or {})}, **rest}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        # A text is a sequence of letters, none of which is a value of the column.
        (schema(tasks={"t": {"positive": "yes"}}), "positive of task 't': expected a list of values, got 'yes'"),
        (schema(tasks={"t": {"positive": True}}), "positive of task 't': expected a list of values, got True"),
        (schema(tasks={"t": {"positive": []}}), r"positive of task 't': expected a list of values, got \(\)"),
        (
            schema(tasks={"t": {"kind": "regression", "positive": [1]}}),
            "positive of task 't' is for a task of kind bin",
        ),
        (schema(tasks={"t": {"classes": 5}}), "classes of task 't' is for a task of kind ordinal, got kind binary"),
        (schema(tasks={"t": {"kind": "ordinal", "classes": "5"}}), "classes of task 't': expected a whole number, got"),
        (schema(tasks={"t": {"weight": -1}}), "weight of task 't' must be at least 0 and finite, got -1"),
        (schema(tasks={"t": {"weight": float("nan")}}), "weight of task 't': expected a number, got nan"),
        (schema(tasks={"t": {"given": "u"}, "u": {"given": "t"}}), "task 't' is given 'u'; .* none given itself"),
        (schema(tasks={"buy_joint": {}}), "column 'buy_joint' for buy and what it is given; name the task otherwise"),
        (schema(tasks={"row": {}}), "column 'row' for the number of a row; name the task otherwise"),
        (schema(tasks={"t": "binary"}), "task 't': expected keys and values, such as kind: ..., got 'binary'"),
        (schema(tasks={True: {}}), r"task True: expected a name \(YAML reads yes"),
        (
            schema({"c": {"kind": "categorical", "num_embeddings": "1e6"}}),
            "num_embeddings of feature 'c': expected a w",
        ),
        (schema({"c": {"kind": "categorical", "num_embeddings": 1e6}}), "expected a whole number, got 1000000.0"),
        (schema({"c": {"kind": "categorical", "num_embeddings": 2**31}}), "'c' must be at most 2147483647, got 2147"),
        (
            schema({"c": {"kind": "categorical", "out_of_range": "hash"}}),
            "out_of_range of feature 'c' is for ids 'index",
        ),
        (schema({"h": {"kind": "sequence", "target": "c"}}), "target of feature 'h' is for pooling 'attention', got"),
        (schema({"b": {"kind": "bag", "separator": ""}}), "separator of feature 'b': expected a text, got ''"),
        (schema({"x": {"kind": "dense", "missing": "0"}}), "missing of feature 'x': expected a number, got '0'"),
        (schema({"x": "dense"}), "feature 'x': expected keys and values, such as kind: ..., got 'dense'"),
        (schema(dim="8"), "dim: expected a whole number, got '8'"),
        (schema(dim=0), "dim must be at least 1, got 0"),
        (schema(group=["user"]), r"group: expected a text, got \('user',\)"),
        (None, "expected keys features and tasks, got None"),
    ],
)
def test_what_is_wrong_with_a_schema_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        Schema.read(given)


def test_names_and_columns_that_yaml_reads_as_numbers_are_texts():
    made = Schema.read(schema({101: {"kind": "dense"}, "d": {"kind": "dense", "column": 7}, "b": {"kind": "bag"}}))
    assert made.features[2:] == (Dense("101"), Dense("d", column="7"), Bag("b"))
    rows = Preparation.fit(made, {"x": [1], "c": ["a"], "101": [2], "7": [3], "b": ["a|b"], "click": [1], "buy": [0]})
    assert rows.schema["c"].num_embeddings == 2
    assert Schema.read(made.table()) == made


def test_sizes_may_be_numpys():
    made = Schema(
        (Categorical("c", num_embeddings=np.int64(9)),), (Target("t", weight=np.float32(2)),), dim=np.int32(4)
    )
    assert (made["c"].num_embeddings, made.dim) == (9, 4)


@pytest.mark.parametrize("given", ["user,item,click\n" * 10_000, {"features": "x" * 10_000, "tasks": {"a": {}}}])
def test_another_file_taken_for_a_schema_is_not_recited(given):
    with pytest.raises(ValueError, match="schema: expected") as told:
        Schema.read(given)
    assert len(str(told.value)) < 200
