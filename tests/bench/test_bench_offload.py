"""The benchmark of offloaded experts, on a model that is over in a second."""

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_offload.py"


@pytest.mark.parametrize("more", [[], ["--cold"]])
def test_every_way_has_a_speed_and_slots_say_what_was_read(more, tmp_path, monkeypatch, capsys):
    small = [
        "--hidden",
        "32",
        "--expert",
        "16",
        "--experts",
        "8",
        "--layers",
        "2",
        "--slots",
        "2",
        "8",
        "--tokens",
        "3",
        "--repeats",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", ["bench_offload.py", *small, *more, "--json", str(tmp_path / "found.json")])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    found = json.loads((tmp_path / "found.json").read_text())
    assert {"in memory", "2 slots", "8 slots"} <= found.keys()
    assert all(row["tokens_per_second"] > 0 for row in found.values())
    reads = {name: row["experts_read_per_token"] for name, row in found.items()}
    assert reads["in memory"] == 0
    assert 0 <= reads["8 slots"] <= reads["2 slots"] <= 4 * 2  # two layers' two experts, and guesses
    assert "2 slots" in capsys.readouterr().out
