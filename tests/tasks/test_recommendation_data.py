"""What recommendation models meet: every row once, on any number of processes, and as a trained model encodes it."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tasks.recommendation_data import RecommendationData, of_checkpoint

SCHEMA = {
    "features": {
        "item": {"kind": "categorical"},
        "price": {"kind": "dense"},
        "tags": {"kind": "bag"},
    },
    "tasks": {"click": {}, "stars": {"kind": "regression"}},
}
ROWS = 230


@pytest.fixture
def table(tmp_path):
    """Columns by name, in a file: the price of a row is its number."""
    random = np.random.default_rng()
    columns = {
        "item": [f"i{n}" for n in random.integers(0, 9, ROWS)],
        "price": list(range(ROWS)),
        "tags": ["|".join(f"t{n}" for n in random.integers(0, 5, random.integers(0, 4))) for _ in range(ROWS)],
        "click": random.integers(0, 2, ROWS),
        "stars": random.normal(size=ROWS).round(3),
    }
    write(tmp_path / "all.csv", columns)
    return columns


def write(path, columns):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values()))


def data(folder, rank=0, world=1, **options):
    """The data of one of several processes."""
    made = RecommendationData(str(folder / "all.csv"), SCHEMA, batch_size=16, **options)
    made.trainer = SimpleNamespace(distributed_sampler_kwargs={"rank": rank, "num_replicas": world})
    return made


def prices(loader):
    """Prices of the real rows of each batch."""
    return [batch.dense[batch.row >= 0, 0].int().tolist() for batch in loader]


def test_splits_hold_every_row_of_the_file_once_and_as_it_is(table, tmp_path):
    made, met = data(tmp_path), {}
    for split in ("train", "val", "test"):
        rows = made.rows(split)
        batch = rows.batch(range(len(rows)))
        ids = batch.ids.to_dict()
        starts = torch.cat([torch.zeros(1).long(), ids["tags"].lengths().cumsum(0)]).tolist()
        for i, price in enumerate(batch.dense[:, 0].int().tolist()):
            assert price not in met
            tags = ids["tags"].values()[starts[i] : starts[i + 1]].tolist()
            met[price] = (ids["item"].values()[i].item(), tags, batch.labels[i].tolist())
    assert sorted(met) == list(range(ROWS))
    numbers = {}  # of items and tags: each name has one, and unlike names unlike ones but for those unseen in training
    for price, (item, tags, labels) in met.items():
        names = [t for t in table["tags"][price].split("|") if t]
        assert len(tags) == len(names)
        for name, number in ((table["item"][price], item), *zip(names, tags)):
            assert numbers.setdefault(name, number) == number
        assert labels == pytest.approx([table["click"][price], table["stars"][price]], rel=1e-6)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_an_epoch_and_have_as_many_batches(world, table, tmp_path):
    loaders = [data(tmp_path, rank, world, held_out=0.2).train_dataloader() for rank in range(world)]
    first, second = ([prices(loader) for loader in loaders] for _ in range(2))
    for epoch in (first, second):
        assert len({len(batches) for batches in epoch}) == 1
        met = [price for batches in epoch for batch in batches for price in batch]
        assert len(set(met)) == len(met) == 138 // (16 * world) * 16 * world
    assert first != second
    # The same rows in the same order for any number of processes.
    joint = [price for together in zip(*first) for batch in together for price in batch]
    alone = [price for batch in prices(data(tmp_path, held_out=0.2).train_dataloader()) for price in batch]
    assert joint == alone[: len(joint)]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_meets_every_row_once_with_as_many_batches_on_every_process(world, table, tmp_path):
    made = [data(tmp_path, rank, world, held_out=0.2) for rank in range(world)]
    found = [prices(each.val_dataloader()) for each in made]
    assert len({len(batches) for batches in found}) == 1
    met = sorted(price for batches in found for batch in batches for price in batch)
    rows = made[0].rows("val")
    assert met == sorted(rows.batch(range(len(rows))).dense[:, 0].int().tolist())


@pytest.mark.parametrize("done", [1, 16, 50])
def test_an_epoch_goes_on_with_the_rows_that_are_left(done, table, tmp_path):
    whole = data(tmp_path).train_dataloader()
    batches = prices(whole)
    started = data(tmp_path).train_dataloader()
    steps = min(done, len(batches) - 1)
    reader = iter(started)
    for _ in range(steps):
        next(reader)
    resumed = data(tmp_path).train_dataloader()
    resumed.load_state_dict(started.state_dict())
    assert prices(resumed) == batches[steps:]
    assert prices(resumed) == prices(whole)  # and the next epoch is the same again


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("skip", [0, 37, ROWS])
def test_a_stream_gives_the_rows_that_are_left_in_order(skip, world, table, tmp_path):
    made = []
    for rank in range(world):
        one = data(tmp_path, rank, world, input=str(tmp_path / "all.csv"))
        one.trainer.lightning_module = SimpleNamespace(first_row=lambda paths: skip)
        made.append(list(one.predict_dataloader()))
    assert len({len(batches) for batches in made}) == 1
    met = []
    for together in zip(*made):
        for batch in together:
            met += [(n, int(p)) for n, p in zip(batch.row.tolist(), batch.dense[:, 0].tolist()) if n >= 0]
    assert met == [(n, n) for n in range(skip, ROWS)]


def test_rows_are_encoded_as_a_trained_model_does(table, tmp_path):
    trained = data(tmp_path)
    state = trained.state_dict()
    write(tmp_path / "all.csv", {name: list(reversed(values)) for name, values in table.items()})
    other = data(tmp_path)
    other.load_state_dict(state)
    ids = {}
    for made in (trained, other):
        rows = made.rows("train")
        batch = rows.batch(range(len(rows)))
        for price, item in zip(batch.dense[:, 0].int().tolist(), batch.ids.to_dict()["item"].values().tolist()):
            ids.setdefault(price, []).append(item)
    assert any(len(found) == 2 for found in ids.values())
    assert all(len(set(found)) == 1 for found in ids.values())


def test_a_model_of_another_schema_is_refused(table, tmp_path):
    state = data(tmp_path).state_dict()
    changed = RecommendationData(str(tmp_path / "all.csv"), {**SCHEMA, "dim": 16})
    assert changed.preparation.schema.dim == 16
    with pytest.raises(ValueError, match="its schema differs"):
        changed.load_state_dict(state)


def test_mistakes_are_named(table, tmp_path):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        RecommendationData(batch_size=0)
    with pytest.raises(ValueError, match=r"give data\.input"):
        data(tmp_path).check("predict")
    with pytest.raises(ValueError, match=r"\d+ rows do not fill one batch of 500"):
        RecommendationData(str(tmp_path / "all.csv"), SCHEMA, batch_size=500).train_dataloader()
    torch.save({"state_dict": {}}, tmp_path / "odd.ckpt")
    with pytest.raises(ValueError, match="no checkpoint of a recommendation model"):
        of_checkpoint(str(tmp_path / "odd.ckpt"))
    with pytest.raises(FileNotFoundError, match=r"census-income\.data"):
        RecommendationData("census:income", root=str(tmp_path)).check("fit")
