import csv
import json

import pytest

from zoo.report import main

FIGURES = ("zero_shot_top1", "zero_shot_top5", "text_recall_1", "image_recall_1")


@pytest.fixture
def logs(tmp_path):
    """Logs of a run with two validations, and shares of two layers with four experts."""
    with (tmp_path / "metrics.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, ["step", "train/loss", *(f"val/{name}" for name in FIGURES)])
        writer.writeheader()
        writer.writerow({"step": 9, "train/loss": 4.0})
        for step, value in ((99, 0.25), (199, 0.875)):
            writer.writerow({"step": step, **{f"val/{name}": value for name in FIGURES}})
    kinds = {
        "image": {"share": [0.5, 0.5, 0.0, 0.0], "used": 2.0, "drop_rate": 0.0},
        "text": {"share": [0.0, 0.125, 0.875, 0.0], "used": 1.5, "drop_rate": 0.25},
    }
    about = {"network": "a <network>", "step": 200, "layers": {"blocks.1.mlp": kinds, "blocks.3.mlp": kinds}}
    (tmp_path / "modalities.json").write_text(json.dumps(about))
    return tmp_path


def test_the_page_draws_every_experts_share_of_each_modality(logs, capsys):
    assert main([str(logs)]) == 0
    page = (logs / "report.html").read_text()
    assert page.count(", expert ") == 2 * 2 * 4
    assert page.count("text, expert 2: 87.5%</title>") == 2
    assert page.count("image, expert 0: 50.0%</title>") == 2
    assert "a &lt;network&gt;" in page
    assert "1.5 of 4" in page
    assert "25.0%" in page
    assert "class recognised by name: 0.875 at 200" in page
    shown = " ".join(capsys.readouterr().out.split())
    assert "class recognised by name 87.5%" in shown
    assert "experts in use, blocks.3.mlp images 2.0, texts 1.5" in shown


def test_a_run_without_metrics_or_layers_is_still_a_page(logs):
    (logs / "metrics.csv").unlink()
    (logs / "modalities.json").write_text(json.dumps({"network": "", "step": 1, "layers": {}}))
    assert main([str(logs)]) == 0
    page = (logs / "report.html").read_text()
    assert "What it recognises" not in page
    assert "After step 1" in page


def test_a_damaged_file_is_named(logs, capsys):
    (logs / "modalities.json").write_text("{")
    assert main([str(logs)]) == 2
    assert "modalities.json is not what a vision-language run leaves" in capsys.readouterr().err
