"""Copies of hot experts, counted: against loops over tokens and processes."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from zoo.parallel.replicas import kept, lent, step

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_shadows.py"


def by_loop(chosen: Tensor, processes: int, copied: list[int]) -> tuple[int, int]:
    """Rows between processes, and the assignments of the busiest."""
    tokens, experts = chosen.shape
    share, part = -(-tokens // processes), -(-experts // processes)
    rows, load = 0, [0] * processes
    for t, row in enumerate(chosen.tolist()):
        home, there = t // share, set()
        for e in (e for e in range(experts) if row[e]):
            at = home if e in copied else e // part
            load[at] += 1
            there.add(at)
        rows += len(there - {home})
    return rows, max(load)


@pytest.mark.parametrize(("tokens", "experts", "processes"), [(30, 8, 4), (17, 7, 3), (1, 4, 2), (0, 4, 2), (9, 3, 1)])
def test_a_step_is_what_loops_count(tokens: int, experts: int, processes: int) -> None:
    for copied in ([], [0], list(range(experts))):
        chosen = torch.rand(tokens, experts) < 0.4
        found = step(chosen, processes, 10, 1000, copied)
        rows, busiest = by_loop(chosen, processes, copied)
        assert (found.rows, found.busiest) == (4 * rows * 10, busiest)
        assert found.weights == 2 * (processes - 1) * 1000 * len(copied)


def test_what_is_lent_pays_and_everything_that_pays_alone_is_lent() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        popular = torch.rand(8).pow(4)
        chosen = torch.rand(60, 8) < popular
        plain = step(chosen, 4, 10, 60)
        gains = {e: plain.rows - step(chosen, 4, 10, 60, [e]).rows - 2 * 3 * 60 for e in range(8)}
        assert lent(chosen, 4, 10, 60, 8) == [e for e in range(8) if gains[e] > 0]
        for limit in (1, 2, 8):
            found = step(chosen, 4, 10, 60, lent(chosen, 4, 10, 60, limit))
            assert found.rows + found.weights <= plain.rows


def test_what_is_kept_is_what_pays_in_the_mean() -> None:
    torch.manual_seed(1)
    trace = [torch.rand(40, 6) < torch.tensor([0.9, 0.1, 0.1, 0.1, 0.1, 0.1]) for _ in range(5)]
    assert kept(trace, 3, 10, 100, 6) == [0]
    assert kept(trace, 3, 10, 10_000, 6) == []


def test_the_script_shows_fewer_bytes(monkeypatch, capsys) -> None:
    sizes = ["--tokens", "256", "--experts", "16", "--processes", "4", "--dim", "64", "--hidden", "64", "--steps", "4"]
    monkeypatch.setattr(sys, "argv", ["bench_shadows.py", *sizes, "--skew", "1.5"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    rows = {line[:18].strip(): line[18:].split() for line in capsys.readouterr().out.splitlines()[1:]}
    assert float(rows["each expert once"][2]) == 1
    for way in ("lent for a step", "kept by all"):
        assert float(rows[way][2]) < 1
        assert float(rows[way][1]) > 0
