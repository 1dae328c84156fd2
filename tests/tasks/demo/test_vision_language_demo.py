"""The vision-language part of the demo, in this process and for a moment only, and its part of the report."""

import csv
import json

import pytest
import yaml

from tasks.demo import vision_language
from zoo.report import vision_language as report
from zoo.report.run import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The demo's own configuration with a narrower model that is evaluated more often, trained for a moment."""
    folder = tmp_path_factory.mktemp("run")
    settings = yaml.safe_load(vision_language.CONFIG.read_text())
    settings["model"]["overrides"] = {"embed_dim": 16, "num_experts": 4}
    settings["trainer"]["val_check_interval"] = 4
    settings["data"]["pictures"] = {"val": 40, "test": 40}
    config = folder / "demo.yaml"
    config.write_text(yaml.safe_dump(settings))
    (folder / "demo.json").write_text("{}")
    for name in vision_language.MODELS:
        part = folder / "vision_language"
        vision_language._train(name, None, lambda: None, lambda: False, part, config, 1.0)
    return folder


def test_both_models_train_for_the_time_given_and_say_how_far_they_came(run):
    about = {}
    for name in vision_language.MODELS:
        folder = run / "vision_language" / name
        about[name] = json.loads((folder / "about.json").read_text())
        with (folder / "val.csv").open() as file:
            rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
        assert rows[-1]["step"] == about[name]["steps"]
        assert 1.0 <= rows[-1]["seconds"] < 5
        assert all(row["pairs"] == 64 * row["step"] for row in rows)
        assert all(0 <= row[figure] <= 1 for row in rows for figure in ("error", "missed"))
    assert about["moe"]["total"] > 1.3 * about["dense"]["total"]
    assert about["moe"]["active"] == pytest.approx(about["dense"]["active"], rel=0.05)
    shares = json.loads((run / "vision_language" / "moe" / "modalities.json").read_text())["layers"]
    assert shares
    for kinds in shares.values():
        assert set(kinds) == {"image", "text"}
        assert all(sum(figures["share"]) == pytest.approx(1, abs=1e-3) for figures in kinds.values())
    assert not (run / "vision_language" / "dense" / "modalities.json").exists()


def test_the_report_shows_both_and_where_images_and_texts_went(run):
    found = Run(run)
    page = "".join(report.sections(found))
    assert "Vision and language: LIMoE against its dense twin" in page
    assert "Which experts images and texts go to" in page
    assert "digits not told by their names" in report.summary(found)


def test_a_mistake_in_the_configuration_is_named(tmp_path):
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({"model": {"network": "vision_language/limoe_tyni"}}))
    with pytest.raises(ValueError, match=r"bad\.yaml: .*did you mean vision_language/limoe_tiny"):
        vision_language._build("moe", tmp_path / "bad.yaml")
