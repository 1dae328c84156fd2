"""The studies of recommendation: what they train, what they conclude, and that they go on where they were stopped."""

import csv
import importlib.util
import random
import runpy
import sys
from pathlib import Path

import pytest
import torch

import zoo
from zoo.data.tables_batch import TableBatch
from zoo.data.tables_census import COLUMNS, NUMBERS

SCRIPTS = Path(__file__).parents[2] / "scripts"


def script(name):
    """A script as a module, which other processes can import too."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture
def run(monkeypatch):
    """Run a script's main in this process."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def main(name, *args):
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        script(name).main()

    return main


@pytest.mark.parametrize("name", ["shared_bottom", "omoe", "mmoe"])
def test_an_ensemble_trains_every_copy_as_it_would_train_alone(name):
    study = script("study_synthetic")
    ensemble = study.Ensemble(name, 3, 1e-2, seed=7)
    torch.manual_seed(7)
    models = [zoo.create_model(f"recommendation/{name}", **study.SIZES[name]) for _ in range(3)]
    streams = study.Streams(3, 0.5, "ple", seed=1)
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-2) for model in models]
    for _ in range(4):
        x, y = streams.draw(16)
        together = ensemble.step(x, y)
        for i, (model, optimizer) in enumerate(zip(models, optimizers)):
            out = model(TableBatch(torch.arange(16), x[i], None, None, None, y[i]))
            loss = sum((out[task] - y[i, :, k]).square().mean() for k, task in enumerate(out)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert float(together[i]) == pytest.approx(float(loss.detach()), rel=1e-4)


def losses(**means):
    """Four runs of each model about its mean."""
    return {model: [mean * f for f in (0.99, 1.0, 1.0, 1.01)] for model, mean in means.items()}


def test_claims_are_judged_by_the_losses():
    study = script("study_synthetic")
    held = {
        0.5: losses(shared_bottom=2.0, omoe=1.5, mmoe=1.03),
        1.0: losses(shared_bottom=1.1, omoe=1.0, mmoe=1.0),
    }
    held[0.5]["shared_bottom"] = [1.0, 1.0, 3.0, 3.0]  # as good at best, and far apart
    held[0.5]["omoe"] = [1.05, 1.65, 1.65, 1.65]
    held[1.0]["shared_bottom"] = [1.0, 1.1, 1.1, 1.2]
    verdicts = [verdict for _, verdict, _ in study.claims(held)]
    assert verdicts == ["reproduced", "reproduced", "in part (2 of 4)", "reproduced"]
    other = {
        0.5: losses(shared_bottom=1.0, omoe=1.0, mmoe=3.0),
        1.0: losses(shared_bottom=0.5, omoe=0.9, mmoe=1.0),
    }
    verdicts = [verdict for _, verdict, _ in study.claims(other)]
    assert verdicts == ["not reproduced"] * 4
    assert study.paired([3.0, 5.0], [1.0, 1.0]) == (3.0, 1.0)
    # Where the others lose nothing, MMoE cannot lose less.
    gain = {c: losses(shared_bottom=1 + c, omoe=1 + c, mmoe=1 + 3 * c) for c in (0.5, 1.0)}
    assert study.claims(gain)[0][1] == "not reproduced"


def test_the_synthetic_study_leaves_its_files_and_goes_on(run, tmp_path, capsys):
    sizes = ["--runs", 2, "--tuning-runs", 1, "--steps", 2, "--correlations", 0.5, 1.0, "--jobs", 1, "--out", tmp_path]
    run("study_synthetic", *sizes)
    with (tmp_path / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["correlation"], row["run"]) for row in rows] == [("0.5", "0"), ("0.5", "1"), ("1", "0"), ("1", "1")]
    text = (tmp_path / "study.md").read_text()
    assert text.count("| Shared-Bottom |") == 2
    assert all(f"\n{i}. " in text for i in range(1, 5))
    assert "</svg>" in (tmp_path / "study.svg").read_text()
    assert "Runs by their final loss" in (tmp_path / "study.html").read_text()
    capsys.readouterr()
    run("study_synthetic", *sizes)
    assert (tmp_path / "study.md").read_text() == text
    with pytest.raises(SystemExit):
        run("study_synthetic", "--correlations", 0.5)
    assert "expected at least two to compare" in capsys.readouterr().err


