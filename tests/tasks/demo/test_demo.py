import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import zoo
from tasks.demo import main, prepare
from zoo.report.run import Run


def test_trains_compares_exports_and_reports(config, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["--seconds", "2", "--out", str(out), "--config", str(config)]) == 0

    run = Run(out)
    moe, dense = (run.table("language", name, "train.csv") for name in ("moe", "dense"))
    for rows in (moe, dense):
        assert rows[-1]["seconds"] > 0.5  # a last step may take any time on a busy machine
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        assert rows[-1]["tokens"] == 4 * 32 * len(rows)
    # The same sizes apart from gates and experts, and every token active in the twin.
    models = run.document("language", "about.json")["models"]
    assert models["dense"]["active"] == models["dense"]["total"] == models["moe"]["active"] - 2 * 4 * 32
    assert models["moe"]["total"] > models["moe"]["active"]
    loads = run.table("language", "moe", "experts.csv")
    assert {row["layer"] for row in loads} == {0, 1}
    assert all(sum(row[f"load_{e}"] for e in range(4)) == pytest.approx(1, abs=1e-3) for row in loads)
    assert run.facts["status"] == "finished"

    printed = capsys.readouterr().out
    assert "at equal training time" in printed
    assert "def f" in printed
    page = (out / "report.html").read_text()
    assert "What each expert specialises in" in page
    assert "Expert 3" in page

    # What was exported is what was evaluated.
    model = zoo.from_pretrained(out / "language" / "moe" / "model")
    checkpoint = torch.load(out / "language" / "moe" / "last.ckpt", weights_only=True)
    exported = {name: value for name, value in model.state_dict().items() if "selection_bias" not in name}
    assert exported
    for name, value in exported.items():
        torch.testing.assert_close(value, checkpoint["state_dict"][f"model.{name}"], rtol=0, atol=0)


def test_ctrl_c_leaves_checkpoints_and_a_partial_report(config, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "tasks", "demo", "--seconds", "600", "--out", str(out), "--config", str(config)]
    process = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # see test_side_by_side
    )
    try:
        trained = [out / "language" / name / "train.csv" for name in ("moe", "dense")]
        deadline = time.time() + 120
        while not all(path.exists() for path in trained) and time.time() < deadline and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "stopping after this step" in printed
    assert json.loads((out / "demo.json").read_text())["status"] == "interrupted"
    assert "stopped before its end" in (out / "report.html").read_text()
    checkpoint = torch.load(out / "language" / "moe" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] > 0
    ids = torch.arange(5)[None]
    assert zoo.from_pretrained(out / "language" / "moe" / "model")(input_ids=ids).logits.isfinite().all()


def test_a_users_folder_is_left_alone(config, tmp_path, capsys):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    assert main(["--out", str(out), "--config", str(config)]) == 2
    assert "was not made by zoo demo" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]


def test_an_empty_folder_and_an_earlier_demo_are_used(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    prepare(out)
    (out / "left.over").write_text("")
    prepare(out)
    assert [p.name for p in out.iterdir()] == ["demo.json"]


@pytest.mark.parametrize("arguments", [["--seconds", "0"], ["--config", "nowhere.yaml"], ["--out"], ["--second", "x"]])
def test_mistakes_in_the_arguments_change_nothing(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_mistake_in_the_configuration_is_named(config, tmp_path, capsys):
    config.write_text(config.read_text().replace("num_experts:", "num_expert:"))
    assert main(["--seconds", "1", "--out", str(tmp_path / "run"), "--config", str(config)]) == 2
    assert "num_experts" in capsys.readouterr().err
