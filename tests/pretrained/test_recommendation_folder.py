"""Recommendation models as folders: what comes back is what was saved, and a folder with a fault says which."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from zoo.data.tables import Preparation
from zoo.data.tables_batch import random_batch
from zoo.data.tables_schema import Schema

SCHEMA = {
    "dim": 4,
    "domain": "shop",
    "features": {
        "shop": {"kind": "categorical", "num_embeddings": 3, "ids": "index"},
        "item": {"kind": "categorical", "num_embeddings": 9, "ids": "hash"},
        "price": {"kind": "dense", "transform": "log_standard"},
        "tags": {"kind": "bag", "num_embeddings": 7, "ids": "hash", "weights": "shares", "pooling": "mean"},
        "history": {"kind": "sequence", "num_embeddings": 9, "ids": "hash", "table": "item", "pooling": "attention"},
    },
    "tasks": {"click": {}, "buy": {"given": "click"}, "stars": {"kind": "ordinal", "classes": 3}},
}
SCHEMA["features"]["history"]["target"] = "item"
MODELS = zoo.list_models("recommendation/*")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_as_it_was_saved(name, tmp_path):
    torch.manual_seed(0)
    model = zoo.create_model(name, schema=SCHEMA, tower_dims=[5], esmm=True).eval()
    zoo.save_pretrained(model, tmp_path / "a")
    found = zoo.from_pretrained(tmp_path / "a")
    assert not found.training
    assert found.schema == model.schema
    batch = random_batch(model.schema, 9)
    theirs, ours = found(batch), model(batch)
    assert all(torch.equal(theirs[task], ours[task]) for task in ours)
    labels = found.task_losses(theirs, batch), model.task_losses(ours, batch)
    assert labels[0] == labels[1]  # esmm too
    zoo.save_pretrained(found, tmp_path / "b")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    with torch.device("meta"):
        without = zoo.create_model(name, schema=SCHEMA)
    assert all(p.is_meta for p in without.parameters())


def test_the_preparation_of_rows_travels_with_the_model(tmp_path):
    schema = Schema.read({"features": {"city": {"kind": "categorical"}, "age": {"kind": "dense"}}, "tasks": {"y": {}}})
    columns = {"city": np.array(["Oslo", "Rome", "Oslo"]), "age": np.array([3.0, 5.0, 7.0]), "y": np.array([0, 1, 1])}
    preparation = Preparation.fit(schema, columns)
    model = zoo.create_model("recommendation/mmoe", schema=preparation.schema)
    model.preparation = preparation
    zoo.save_pretrained(model, tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "config.json",
        "model.safetensors",
        "preparation.json",
    ]
    found = zoo.from_pretrained(tmp_path / "a")
    assert found.preparation == preparation
    row = {"city": np.array(["Oslo"]), "age": np.array([4.0])}
    batches = [p.encode(row, labels=False).batch([0]) for p in (preparation, found.preparation)]
    assert torch.equal(model.eval()(batches[0])["y"], found(batches[1])["y"])


def test_a_gate_given_as_a_class_is_stored_by_name_and_one_given_as_a_function_is_refused(tmp_path):
    from zoo.moe.routers import TopKRouter

    model = zoo.create_model("recommendation/mmoe", schema=SCHEMA, router=TopKRouter)
    zoo.save_pretrained(model, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["overrides"] == {"router": "TopKRouter"}
    assert type(next(iter(zoo.from_pretrained(tmp_path / "a").sharing.moe.gates)).router) is TopKRouter
    odd = zoo.create_model("recommendation/mmoe", schema=SCHEMA, router=lambda **sizes: TopKRouter(**sizes, k=1))
    with pytest.raises(ValueError, match="cannot be stored"):
        zoo.save_pretrained(odd, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.fixture
def folder(tmp_path):
    zoo.save_pretrained(zoo.create_model("recommendation/shared_bottom"), tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors: tensors.pop("towers.bias"), "model.safetensors: tensor towers.bias is missing"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), "tensor more is unknown to a model with these arguments"),
        (lambda tensors: tensors.update({"towers.bias": torch.zeros(5)}), "towers.bias has shape .5., expected .2."),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(folder, change, told):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=told):
        zoo.from_pretrained(folder)


def test_a_folder_with_a_fault_says_which(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pickled weights are not read"):
        zoo.from_pretrained(folder)
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    for key, value, told in (
        ("network", "recommendation/shared_botom", "did you mean recommendation/shared_bottom"),
        ("overrides", {"bottom_dim": [3]}, "did you mean bottom_dims"),
        ("schema", {"features": {}}, "expected tasks"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(ValueError, match=rf"config\.json: .*{told}"):
            zoo.from_pretrained(folder)
    with pytest.raises(FileExistsError, match="not empty"):
        zoo.save_pretrained(zoo.create_model("recommendation/shared_bottom"), folder)
