"""The vision-language parts of the demo, in this process and for a moment only, and their part of the report."""

import csv
import json

import pytest
import yaml

from tasks.demo import vision_language
from zoo.report import vision_language as report
from zoo.report.run import Run

# What makes each quick: a narrower model, fewer pictures.
NARROW = {
    "vision_language": {"embed_dim": 16, "num_experts": 4},
    "instruction": {"text_config": {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2}},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The demo's own configurations with narrower models that are evaluated more often, trained for a moment."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "demo.json").write_text("{}")
    for pair, narrow in NARROW.items():
        settings = yaml.safe_load(vision_language.PAIRS[pair].config.read_text())
        settings["model"]["overrides"] = {**settings["model"].get("overrides", {}), **narrow}
        settings["trainer"]["val_check_interval"] = 4
        settings["data"]["pictures"] = {"train": 400, "val": 40, "test": 40}
        config = folder / f"{pair}.yaml"
        config.write_text(yaml.safe_dump(settings))
        for name in vision_language.ENTRANTS:
            vision_language._train(name, None, lambda: None, lambda: False, pair, folder / pair, config, 1.0)
    return folder


@pytest.mark.parametrize(
    ("pair", "unit", "figures"),
    [("vision_language", "pairs", ("error", "missed")), ("instruction", "questions", ("error",))],
)
def test_both_models_train_for_the_time_given_and_say_how_far_they_came(run, pair, unit, figures):
    about = {}
    for name in vision_language.ENTRANTS:
        folder = run / pair / name
        about[name] = json.loads((folder / "about.json").read_text())
        with (folder / "val.csv").open() as file:
            rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
        assert rows[-1]["step"] == about[name]["steps"]
        assert 1.0 <= rows[-1]["seconds"] < 5
        assert all(row[unit] == (64 if unit == "pairs" else 3 * 64) * row["step"] for row in rows)
        assert all(0 <= row[figure] <= 1 for row in rows for figure in figures)
    shares = json.loads((run / pair / "moe" / "modalities.json").read_text())["layers"]
    assert shares
    for kinds in shares.values():
        assert set(kinds) == {"image", "text"}
        assert all(sum(figures["share"]) == pytest.approx(1, abs=1e-3) for figures in kinds.values())
    assert not (run / pair / "dense" / "modalities.json").exists()


@pytest.mark.parametrize("pair", vision_language.PAIRS)
def test_the_twin_has_as_many_active_parameters(pair):
    """In the demo's own sizes; all else of it is the same."""
    from zoo.models import count_parameters

    found = {}
    for name in vision_language.ENTRANTS:
        task = vision_language._build(name, pair, vision_language.PAIRS[pair].config).model
        task.hparams["vocab_size"] = 54
        found[name] = count_parameters(task.build())
    assert found["moe"][0] > 1.2 * found["dense"][0]
    assert found["moe"][1] == pytest.approx(found["dense"][1], rel=0.05)


def test_the_report_shows_both_and_where_images_and_texts_went(run):
    found = Run(run)
    page = "".join(report.sections(found))
    assert "Vision and language: LIMoE against its dense twin" in page
    assert "Answers about pictures: MoE-LLaVA against its dense twin" in page
    assert page.count("Which experts images and texts go to") == 2
    assert "digits not told by their names" in report.summary(found)
    assert "counting questions answered wrong" in report.summary(found)


def test_a_mistake_in_the_configuration_is_named(tmp_path):
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({"model": {"network": "vision_language/limoe_tyni"}}))
    with pytest.raises(ValueError, match=r"bad\.yaml: .*did you mean vision_language/limoe_tiny"):
        vision_language._build("moe", "vision_language", tmp_path / "bad.yaml")