def people(folder):
    """Both files of Census-Income, with made-up people: the old earn more, the young are not married."""
    draw = random.Random(0)
    for name, count in (("data", 300), ("test", 200)):
        lines = []
        for _ in range(count):
            row = {c: "0" if c in NUMBERS else draw.choice(["a", "b"]) for c in COLUMNS} | {"instance_weight": "1"}
            age = draw.randrange(90)
            row |= {"age": str(age), "year": draw.choice(["94", "95"])}
            row |= {"income_50k": "50000+." if age + draw.randrange(40) > 80 else "- 50000."}
            row |= {"marital_stat": "Never married" if age + draw.randrange(20) < 40 else "Divorced"}
            row |= {"education": draw.choice(["Children", "Doctorate degree(PhD EdD)"])}
            lines.append(", ".join(row[c] for c in COLUMNS))
        (folder / f"census-income.{name}").write_text("\n".join(lines) + "\n")


def test_the_census_study_compares_models_and_goes_on(run, tmp_path):
    people(tmp_path)
    out = tmp_path / "study"
    small = ["--root", tmp_path, "--out", out, "--groups", "income", "--epochs", 2, "--jobs", 1, "--seeds", 2]
    run("study_census", *small, "--tuning", 2, "--models", "shared_bottom", "mmoe")
    with (out / "runs.csv").open() as file:
        first = list(csv.DictReader(file))
    assert len(first) == 2 * (2 + 2)
    for row in first:
        assert 0 < float(row["main"]) < 1
        assert 0 < float(row["other"]) < 1
        assert 0 <= float(row["zeros"]) <= float(row["most_zeros"]) <= 1
    text = (out / "study.md").read_text()
    assert re_rows(text) == ["shared_bottom", "mmoe"]
    run("study_census", *small, "--tuning", 2, "--models", "shared_bottom", "mmoe", "ple")
    with (out / "runs.csv").open() as file:
        second = list(csv.DictReader(file))
    assert second[: len(first)] == first  # what was done is not done again
    assert len(second) == 3 * (2 + 2)
    assert "PLE against MMoE: " in (out / "study.md").read_text()

    # What the page says of settings, seeds and epochs is so of the runs in its table.
    fewer = [*small, "--tuning", 1, "--models", "shared_bottom", "mmoe"]
    run("study_census", *fewer, "--seeds", 3)
    run("study_census", *fewer, "--epochs", 1)
    with (out / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    mine = [row for row in rows if row["epochs"] == "1"]
    assert len(mine) == 2 * (1 + 2)
    assert {row["setting"] for row in mine} == {"0"}
    text = (out / "study.md").read_text()
    assert text.startswith("1 settings tried a model, then 2 paired seeds; at most 1 epochs.")
    for model in ("shared_bottom", "mmoe"):
        reached = [float(row["main"]) for row in mine if row["model"] == model and row["phase"] == "seeds"]
        assert f"| {model} | " in text
        assert f"{sum(reached) / 2:.4f} (" in text


def test_mistakes_of_the_studies_are_one_line_before_any_work(tmp_path, capsys, monkeypatch):
    """What is wrong is told at once, and nothing is left behind."""
    (tmp_path / "file").touch()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "runs.csv").write_text("group,model\n")
    people(tmp_path)
    out = ["--out", tmp_path / "out"]
    for name, args, told in (
        ("study_census", ["--root", tmp_path / "nowhere", *out], "there is no census-income.data"),
        ("study_census", ["--root", tmp_path, "--out", tmp_path / "file"], "is a file"),
        ("study_census", ["--root", tmp_path, "--out", tmp_path / "old"], "has other columns than this study's"),
        ("study_synthetic", ["--out", tmp_path / "file", "--steps", 1], "is a file"),
        ("study_synthetic", ["--correlations", 0.5, 2, *out], "expected numbers from -1 to 1, got 2"),
        ("study_synthetic", ["--correlations", "nan", 0.5, *out], "expected numbers from -1 to 1, got nan"),
    ):
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
        assert stopped.value.code == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def re_rows(text):
    """The models of a table."""
    return [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|") and "AUC" not in line][1:]


def test_every_model_of_the_census_study_has_about_the_same_parameters():
    study = script("study_census")
    schema = {
        "features": {f"x{i}": {"kind": "dense"} for i in range(255)},
        "tasks": {"income": {}, "never_married": {}},
    }
    sizes = {
        name: sum(
            p.numel() for p in zoo.create_model(f"recommendation/{name}", schema=schema, **arguments).parameters()
        )
        for name, arguments in study.MODELS.items()
    }
    assert max(sizes.values()) < 1.1 * min(sizes.values()), sizes
    models = {name.removeprefix("recommendation/") for name in zoo.list_models("recommendation/*")}
    assert models == set(study.MODELS)
