"""`zoo recommendation ...` from start to end, in one process, on a small table with every kind of column."""

import csv
import re
import runpy
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from sklearn.metrics import roc_auc_score

import zoo
from tasks.__main__ import main
from tasks.recommendation import RecommendationData, RecommendationTask
from zoo.data.tables import Preparation, open_files
from zoo.data.tables_aliccp import aliccp_schema
from zoo.data.tables_census import census_schema
from zoo.data.tables_criteo import criteo_schema
from zoo.data.tables_movielens import movielens_schema
from zoo.data.tables_schema import Schema
from zoo.data.tables_stream import Stream

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "recommendation").glob("*.yaml"))
SCHEMA = {
    "dim": 4,
    "group": "user",
    "features": {
        "city": {"kind": "categorical"},
        "price": {"kind": "dense", "transform": "log_standard"},
        "age": {"kind": "dense"},
        "tags": {"kind": "bag"},
        "history": {"kind": "sequence", "table": "city", "pooling": "attention", "target": "city"},
    },
    "tasks": {
        "click": {},
        "buy": {"given": "click"},
        "seconds": {"kind": "regression"},
        "stars": {"kind": "ordinal", "classes": 3},
    },
}
MODEL = {
    "network": "recommendation/mmoe",
    "overrides": {"num_experts": 3, "expert_dims": [8], "tower_dims": [4]},
    "lr": 0.02,
    "warmup_steps": 1,
    "schedule": "constant",
}


def rows(count, seed=0):
    """Columns by name: what decides whether somebody clicks is the age."""
    random = np.random.default_rng(seed)
    city, price, age = random.integers(0, 6, count), np.exp(random.normal(size=count)), random.normal(size=count)
    click = (random.random(count) < 1 / (1 + np.exp(-4 * age))).astype(int)

    def several(letter, most):
        return ["|".join(f"{letter}{i}" for i in random.integers(0, 6, random.integers(0, most))) for _ in range(count)]

    return {
        "user": np.arange(count) % 20,
        "city": [f"c{i}" for i in city],
        "price": price.round(4),
        "age": age.round(3),
        "tags": several("t", 4),
        "history": several("c", 5),
        "click": click,
        "buy": click * (random.random(count) < 0.5),
        "seconds": [f"{2 * value:.3f}" if i % 5 else "" for i, value in enumerate(price)],
        "stars": random.integers(0, 3, count),
    }


def write(path, columns):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values()))


def cli(subcommand, *args):
    return main(["recommendation", subcommand, *map(str, args)])


def config(folder, **changes):
    """A file that trains on train.csv in a folder for a few steps; changes are whole sections' keys."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = {"max_steps": 40, "accelerator": "cpu", "log_every_n_steps": 5, "default_root_dir": str(folder / "runs")}
    trainer |= {"val_check_interval": 20, "check_val_every_n_epoch": None, **quiet}
    data = {"source": str(folder / "train.csv"), "batch_size": 64, "schema": SCHEMA}
    settings = {"model": MODEL, "data": data, "trainer": trainer}
    for section, keys in changes.items():
        settings[section] = {**settings[section], **keys}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with train.csv, new.csv without labels, config.yaml, a run of it, and the model it exported."""
    folder = tmp_path_factory.mktemp("table")
    write(folder / "train.csv", rows(1500))
    write(folder / "new.csv", {name: values for name, values in rows(250, 1).items() if name not in SCHEMA["tasks"]})
    assert cli("fit", "--config", config(folder), "--model.export", folder / "model") == 0
    return folder


def checkpoint(folder, run=0):
    return folder / "runs" / "recommendation" / f"version_{run}" / "checkpoints" / "last.ckpt"


def logged(folder, run=0):
    """By name of a figure, the values that a run logged, in order."""
    with (folder / "runs" / "recommendation" / f"version_{run}" / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in table if row[name]] for name in table[0]}


def test_training_learns_and_logs_every_task_and_its_gate(trained):
    figures = logged(trained)
    assert len(figures["val/auc/click"]) == 2
    assert figures["val/auc/click"][-1] > 0.8
    for task in SCHEMA["tasks"]:
        assert figures[f"train/loss/{task}"][-1] > 0
        weights = [figures[f"val/gate/{task}/{expert}"][-1] for expert in range(3)]
        assert sum(weights) == pytest.approx(1)
        assert f"val/gate/{task}/3" not in figures
    assert all(0 <= figures[f"val/zeros/moe.experts/{expert}"][-1] < 1 for expert in range(3))
    names = {"auc/buy", "auc/buy_joint", "gauc/click", "ndcg10/click", "rmse/seconds", "kappa/stars", "calibration/buy"}
    assert {f"val/{name}" for name in names} <= figures.keys()
    assert figures["train/rows_per_s"][-1] > 0


