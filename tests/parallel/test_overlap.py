"""Waiting for tokens, by hand and as the script shows it."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from zoo.parallel.overlap import Pair, exposed
from zoo.parallel.plan import Machine

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_shortcut.py"
# 1e6 operations and, inside a node, 1e3 bytes a second; between nodes 100.
MACHINE = Machine(per_node=4, flops=2e6, busy=0.5, within=1e3, between=100.0)
PAIR = Pair(tokens=10, sequence=50, width=8, attention=8, kv=4, dense=20, experts=4, hidden=10, k=1)


def test_times_of_the_parts_by_hand() -> None:
    found = PAIR.seconds(4, MACHINE)
    # 8 x 8 for queries and outputs, 8 x 4 for keys and values: 192 products; 25 earlier tokens on average, twice 8.
    assert found["attention"] == pytest.approx(10 * (2 * 192 + 2 * 2 * 25 * 8) / 1e6)
    assert found["dense"] == pytest.approx(10 * 2 * 3 * 8 * 20 / 1e6)
    assert found["experts"] == pytest.approx(10 * 2 * 3 * 8 * 10 / 1e6)
    # Three of four experts are elsewhere: 7.5 rows of 16 bytes.
    assert found["exchange"] == pytest.approx(7.5 * 16 / 1e3)
    assert PAIR.seconds(1, MACHINE)["exchange"] == 0


@pytest.mark.parametrize(
    ("within", "forward", "backward", "short_forward", "short_backward"),
    [
        # d = 0.0096 and a = 0.01184 seconds, t as follows.
        (1e3, 0.12 - 0.0096 + 0.12, 0.12 - 0.0192 + 0.12, 0.1104 + 0.12 - 0.02144, 0.1008 + 0.12 - 0.04288),  # 0.12
        (1e4, 0.0024 + 0.012, 0.012, 0.0024, 0.0),  # 0.012: more than d, less than 2d and than a + d
        (1e5, 0.0012, 0.0012, 0.0, 0.0),  # 0.0012: all but the plain layer's results is hidden
    ],
)
def test_what_is_waited_for_by_hand(
    within: float, forward: float, backward: float, short_forward: float, short_backward: float
) -> None:
    machine = Machine(per_node=4, flops=2e6, busy=0.5, within=within)
    plain, short = (exposed(PAIR, 4, machine, shortcut) for shortcut in (False, True))
    assert plain == pytest.approx({"forward": forward, "backward": backward})
    assert short == pytest.approx({"forward": short_forward, "backward": short_backward})
    assert exposed(PAIR, 1, machine, False) == {"forward": 0, "backward": 0}


def test_the_script_shows_a_row_for_each_model_and_number_of_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--models", "mixtral_8x7b", "--processes", "2", "8", "64"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[:2] for row in rows] == [["mixtral_8x7b", "2"], ["mixtral_8x7b", "8"]]
    # 8192 tokens of 4096 numbers, each to the other of two with 1 - C(4, 2) / C(8, 2), four times at 450 GB/s.
    assert float(rows[0][3]) == pytest.approx(4e3 * 8192 * 4096 * 2 * (1 - 6 / 28) / 450e9, abs=0.005)
