"""The simulation of the topology loss, on sizes that take a moment."""

import re
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_topology.py"
SMALL = {"processes": 4, "within": 2, "experts": 4, "k": 1, "dim": 8, "tokens": 32, "steps": 60, "lr": 0.1, "weight": 1}


def test_fewer_rows_cross_nodes_where_gates_or_data_are_a_process_s_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [part for name, value in SMALL.items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    rows = re.findall(r"^(own|one) +(alike|by process) +(load_balance|topology) +(.*)$", capsys.readouterr().out, re.M)
    nodes = {row[:3]: float(row[3].split()[3]) for row in rows}
    assert len(nodes) == 6
    assert nodes["own", "alike", "topology"] < 0.8 * nodes["own", "alike", "load_balance"]
    assert nodes["one", "by process", "topology"] < 0.8 * nodes["one", "by process", "load_balance"]
    for row in rows:  # a row is 8 numbers of 4 bytes, sent four times; there are 4 * 32 tokens
        assert float(row[3].split()[4]) == pytest.approx(float(row[3].split()[3]) * 128 * 8 * 16 / 1e6, abs=1.5e-3)


def test_sizes_that_do_not_divide_are_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--processes", "3"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "do not divide" in capsys.readouterr().err