def test_validation_and_test_of_the_checkpoint_find_what_training_found(trained, capsys):
    common = ["--config", trained / "config.yaml", "--ckpt_path", checkpoint(trained)]
    assert cli("validate", *common) == 0
    shown = capsys.readouterr().out
    found = float(re.search(r"val/auc/click\D+([\d.]+)", shown)[1])
    assert found == pytest.approx(logged(trained)["val/auc/click"][-1], abs=1e-6)
    assert cli("test", *common) == 0
    assert "test/rmse/seconds" in capsys.readouterr().out


def test_the_exported_model_predicts_what_was_trained(trained):
    model = zoo.from_pretrained(trained / "model")
    columns = rows(1500)
    batch = model.preparation.encode({name: np.array(values) for name, values in columns.items()}).batch(range(1500))
    with torch.no_grad():
        chance = model.predictions(model(batch))["click"]
    assert roc_auc_score(columns["click"], chance) > 0.8
    saved = torch.load(checkpoint(trained), weights_only=True)["state_dict"]
    assert {name.removeprefix("model.") for name in saved if name.startswith("model.")} == set(model.state_dict())
    assert all(torch.equal(saved[f"model.{name}"], tensor) for name, tensor in model.state_dict().items())


def scores(folder):
    return pq.read_table(folder).to_pydict()


def expected(trained):
    """The scores of new.csv, in one batch."""
    model = zoo.from_pretrained(trained / "model")
    [batch] = Stream(open_files(str(trained / "new.csv")), model.preparation, 1000)
    with torch.no_grad():
        return {name: values.tolist() for name, values in model.predictions(model(batch)).items()}


def test_every_row_is_scored_once_in_order_also_by_runs_that_were_cut_short(trained, tmp_path, capsys):
    where = ["--data.input", trained / "new.csv", "--model.predictions", tmp_path / "out", "--model.rows_per_part", 60]
    common = ["--config", trained / "config.yaml", "--ckpt_path", checkpoint(trained), *where]
    assert cli("predict", *common, "--trainer.limit_predict_batches", 2) == 0
    assert "128 rows scored" in capsys.readouterr().out
    assert len(pq.read_table(tmp_path / "out")) == 120  # two whole parts
    assert cli("predict", *common) == 0
    assert "130 rows scored" in capsys.readouterr().out
    found = scores(tmp_path / "out")
    assert found.pop("row") == list(range(250))
    wanted = expected(trained)
    assert found.keys() == wanted.keys() == {"click", "buy", "buy_joint", "seconds", "stars"}
    for name, values in wanted.items():
        assert found[name] == pytest.approx(values, rel=1e-5)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert cli("predict", *common) == 0
    assert "0 rows scored" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before if path.name.startswith("part")} == {
        path: time for path, time in before.items() if path.name.startswith("part")
    }

    # The same folder is not for another input, nor for other weights.
    assert cli("predict", *common, "--data.input", trained / "train.csv") == 2
    assert "holds predictions made with another input" in capsys.readouterr().err
    other = zoo.from_pretrained(trained / "model")
    with torch.no_grad():
        other.towers.bias += 1
    zoo.save_pretrained(other, tmp_path / "other")
    assert cli("predict", "--model.pretrained", tmp_path / "other", *where, "--trainer.accelerator=cpu") == 2
    assert "holds predictions made with another model" in capsys.readouterr().err


def test_parquet_is_scored_with_a_folder_alone(trained, tmp_path):
    table = {name: pa.array(values) for name, values in rows(250, 1).items() if name not in SCHEMA["tasks"]}
    for name in ("tags", "history"):
        table[name] = pa.array([value.split("|") if value else [] for value in table[name].to_pylist()])
    pq.write_table(pa.table(table), tmp_path / "new.parquet")
    where = ["--data.input", tmp_path / "new.parquet", "--model.predictions", tmp_path / "out"]
    options = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.logger=false"]
    assert cli("predict", "--model.pretrained", trained / "model", *where, *options) == 0
    found, wanted = scores(tmp_path / "out"), expected(trained)
    for name, values in wanted.items():
        assert found[name] == pytest.approx(values, rel=1e-5)


