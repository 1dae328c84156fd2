"""What is wrong with a table, or with the arguments of `zoo recommendation`, is one line, before any work."""

import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from test_recommendation_cli import SCHEMA, checkpoint, cli, config, rows, trained, write

import zoo
from tasks.recommendation import RecommendationData, RecommendationTask

__all__ = ["trained"]


def changed(change):
    """The columns of train.csv with a fault."""
    columns = rows(300)
    change(columns)
    return columns


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c.pop("price"), "unknown column (feature 'price') 'price'"),
        (lambda c: c.update(clck=c.pop("click")), "unknown column (label of task 'click') 'click'; did you mean clck?"),
        (lambda c: c["price"].__setitem__(7, np.nan), "feature 'price', row 7: "),
        (lambda c: c["age"].__setitem__(7, np.nan), "feature 'age', row 7: "),
        (lambda c: c["stars"].__setitem__(7, 5), "label of task 'stars', row 7: expected a whole number from 0 to 2"),
        (lambda c: c.pop("user"), "unknown column (group) 'user'"),
    ],
)
def test_a_fault_in_the_table_is_one_line_before_any_work(change, told, tmp_path, capsys):
    write(tmp_path / "train.csv", changed(change))
    assert cli("fit", "--config", config(tmp_path)) == 2
    [error] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert told in error
    assert "train.csv" in error
    assert not (tmp_path / "runs").exists()


def test_an_empty_file_is_a_mistake(tmp_path, capsys):
    for content, told in (("", "the file is empty"), (",".join(rows(1)) + "\n", "expected rows to train on, got none")):
        (tmp_path / "train.csv").write_text(content)
        assert cli("fit", "--config", config(tmp_path)) == 2
        assert told in capsys.readouterr().err


def test_an_id_out_of_range_fails_or_is_hashed_as_asked(tmp_path, capsys):
    columns = rows(600)
    columns["city"] = [int(value[1:]) for value in columns["city"]]
    columns["city"][11] = 7
    columns["history"] = ["" for _ in columns["history"]]
    write(tmp_path / "train.csv", columns)
    features = {name: SCHEMA["features"][name] for name in ("price", "age")}
    features["city"] = {"kind": "categorical", "ids": "index", "num_embeddings": 6}
    path = config(tmp_path, data={"schema": {**SCHEMA, "features": features}}, trainer={"max_steps": 1})
    assert cli("fit", "--config", path) == 2
    assert "feature 'city', row 11: expected an id from 0 to 5, got '7'" in capsys.readouterr().err
    features["city"]["out_of_range"] = "hash"
    path = config(tmp_path, data={"schema": {**SCHEMA, "features": features}}, trainer={"max_steps": 1})
    assert cli("fit", "--config", path) == 0


