"""What benchmarks share: contestants that take turns, and one table of how they compare.

Contestants take turns, so that a disturbance hits all of them, in an order drawn anew for each round: everyone finds in
the caches what the one before left there. A figure is the median of its turns.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

WARM_UP = 2


def file_to_write(text: str) -> Path:
    """A file's path, as an option of a benchmark; raises ArgumentTypeError before any time is spent on measuring."""
    path = Path(text)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"expected a file that can be written, in a folder that is there, got {text}")
    return path


def device_of(given: str | None) -> str:
    """The device to measure on, cuda where there is one by default; ends with status 2 where there is none like it."""
    import torch

    try:
        torch.empty(0, device=given)
    except (RuntimeError, AssertionError) as error:  # what torch raises is one or the other, as it was built
        print(f"error: --device {given}: {str(error).splitlines()[0]}", file=sys.stderr)
        raise SystemExit(2) from error
    return given or ("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Contestant:
    """`run` gives the output; `leaves` are the tensors whose gradients it makes; `group` says whose it is.

    Where what is measured is a step, `run` may make several, `steps` of them.
    """

    name: str
    group: str
    run: Callable[[], Tensor]
    leaves: Sequence[Tensor]
    refuses: str | None = None
    steps: int = 1


class Phases(NamedTuple):
    """Seconds of one turn: of the forward, and of the backward (zero where none was asked for)."""

    forward: float
    backward: float = 0.0


def _turn(one: Contestant, grad: torch.Tensor | None, device: str) -> Phases:
    """One forward and backward, or one forward where there is no gradient."""
    import torch

    for leaf in one.leaves:
        leaf.grad = None
    mark, between = marks(device)
    mark()
    if grad is None:
        with torch.no_grad():
            one.run()
    else:
        y = one.run()
        mark()
        y.backward(grad)
    mark()
    return Phases(*between())


def marks(device: str) -> tuple[Callable[[], None], Callable[[], list[float]]]:
    """What notes a moment, and what gives the seconds between those noted."""
    return _cuda_marks() if device.startswith("cuda") else _host_marks()


def _host_marks() -> tuple[Callable[[], None], Callable[[], list[float]]]:
    times: list[float] = []
    return lambda: times.append(time.perf_counter()), lambda: [b - a for a, b in pairwise(times)]


def _cuda_marks() -> tuple[Callable[[], None], Callable[[], list[float]]]:
    """On the GPU's own clock, so that the host is not waited for between forward and backward."""
    import torch

    events: list[Any] = []

    def mark() -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        events.append(event)

    def between() -> list[float]:
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]

    torch.cuda.synchronize()  # the turn before is over
    return mark, between


def _cuda_clock() -> float:
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def _drawn(field: Sequence[T], turn: int) -> list[T]:
    """Everyone once, in the order of this round."""
    return random.Random(turn).sample(field, len(field))


def measure_phases(field: list[Contestant], repeats: int, backward: bool, device: str) -> dict[str, list[Phases]]:
    """Every turn of every contestant, forward and backward apart."""
    import torch

    grads = [torch.randn_like(one.run()) if backward else None for one in field]
    turns: dict[str, list[Phases]] = {one.name: [] for one in field}
    for i in range(WARM_UP + repeats):
        for one, grad in _drawn(list(zip(field, grads)), i):
            phases = _turn(one, grad, device)
            if i >= WARM_UP:
                turns[one.name].append(phases)
    return turns


def measure(field: list[Contestant], repeats: int, backward: bool, device: str) -> dict[str, list[float]]:
    """Seconds of every turn of every contestant."""
    return totals(measure_phases(field, repeats, backward, device))


def totals(turns: dict[str, list[Phases]]) -> dict[str, list[float]]:
    """Seconds of every turn, forward and backward together."""
    return {name: [sum(phases) for phases in taken] for name, taken in turns.items()}


def measure_steps(field: list[Contestant], repeats: int, steps: int, device: str) -> dict[str, list[float]]:
    """Seconds of a step of every contestant, as the mean of `steps` of them in every turn."""
    clock = _cuda_clock if device.startswith("cuda") else time.perf_counter
    able = [one for one in field if one.refuses is None]
    turns: dict[str, list[float]] = {one.name: [] for one in able}
    for i in range(1 + repeats):
        for one in _drawn(able, i):
            start = clock()
            for _ in range(steps // one.steps):
                one.run()
            if i:  # the first turn warms up
                turns[one.name].append((clock() - start) / steps)
    return turns


def compare(field: list[Contestant], turns: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One row a contestant: its median, its share of the dense limit, its speed against the best rival."""
    middle = {name: statistics.median(seconds) for name, seconds in turns.items()}
    rival = min((middle[c.name] for c in field if c.group not in ("limit", "zoo") and c.name in middle), default=None)
    rows = []
    for one in field:
        row: dict[str, Any] = {"name": one.name, "refuses": one.refuses}
        if one.name in middle:
            mine = middle[one.name]
            row |= {"ms": 1e3 * mine, "turns_ms": [1e3 * s for s in turns[one.name]]}
            row["of_dense"] = middle["dense"] / mine if "dense" in middle else None
            row["against_best_rival"] = rival / mine if rival else None
        rows.append(row)
    return rows


def add_phases(rows: list[dict[str, Any]], turns: dict[str, list[Phases]], operations: float) -> None:
    """Add to rows of `compare` the median of forward and backward apart, and their rates in TFLOP/s.

    `operations` are the forward's floating-point operations; the backward has twice as many.
    """
    for row in rows:
        for phase, factor in (("forward", 1), ("backward", 2)):
            if row["name"] in turns:
                seconds = statistics.median(getattr(t, phase) for t in turns[row["name"]])
                row[f"{phase}_ms"] = 1e3 * seconds
                row[f"{phase}_tflops"] = factor * operations / seconds / 1e12


PHASES = (
    ("forward_ms", "forward"),
    ("backward_ms", "backward"),
    ("forward_tflops", "TFLOP/s f"),
    ("backward_tflops", "TFLOP/s b"),
)


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print the table of a comparison, forward and backward apart where rows have them."""
    phases = [(key, label) for key, label in PHASES if any(key in row for row in rows)]
    labels = "".join(f"{label:>11}" for _, label in phases)
    print(f"\n{title}\n  {'':26}{'ms':>10}{labels}{'of dense':>10}{'against best rival':>20}")
    for row in rows:
        if row["refuses"]:
            print(f"  {row['name']:26}  left out: {row['refuses']}")
            continue
        shares = (row["of_dense"], row["against_best_rival"])
        dense, rival = ("-" if s is None else f"{s:.2f}" for s in shares)
        apart = "".join(f"{row[key]:>11.{3 if 'flops' in key and row[key] < 1 else 2}f}" for key, _ in phases)
        print(f"  {row['name']:26}{row['ms']:>10.2f}{apart}{dense:>10}{rival:>20}", flush=True)


def machine(device: str) -> dict[str, Any]:
    """Processor, threads and versions."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if "model name" in x), cpu)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("transformers", "timm", "triton"):
        if name in sys.modules:
            versions[name] = sys.modules[name].__version__
    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else None
    return {"cpu": cpu, "threads": torch.get_num_threads(), "gpu": gpu, "versions": versions}
