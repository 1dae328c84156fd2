"""The example scripts run as they stand, one on what the other made."""

import runpy
import sys
from pathlib import Path

import pytest

import zoo

SCRIPTS = Path(__file__).parents[2] / "scripts"


def run(monkeypatch, name, *args):
    monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
    runpy.run_path(str(SCRIPTS / name), run_name="__main__")


@pytest.mark.parametrize(
    ("name", "args", "told"),
    [
        (
            "generate.py",
            ["model", "x", "--tokens", 0],
            "argument --tokens: expected a whole number of at least 1, got '0'",
        ),
        ("generate.py", ["model", "x", "--temperature", -1], "temperature must be at least 0, got -1.0"),
        ("generate.py", ["nowhere", "x"], "nowhere: no such folder"),
        ("generate.py", ["empty", "x"], "empty/config.json: no such file"),
        ("train_language.py", ["empty.txt", "--out", "made"], "nothing to train on; give more text"),
        ("train_language.py", ["short.txt", "--out", "made"], "nothing to val on; give more text"),
        ("compress.py", ["model", "short.txt", "--keep", 2, "--out", "full"], "--out: full exists and is not empty"),
        ("train_language.py", ["short.txt", "--out", "full"], "--out: full exists and is not empty"),
        ("continue_language.py", ["model", "short.txt", "--out", "full"], "--out: full exists and is not empty"),
        ("train_table.py", ["rows.csv", "schema.yaml", "--out", "full"], "--out: full exists and is not empty"),
        ("finetune_vision.py", ["model", "empty", "--out", "full"], "--out: full exists and is not empty"),
        ("upcycle_timm.py", ["vit", "empty", "--out", "full"], "--out: full exists and is not empty"),
        ("adapt_language.py", ["--out", "full"], "--out: full exists and is not empty"),
        ("branch_train_mix.py", ["--out", "full"], "--out: full exists and is not empty"),
        ("branch_train_mix.py", ["--k", 4], "--k: there are 3 experts"),
        ("branch_train_mix.py", ["--width", 30], "--width: expected a multiple of 8"),
        ("compare_routers.py", ["--out", "full"], "--out: full has the results of an earlier comparison"),
        ("compare_routers.py", ["--text", "nowhere"], "no text file matches 'nowhere'"),
        ("split_dense.py", ["vit_tniy"], "unknown model of timm 'vit_tniy'; did you mean"),
        ("classify_images.py", ["model", "empty"], "MixtralForCausalLM; expected a model of images"),
        ("score_table.py", ["model", "rows.csv", "--out", "x"], "MixtralForCausalLM; expected a recommendation model"),
        ("export_table.py", ["model", "--out", "x"], "expected a recommendation model, got a MixtralForCausalLM"),
    ],
)
def test_a_mistake_is_one_line(name, args, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("hi")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "routers.csv").write_text("work")
    if "model" in args:
        zoo.save_pretrained(zoo.create_model("language/mixtral_tiny", num_hidden_layers=1), "model")
    with pytest.raises(SystemExit) as done:
        run(monkeypatch, name, *args)
    assert done.value.code == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_train_continue_and_generate(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = ["--steps", 2, "--sequence-length", 32]
    run(monkeypatch, "train_language.py", text, "--out", "first", *short)
    run(monkeypatch, "continue_language.py", "first", text, "--out", "second", *short)
    capsys.readouterr()
    run(monkeypatch, "generate.py", "second", "router", "while", "--tokens", 5)
    shown = capsys.readouterr().out
    assert shown.startswith("router")
    assert "while" in shown
    run(monkeypatch, "generate.py", "second", "router", "--tokens", 9, "--temperature", 0)
    whole = capsys.readouterr().out
    run(monkeypatch, "generate.py", "second", "router", "--tokens", 9, "--temperature", 0, "--offload", 3)
    assert capsys.readouterr().out == whole
    # The same seed, whatever loading a model draws.
    run(monkeypatch, "generate.py", "second", "router", "--tokens", 9)
    drawn = capsys.readouterr().out
    run(monkeypatch, "generate.py", "second", "router", "--tokens", 9, "--offload", 3)
    assert capsys.readouterr().out == drawn
    assert (tmp_path / "second" / "tokenizer.json").read_text() == (tmp_path / "first" / "tokenizer.json").read_text()