def test_a_run_that_stopped_goes_on_exactly(trained, tmp_path):
    write(tmp_path / "train.csv", rows(1500))
    half = config(tmp_path, trainer={"max_steps": 7})
    assert cli("fit", "--config", half) == 0
    whole = config(tmp_path, trainer={"max_steps": 14})
    assert cli("fit", "--config", whole, "--ckpt_path", checkpoint(tmp_path)) == 0
    assert cli("fit", "--config", whole) == 0
    resumed, straight = (torch.load(checkpoint(tmp_path, run), weights_only=True) for run in (1, 2))
    assert resumed["global_step"] == straight["global_step"] == 14
    for name, tensor in straight["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], tensor), name


@pytest.mark.parametrize("logger", ["null", "false", "{class_path: CSVLogger, init_args: {save_dir: %s, name: own}}"])
def test_a_run_goes_on_from_the_newest_checkpoint_wherever_it_logs(logger, trained, tmp_path):
    logs = tmp_path / "logs"
    options = ("--trainer.logger", logger.replace("%s", str(logs)), "--trainer.default_root_dir", tmp_path / "runs")
    for steps in (2, 4, 6):
        quick = ("--config", trained / "config.yaml", f"--trainer.max_steps={steps}", "--trainer.limit_val_batches=0")
        assert cli("fit", *quick, *options, "--ckpt_path=auto") == 0
    paths = sorted(tmp_path.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    last = torch.load(paths[-1])
    # Each went on: batches of all are counted.
    assert last["global_step"] == 6
    assert last["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"] == 6


def test_two_processes_train_and_predict_as_one_does(trained, tmp_path):
    """With tables in pieces, and although they have different numbers of labelled rows in every batch."""
    write(tmp_path / "train.csv", rows(1500))
    short = {"max_steps": 8, "val_check_interval": 8}
    assert cli("fit", "--config", config(tmp_path, trainer=short)) == 0
    two = ["--trainer.devices=2", "--trainer.strategy=ddp_fork"]
    exports = ["--model.export", tmp_path / "model"]
    assert cli("fit", "--config", config(tmp_path, trainer=short, data={"batch_size": 32}), *two, *exports) == 0
    one, other = (torch.load(checkpoint(tmp_path, run), weights_only=True)["state_dict"] for run in (0, 1))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    figures, others = logged(tmp_path, 0), logged(tmp_path, 1)
    for name in ("val/auc/buy", "val/rmse/seconds", "val/gate/stars/1", "val/zeros/moe.experts/2"):
        assert others[name] == pytest.approx(figures[name], rel=1e-3)
    for name in ("train/loss", *(f"train/loss/{task}" for task in SCHEMA["tasks"])):
        assert others[name] == pytest.approx(figures[name], rel=1e-3), name

    exported = zoo.from_pretrained(tmp_path / "model").state_dict()
    assert {f"model.{name}" for name in exported} == {name for name in other if name.startswith("model.")}
    assert all(torch.equal(tensor, other[f"model.{name}"]) for name, tensor in exported.items())

    # One process goes on with what two, whose tables lay in pieces, have left.
    longer = config(tmp_path, trainer={"max_steps": 12, "val_check_interval": 12})
    for run in (0, 1):
        assert cli("fit", "--config", longer, "--ckpt_path", checkpoint(tmp_path, run)) == 0
    straight, resumed = (torch.load(checkpoint(tmp_path, run), weights_only=True) for run in (2, 3))
    for name, tensor in straight["state_dict"].items():
        torch.testing.assert_close(resumed["state_dict"][name], tensor, rtol=1e-3, atol=1e-4, msg=name)

    where = ["--data.input", trained / "new.csv", "--model.predictions", tmp_path / "out", "--model.rows_per_part", 60]
    common = ["--config", trained / "config.yaml", "--ckpt_path", checkpoint(trained), *where]
    # Not one batch: in a process that has parsed 1.0 before, Lightning may take 1 for all of them.
    assert cli("predict", *common, *two, "--data.batch_size=32", "--trainer.limit_predict_batches=2") == 0
    assert len(pq.read_table(tmp_path / "out")) == 120
    assert cli("predict", *common, *two) == 0
    found, wanted = scores(tmp_path / "out"), expected(trained)
    assert found["row"] == list(range(250))
    for name, values in wanted.items():
        assert found[name] == pytest.approx(values, rel=1e-5)


@pytest.mark.parametrize("weighting", ["uncertainty", "{name: gradnorm, alpha: 0.5}"])
def test_learnt_weights_of_tasks_are_logged_and_kept(weighting, trained, tmp_path):
    write(tmp_path / "train.csv", rows(600))
    options = ["--model.weighting", weighting, "--trainer.max_steps=10", "--trainer.limit_val_batches=0"]
    assert cli("fit", "--config", config(tmp_path), *options) == 0
    weights = [logged(tmp_path)[f"train/weight/{task}"][-1] for task in SCHEMA["tasks"]]
    assert len({*weights, 1.0, 0.5}) > 3  # they moved, and apart
    if "gradnorm" in weighting:
        assert sum(weights) == pytest.approx(4, rel=1e-5)
    assert any(name.startswith("weighting.") for name in torch.load(checkpoint(tmp_path))["state_dict"])


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (
            "embedding_optimizer=null",
            "embedding_optimizer: the checkpoint was trained with rowwise_adagrad, not with None",
        ),
        (
            "embedding_optimizer=sgd",
            "embedding_optimizer: the checkpoint was trained with rowwise_adagrad, not with sgd",
        ),
        ("weighting=uncertainty", "weighting: the checkpoint was trained with fixed, not with uncertainty"),
        ("weighting={name: gradnorm, alpha: 1}", "weighting: the checkpoint was trained with fixed, not with gradnorm"),
    ],
)
def test_what_a_checkpoint_was_trained_with_cannot_be_changed_on_the_way(option, told, trained, capsys):
    resumed = ["--config", trained / "config.yaml", "--ckpt_path", checkpoint(trained), "--trainer.max_steps=45"]
    assert cli("fit", *resumed, f"--model.{option}") == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert told in line
    if option.startswith("embedding"):  # which matters to training alone
        assert cli("validate", *resumed[:-1], f"--model.{option}") == 0


