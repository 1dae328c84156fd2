"""The benchmark of the exchange, on sizes that take a moment."""

import re
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_dispatch.py"


def test_every_way_is_timed_and_sends_what_the_closed_form_says(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    small = {"processes": 4, "tokens": 32, "dim": 16, "hidden": 8, "experts": 8, "repeats": 1}
    arguments = [part for name, value in small.items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    shown = capfd.readouterr().out
    for way in ("whole experts", "the exchange", "two chunks", "fixed messages", "by nodes of two"):
        assert re.search(rf"^{way} +[\d.]+ +[\d.]+ +[\d.]+", shown, re.M), way
    pairs = re.findall(r"([\d.]+) +([\d.]+)$", shown, re.M)
    for found, expected in pairs[1:4]:
        assert found == expected


def test_sizes_that_do_not_divide_are_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--processes", "3"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "3 processes do not divide 16 experts" in capfd.readouterr().err
