"""The recommendation part of the demo, in this process and for a moment only."""

import csv
import json

import pytest
import yaml

from tasks.demo import recommendation


@pytest.fixture
def config(tmp_path):
    """The demo's own configuration with fewer rows and more evaluations."""
    settings = yaml.safe_load(recommendation.CONFIG.read_text())
    settings["data"]["options"]["rows"] = 4000
    settings["trainer"]["val_check_interval"] = 5
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "demo.yaml"


def test_both_models_train_for_the_time_given_and_leave_their_figures_and_gates(config, tmp_path):
    folder = tmp_path / "run"
    for name in recommendation.MODELS:
        recommendation._train(name, None, lambda: None, lambda: False, folder, config, 1.0)
    about = {name: json.loads((folder / name / "about.json").read_text()) for name in recommendation.MODELS}
    rows = {}
    for name in recommendation.MODELS:
        with (folder / name / "val.csv").open() as file:
            rows[name] = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
        last = rows[name][-1]
        assert last["step"] == about[name]["steps"]
        assert last["rows"] <= about[name]["batch_size"] * last["step"]
        assert last["mse"] == pytest.approx((last["mse_task_1"] + last["mse_task_2"]) / 2)
        assert last["mse"] < rows[name][0]["mse"] or len(rows[name]) == 1  # all that a busy machine came to
    assert about["moe"]["total"] == pytest.approx(about["dense"]["total"], rel=0.15)
    gates = json.loads((folder / "moe" / "gates.json").read_text())
    assert set(gates["tasks"]) == {"task_1", "task_2"}
    assert gates["steps"] == [row["step"] for row in rows["moe"]]
    for weights in gates["tasks"].values():
        assert all(len(row) == 8 and sum(row) == pytest.approx(1, abs=1e-3) for row in weights)
    assert not (folder / "dense" / "gates.json").exists()


def test_training_stops_after_the_step_in_which_it_is_asked_to(config, tmp_path):
    calls = iter([False, False, True])
    recommendation._train("dense", None, lambda: None, lambda: next(calls), tmp_path / "run", config, 1000.0)
    assert json.loads((tmp_path / "run" / "dense" / "about.json").read_text())["steps"] == 3


def test_a_mistake_in_the_configuration_is_named(tmp_path):
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({"data": {"options": {"corelation": 0.5}}}))
    with pytest.raises(ValueError, match=r"bad\.yaml: .*did you mean correlation"):
        recommendation._build("moe", tmp_path / "bad.yaml")