def test_training_stops_early_on_a_named_task(trained, tmp_path):
    write(tmp_path / "train.csv", rows(600))
    stop = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/auc/buy", "mode": "max", "patience": 1}}
    path = config(tmp_path, trainer={"callbacks": [stop], "val_check_interval": 1}, model={"lr": 0.0})
    assert cli("fit", "--config", path) == 0
    assert torch.load(checkpoint(tmp_path), weights_only=True)["global_step"] == 2


def test_what_is_undefined_is_said_and_not_logged(trained, tmp_path, capsys):
    columns = rows(600)
    columns["click"] = columns["buy"] = np.zeros(600, int)
    write(tmp_path / "train.csv", columns)
    assert cli("fit", "--config", config(tmp_path, trainer={"max_steps": 6, "val_check_interval": 6})) == 0
    shown = capsys.readouterr().out
    assert "val: auc, calibration, gauc, ndcg10 of task click undefined: no row is positive" in shown
    assert re.search(r"val: auc, .* of task buy undefined: no row has a label", shown)
    figures = logged(tmp_path)
    assert "val/auc/click" not in figures
    assert figures["val/logloss/click"]
    stop = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/auc/click"]
    assert cli("fit", "--config", config(tmp_path, trainer={"max_steps": 6, "val_check_interval": 6}), *stop) == 2
    told = capsys.readouterr().err.splitlines()
    assert "error: EarlyStopping waits for val/auc/click, which is undefined: no row is positive" in told


def test_without_rows_to_validate_on_training_needs_no_validation(trained, tmp_path):
    quick = ("--trainer.max_steps=2", "--trainer.default_root_dir", tmp_path / "runs", "--trainer.limit_val_batches=0")
    assert cli("fit", "--config", trained / "config.yaml", *quick, "--data.held_out=0") == 0


def test_tables_of_any_width_train_without_an_optimizer_of_their_own(trained, tmp_path):
    quick = ("--trainer.max_steps=2", "--trainer.default_root_dir", tmp_path / "runs")
    options = ("--data.schema.dim=3", "--model.embedding_optimizer=null")
    assert cli("fit", "--config", trained / "config.yaml", *quick, *options) == 0


def test_accumulation_and_skipped_steps_are_for_tables_that_have_gradients(trained, tmp_path):
    quick = ("--trainer.max_steps=2", "--trainer.default_root_dir", tmp_path / "runs")
    options = ("--trainer.accumulate_grad_batches=2", "--model.non_finite=skip", "--model.embedding_optimizer=null")
    assert cli("fit", "--config", trained / "config.yaml", *quick, *options) == 0


