"""The vision part of the demo, in this process and for a moment only."""

import csv
import json

import pytest
import torch
import yaml

from tasks.demo import vision
from tasks.demo.patches import routes


@pytest.fixture
def config(tmp_path):
    """The demo's own configuration with a narrower model that is evaluated more often."""
    settings = yaml.safe_load(vision.CONFIG.read_text())
    settings["model"]["overrides"].update(embed_dim=16, num_experts=4)
    settings["trainer"]["val_check_interval"] = 8
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "demo.yaml"


def test_both_models_train_for_the_time_given_and_say_how_far_they_came(config, tmp_path):
    started = []
    for name in vision.MODELS:
        vision._train(name, None, lambda: started.append(True), lambda: False, tmp_path / "run", config, 1.0)
    assert len(started) == 2
    about = {name: json.loads((tmp_path / "run" / name / "about.json").read_text()) for name in vision.MODELS}
    for name in vision.MODELS:
        with (tmp_path / "run" / name / "val.csv").open() as file:
            rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
        assert rows[-1]["step"] == about[name]["steps"]
        assert 1.0 <= rows[-1]["seconds"] < 5
        assert all(row["images"] == 64 * row["step"] and 0 <= row["error"] <= 1 for row in rows)
    assert about["moe"]["total"] > 1.4 * about["dense"]["total"]
    assert about["moe"]["active"] == pytest.approx(about["dense"]["active"], rel=0.05)
    found = json.loads((tmp_path / "run" / "moe" / "routes.json").read_text())
    assert [layer["layer"] for layer in found["layers"]] == [1, 3]
    assert all(len(patches) == 16 for layer in found["layers"] for patches in layer["experts"].values())
    assert list(found["images"]) == list("0123456789")


def test_training_stops_after_the_step_in_which_it_is_asked_to(config, tmp_path):
    calls = iter([False, False, True])
    vision._train("dense", None, lambda: None, lambda: next(calls), tmp_path / "run", config, 1000.0)
    assert json.loads((tmp_path / "run" / "dense" / "about.json").read_text())["steps"] == 3


def test_a_mistake_in_the_configuration_is_named(tmp_path):
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({"model": {"network": "vision/vmoe_tiny_tset"}}))
    with pytest.raises(ValueError, match=r"bad\.yaml: .*did you mean vision/vmoe_tiny_test"):
        vision._build("moe", tmp_path / "bad.yaml")


def test_a_router_that_looks_at_places_alone_is_found_out(config):
    """Positions and images are told apart: a router that reads the position embedding is decided by place."""
    cli = vision._build("moe", config)
    task, data = cli.model, cli.datamodule
    task.check(data)
    model = task.build().eval()
    with torch.no_grad():
        model.pos_embed.copy_(100 * torch.randn_like(model.pos_embed))  # drowns what the images hold
    found = routes(model, data)
    assert all(layer["decided_by_place"] > 0.95 > 0.2 > layer["decided_by_class"] for layer in found["layers"])