STOP = ["--trainer.callbacks+=EarlyStopping"]
SEPARATE = ["--model.network=recommendation/single_task", "--model.overrides=null"]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--model.network", "recommendation/mmo"], "did you mean recommendation/mmoe"),
        (["--model.router", "{name: TopKRoutr}"], "did you mean TopKRouter"),
        (["--model.overrides.num_expert", "3"], "did you mean num_experts"),
        (["--model.weighting", "gradnrm"], "did you mean gradnorm"),
        (["--model.task_weights", "{clik: 2}"], "unknown task of task_weights 'clik'; did you mean click"),
        (["--model.embedding_lrr", "1"], "did you mean model.embedding_lr"),
        (["--model.sharding=column_wise"], "rowwise_adagrad has one step size"),
        (["--trainer.precision=bf16-true"], "tables learn in float32; use bf16-mixed"),
        (["--trainer.precision=64-true"], "tables learn in float32; use 32-true"),
        (
            ["--trainer.precision=bf16-true", "--model.embedding_optimizer=null"],
            "precision bf16-true: it would round the labels of task 'seconds' too; use bf16-mixed",
        ),
        (
            [
                "--trainer.strategy={class_path: lightning.pytorch.strategies.ModelParallelStrategy}",
                "--trainer.devices=2",
            ],
            "use trainer.strategy ddp",
        ),
        (
            ["--model.weighting=gradnorm", "--model.network=recommendation/single_task", "--model.overrides=null"],
            "shares none",
        ),
        (
            ["--trainer.callbacks+=tasks.averaging.RunningAverage", "--trainer.devices=2", "--trainer.strategy=ddp"],
            "RunningAverage averages whole weights, and tables are split over processes: use one process, or set",
        ),
        (["--model.activation_checkpointing=true"], "keeps too little to gain from it"),
        (["--model.pretrained=somewhere"], "leave out overrides and router"),
        (["--data.source", "sinthetic", "--data.schema=null"], "did you mean synthetic"),
        (["--data.schema", "nowhere.yaml"], "there is no file 'nowhere.yaml'"),
        (
            ["--data.held_out", "0"],
            "has no rows to val on: set data.held_out above 0, or trainer.limit_val_batches to 0",
        ),
        (["--model.overrides.expert_dims=64"], "expert_dims: expected a list of widths, such as [64, 32], got 64"),
        (["--model.overrides.num_experts=2.5"], "num_experts: expected a whole number, got 2.5"),
        (["--data.batch_size=5000"], "rows do not fill one batch of 5000 on 1 process"),
        (["--data.schema.dim=6"], "dim 6 of feature 'city': tables that learn in backward are a multiple of 4 wide"),
        (["--ckpt_path", __file__], f"{__file__} is no checkpoint, or not a whole one"),
        (["--model.task_weights", "{click: -1}"], "weight of task 'click' must be at least 0"),
        (["--trainer.accumulate_grad_batches=2"], "tables learn in every backward, from each batch apart"),
        (["--model.non_finite=skip"], "tables have moved by the time a gradient is seen"),
        (["--trainer.default_root_dir", f"{__file__}/runs"], f"default_root_dir: cannot write to {__file__}/runs"),
        (["--model.export", f"{__file__}/model"], f"export: cannot write to {__file__}/model: {__file__} is a file"),
        (["--data.held_out", "0.7"], "held_out must be at least 0 and below 0.5"),
        (
            ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/auc/clik"],
            "did you mean val/auc/click",
        ),
        (
            ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/auc/stars"],
            "unknown figure to monitor",
        ),
    ],
)
def test_a_mistake_in_the_arguments_is_one_line_before_any_work(args, told, trained, capsys):
    runs = sorted((trained / "runs" / "recommendation").iterdir())
    assert cli("fit", "--config", trained / "config.yaml", *args) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert told in errors[0]
    assert sorted((trained / "runs" / "recommendation").iterdir()) == runs


def test_what_prediction_lacks_is_named(trained, tmp_path, capsys):
    for args, told in (
        (["--config", trained / "config.yaml", "--data.input", trained / "new.csv"], "give --ckpt_path or model.pret"),
        (["--model.pretrained", trained / "model"], "give data.input"),
        (["--model.pretrained", tmp_path], "there is no preparation.json"),
        (["--model.pretrained", trained / "model", "--data.input", tmp_path / "no.csv"], "there is no table"),
    ):
        assert cli("predict", *args) == 2
        assert told in capsys.readouterr().err
    write(tmp_path / "bad.csv", {"city": ["c1"], "price": [1.0], "tag": ["a"], "age": [1], "history": [""]})
    assert cli("predict", "--model.pretrained", trained / "model", "--data.input", tmp_path / "bad.csv") == 2
    assert "unknown column (feature 'tags') 'tags'; did you mean tag" in capsys.readouterr().err
    late = rows(250)
    late["price"][199] = "nan"
    write(tmp_path / "late.csv", late)
    where = ["--data.input", tmp_path / "late.csv", "--model.predictions", tmp_path / "late"]
    small = ["--model.rows_per_part=64", "--data.batch_size=16"]
    assert cli("predict", "--model.pretrained", trained / "model", *where, *small) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(r"late\.csv.*price.*row 199", line)
    assert len(pq.read_table(tmp_path / "late")) == 128  # whole parts before it are kept
    torch.save({"state_dict": {}}, tmp_path / "odd.ckpt")
    assert (
        cli(
            "predict",
            "--ckpt_path",
            tmp_path / "odd.ckpt",
            "--data.input",
            trained / "new.csv",
            "--config",
            trained / "config.yaml",
        )
        == 2
    )
    assert "is no checkpoint of a recommendation model" in capsys.readouterr().err


def test_a_model_and_a_table_of_another_schema_do_not_meet(trained, tmp_path, capsys):
    write(tmp_path / "train.csv", rows(300))
    features = {**SCHEMA["features"], "price": {"kind": "dense", "transform": "log"}}
    path = config(tmp_path, data={"schema": {**SCHEMA, "features": features}})
    assert cli("validate", "--config", path, "--ckpt_path", checkpoint(trained)) == 2
    assert "another schema than the trained model: its feature 'price' differs" in capsys.readouterr().err
    model = zoo.create_model("recommendation/shared_bottom")
    task, data = RecommendationTask(model), RecommendationData(str(tmp_path / "train.csv"), SCHEMA)
    with pytest.raises(
        ValueError, match=r"the model was made for another schema than that of .*: feature 'x0' differs"
    ):
        task.check(data)
