"""The comparison of gates runs every row of its table, and writes what it found."""

from __future__ import annotations

import csv
import runpy
import sys
import xml.etree.ElementTree as ET
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_routers.py"


def run(monkeypatch: Any, *args: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["compare_routers.py", *map(str, args)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.mark.parametrize(("domain", "wanted"), [("language", ["*"]), ("vision", ["dense*", "Soft*", "hash*", "Lory"])])
def test_every_gate_has_a_row_with_figures_or_a_reason(
    domain: str, wanted: list[str], text: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--steps", 2, "--eval-batches", 1, "--text", text, "--out", "found"]
    run(monkeypatch, "--domains", domain, "--routers", *wanted, *options)
    with open("found/routers.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    gates = runpy.run_path(str(SCRIPT))["GATES"]
    chosen = [name for name in ("dense twin", *gates) if any(fnmatchcase(name, pattern) for pattern in wanted)]
    assert [row["gate"] for row in rows] == chosen
    for row in rows:
        left_out = getattr(gates.get(row["gate"]), f"not_{domain}", "")
        assert row["note"] == (f"not run: {left_out}" if left_out else "")
        if not left_out:
            assert float(row["quality"]) >= 0
            assert float(row["per_second"]) > 0
    table = Path("found/routers.md").read_text(encoding="utf-8")
    assert all(f"| {row['gate']} |" in table for row in rows)
    figures = [row for row in rows if not row["note"]]
    assert not any(row["deviation"] for row in rows)
    bars = ET.parse("found/routers.svg").getroot().findall(".//{http://www.w3.org/2000/svg}rect")
    assert len(bars) == 1 + 4 * len(figures)


def test_seeds_are_averaged_and_their_spread_is_shown(text: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    found = []
    options = ["--domains", "language", "--routers", "Switch", "--steps", 2, "--eval-batches", 1, "--text", text]
    for seeds in (1, 2):
        run(monkeypatch, *options, "--seeds", seeds, "--out", f"found{seeds}")
        with open(f"found{seeds}/routers.csv", encoding="utf-8") as file:
            found.append(next(iter(csv.DictReader(file))))
    # Of two figures, the mean is one of them plus or minus the deviation over the root of two.
    first, both, deviation = float(found[0]["quality"]), float(found[1]["quality"]), float(found[1]["deviation"])
    assert deviation > 0
    assert abs(first - both) == pytest.approx(deviation / 2**0.5, rel=1e-6)
    assert f"{both:.3f} ± {deviation:.3f}" in Path("found2/routers.md").read_text(encoding="utf-8")


def test_an_unknown_gate_is_named_and_nothing_is_written(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run(monkeypatch, "--routers", "Switch", "Swich")  # one that is known does not hide one that is not
    assert "no gate is called Swich; there are: dense twin, Shazeer" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