def test_fine_tuning_goes_on_from_a_folder_with_its_vocabularies(trained, tmp_path):
    columns = rows(600, 3)
    columns["city"][0] = "elsewhere"  # a city that the model has not seen
    write(tmp_path / "train.csv", columns)
    path = config(tmp_path, model={"network": "recommendation/mmoe", "overrides": None, "lr": 0.0, "embedding_lr": 0.0})
    out = ["--model.pretrained", trained / "model", "--model.export", tmp_path / "again", "--trainer.max_steps=1"]
    assert cli("fit", "--config", path, *out) == 0
    old, new = (zoo.from_pretrained(folder / name) for folder, name in ((trained, "model"), (tmp_path, "again")))
    assert new.preparation == old.preparation
    assert all(torch.equal(a, b) for a, b in zip(old.state_dict().values(), new.state_dict().values()))


def test_a_checkpoint_makes_a_model_without_its_table(trained):
    task = RecommendationTask.load_from_checkpoint(checkpoint(trained), export=None)
    saved = zoo.from_pretrained(trained / "model")
    assert task.model.preparation == saved.preparation
    assert all(torch.equal(a, b) for a, b in zip(task.model.state_dict().values(), saved.state_dict().values()))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses_and_its_model_can_be_built(path, capsys):
    with pytest.raises(SystemExit) as done:
        cli("fit", "--config", path, "--print_config")
    assert done.value.code == 0
    parsed = yaml.safe_load(capsys.readouterr().out)
    data = RecommendationData(**parsed["data"])
    known = {"aliccp": aliccp_schema, "criteo": criteo_schema, "movielens": movielens_schema}
    known |= {f"census:{group}": partial(census_schema, group) for group in ("income", "education")}
    if data.source == "synthetic":
        schema = data.table.schema
    else:
        schema = known[data.source]() if data.source in known else Schema.read(parsed["data"]["schema"])
    sized = {"num_embeddings": 5}  # where training rows decide
    features = tuple(replace(f, **({} if getattr(f, "num_embeddings", 5) else sized)) for f in schema.features)
    with torch.device("meta"):
        task = RecommendationTask(**{**parsed["model"], "export": None})
        task.preparation = Preparation(replace(schema, features=features), {}, {})
        task.check_model(task.build(), None)
    assert path.read_text().startswith("# ")  # what it is, and where its settings come from


def run(monkeypatch, name, *args):
    monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
    runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")


def test_the_scripts_train_score_and_export(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(SCHEMA))
    options = ["--steps", 20, "--batch-size", 64, "--lr", 0.02]
    run(monkeypatch, "train_table.py", trained / "train.csv", "schema.yaml", "--out", "model", *options)
    assert "test/auc/click" in capsys.readouterr().out
    run(monkeypatch, "score_table.py", "model", trained / "new.csv", "--out", "scores.parquet", "--batch-size", 64)
    found = pq.read_table("scores.parquet")
    assert found["row"].to_pylist() == list(range(250))
    assert roc_auc_score(rows(250, 1)["click"], found["click"].to_numpy()) > 0.7
    with pytest.raises(SystemExit):
        run(monkeypatch, "score_table.py", "model", trained / "new.csv", "--out", "scores.parquet")
    assert "scores.parquet exists; name another file" in capsys.readouterr().err
    # What stops in the middle leaves nothing that looks whole.
    columns = {name: values[:40] for name, values in rows(40, 2).items()}
    write(tmp_path / "broken.csv", {**columns, "age": [0.5] * 39 + ["old"]})
    with pytest.raises(SystemExit):
        run(monkeypatch, "score_table.py", "model", "broken.csv", "--out", "broken.parquet", "--batch-size", 10)
    assert "error: broken.csv: feature 'age', row 39: expected a number, got 'old'" in capsys.readouterr().err
    assert not (tmp_path / "broken.parquet").exists()
    write(tmp_path / "none.csv", {name: [] for name in columns})
    with pytest.raises(SystemExit, match=r"none\.csv: expected rows to score, got none"):
        run(monkeypatch, "score_table.py", "model", "none.csv", "--out", "none.parquet")
    run(monkeypatch, "export_table.py", "model", "--out", "graph")
    assert (tmp_path / "graph" / "model.pt2").is_file()
    assert (tmp_path / "graph" / "preparation.json").is_file()
    for name in ("train_table.py", "score_table.py", "export_table.py"):
        with pytest.raises(SystemExit) as done:
            run(monkeypatch, name, "--help")
        assert done.value.code == 0
