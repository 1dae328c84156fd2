"""The example scripts run as they stand, one on what the other made."""

import runpy
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts"


def run(monkeypatch, name, *args):
    monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
    runpy.run_path(str(SCRIPTS / name), run_name="__main__")


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
    assert (tmp_path / "second" / "tokenizer.json").read_text() == (tmp_path / "first" / "tokenizer.json").read_text()
