"""The example that branches a model over two domains runs as it stands."""

import runpy
import sys
from pathlib import Path

import torch

import zoo

SCRIPT = Path(__file__).parents[2] / "scripts" / "branch_train_mix.py"


def test_branch_train_and_mix(tmp_path, monkeypatch, capsys):
    small = ["--steps", 4, "--width", 16, "--layers", 1, "--length", 32, "--batch-size", 4, "--pieces", 6]
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *map(str, small), "--out", str(tmp_path / "mixed")])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    rows = capsys.readouterr().out.splitlines()
    names = ["bits per byte", "seed", "branch code", "branch prose", "average", "ensemble", "mix", "mix, gates tuned"]
    assert [row[:18].strip() for row in rows] == [*names, "seed, trained on"]
    assert all(6 < float(value) < 9 for row in rows[1:] for value in row[18:].split())
    model = zoo.from_pretrained(tmp_path / "mixed")
    assert model.config.num_local_experts == 3
    assert model(torch.randint(0, 256, (1, 9))).logits.shape == (1, 9, 256)
