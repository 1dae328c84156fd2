"""Batches of table rows: what a model sees of the rows at given places, padded or not."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from zoo.data import Loader
from zoo.data.tables_batch import random_batch
from zoo.data.tables_encode import Preparation
from zoo.data.tables_schema import Bag, Categorical, Dense, Schema, Sequence, Target

SCHEMA = Schema(
    (
        Dense("d"),
        Categorical("c", ids="index", num_embeddings=50),
        Bag("b", ids="index", num_embeddings=50),
        Bag("w", ids="index", num_embeddings=50, weights="weights"),
        Categorical("e", column="c", ids="index", num_embeddings=50),
        Sequence("s", column="b", ids="index", num_embeddings=50, max_length=2),
    ),
    (Target("t"), Target("r", kind="regression")),
    group="g",
    weight="v",
)
COUNT = 60


@pytest.fixture(scope="module")
def columns():
    random = np.random.default_rng()
    lists = [random.integers(0, 50, n).tolist() for n in random.integers(0, 5, COUNT)]
    return {
        "d": random.standard_normal(COUNT),
        "c": random.integers(0, 50, COUNT),
        "b": lists,
        "w": lists[::-1],
        "weights": [random.random(len(row)).tolist() for row in lists[::-1]],
        "t": random.choice([0.0, 1.0, np.nan], COUNT),
        "r": random.standard_normal(COUNT),
        "g": random.integers(0, 9, COUNT),
        "v": random.random(COUNT),
    }


@pytest.fixture(scope="module")
def rows(columns):
    made = {name: pa.array(column) if isinstance(column, list) else column for name, column in columns.items()}
    return Preparation.fit(SCHEMA, made).encode(made, first_row=100)


def of(jagged, key):
    """Ids, and weights, of a feature by row."""
    lengths, values = jagged[key].lengths().tolist(), jagged[key].values().split(jagged[key].lengths().tolist())
    assert len(lengths) == jagged.stride()
    weights = jagged[key].weights_or_none()
    split = None if weights is None else [w.tolist() for w in weights.split(lengths)]
    return [v.tolist() for v in values], split


def test_a_batch_has_what_the_columns_say_of_its_rows(rows, columns):
    at = np.random.default_rng().integers(0, COUNT, 17).tolist()
    batch = rows.batch(at)
    assert len(batch) == 17
    assert batch.row.tolist() == [100 + i for i in at]
    assert (batch.ids.keys(), batch.weighted.keys(), batch.sequences.keys()) == (["c", "b", "e"], ["w"], ["s"])
    assert of(batch.ids, "c")[0] == of(batch.ids, "e")[0] == [[columns["c"][i]] for i in at]
    assert of(batch.ids, "b")[0] == [columns["b"][i] for i in at]
    ids, weights = of(batch.weighted, "w")
    assert ids == [columns["w"][i] for i in at]
    for found, i in zip(weights, at):
        assert found == pytest.approx(columns["weights"][i])
    assert of(batch.sequences, "s")[0] == [columns["b"][i][-2:] for i in at]
    np.testing.assert_allclose(batch.dense[:, 0], columns["d"][at], rtol=1e-6)
    np.testing.assert_allclose(batch.labels, np.stack([columns["t"][at], columns["r"][at]], 1), rtol=1e-6)
    assert batch.group.tolist() == columns["g"][at].tolist()
    np.testing.assert_allclose(batch.weight, columns["v"][at], rtol=1e-6)
    for jagged in (batch.ids, batch.weighted, batch.sequences):
        assert jagged.values().dtype == jagged.lengths().dtype == torch.int64


def test_a_row_that_fills_up_a_batch_counts_nowhere(rows):
    padded, real = rows.batch([3, -1, 5, -1]), rows.batch([3, 5])
    assert padded.row.tolist() == [103, -1, 105, -1]
    assert torch.isnan(padded.labels[[1, 3]]).all()
    assert padded.weight[[1, 3]].tolist() == padded.dense[[1, 3], 0].tolist() == [0, 0]
    for name in ("ids", "weighted", "sequences"):
        ours, theirs = getattr(padded, name), getattr(real, name)
        for key in ours.keys():  # noqa: SIM118 - a jagged tensor is no mapping
            assert [of(ours, key)[0][i] for i in (0, 2)] == of(theirs, key)[0]
            assert [of(ours, key)[0][i] for i in (1, 3)] == ([[0], [0]] if key in "ce" else [[], []])
    assert torch.equal(padded.dense[[0, 2]], real.dense)


def test_a_batch_of_nothing_and_one_of_only_filled_up_rows(rows):
    empty = rows.batch([])
    assert len(empty) == 0
    assert empty.ids.stride() == 0
    none = Preparation.fit(SCHEMA, {name: [] for name in [*"dcbwtrgv", "weights"]})
    nothing = none.encode({name: [] for name in ["d", "c", "b", "w", "weights"]}, labels=False)
    assert nothing.batch([-1, -1]).row.tolist() == [-1, -1]


def test_features_of_one_kind_only():
    only = Schema((Dense("d"),), (Target("t"),))
    batch = Preparation.fit(only, {"d": [1.0], "t": [0]}).encode({"d": [1.0], "t": [0]}).batch([0])
    assert (batch.ids, batch.weighted, batch.sequences, batch.group, batch.weight) == (None,) * 5
    ids = Schema((Categorical("c"),), (Target("t"),))
    batch = Preparation.fit(ids, {"c": ["x"]}).encode({"c": ["x"]}, labels=False).batch([0])
    assert batch.dense.shape == (1, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_takes_whole_batches_of_rows(rows, workers):
    seen = []
    for batch in Loader(rows, 8, shuffle=True, seed=3, num_workers=workers):
        assert len(batch) == 8
        again = rows.batch((batch.row - 100).tolist())
        assert torch.equal(batch.ids.values(), again.ids.values())
        assert torch.equal(batch.weighted.weights(), again.weighted.weights())
        seen += batch.row.tolist()
    assert len(set(seen)) == 56
    ranks = [[b.row.tolist() for b in Loader(rows, 7, rank=r, world_size=2)] for r in range(2)]
    assert [row for pair in zip(*ranks) for part in pair for row in part] == list(range(100, 160))


def test_a_batch_moves_as_a_whole(rows):
    batch = rows.batch([0, 1, 2]).to("meta")
    for part in (batch.row, batch.dense, batch.labels, batch.group, batch.weight):
        assert part.device.type == "meta"
    for jagged in (batch.ids, batch.weighted, batch.sequences):
        assert jagged.values().device.type == jagged.lengths().device.type == "meta"


def test_random_batches_fit_their_schema_and_are_drawn_from_the_generator():
    def draw(seed, **options):
        return random_batch(SCHEMA, 200, torch.Generator().manual_seed(seed), **options)

    batch = draw(1, most=3, unlabelled=0.25)
    assert (batch.ids.keys(), batch.weighted.keys(), batch.sequences.keys()) == (["c", "b", "e"], ["w"], ["s"])
    assert batch.ids["b"].lengths().unique().tolist() == [0, 1, 2, 3]
    assert batch.sequences.lengths().unique().tolist() == [0, 1, 2]  # no longer than the schema says
    assert batch.ids.values().unique().tolist() == list(range(50))
    assert 0.15 < batch.labels.isnan().float().mean() < 0.35
    assert set(batch.labels[:, 0].nan_to_num(0).tolist()) == {0, 1}
    again, other = draw(1, most=3, unlabelled=0.25), draw(2, most=3, unlabelled=0.25)
    assert torch.equal(batch.ids.values(), again.ids.values())
    assert not torch.equal(batch.dense, other.dense)
    assert len(random_batch(SCHEMA, 0)) == 0
    with pytest.raises(ValueError, match="feature 'c': num_embeddings is open; expected a schema fitted to data"):
        random_batch(Schema((Categorical("c"),), (Target("t"),)), 3)
