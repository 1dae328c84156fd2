"""`zoo demo`: train a small mixture of experts and its dense twin side by side, and report how they compare.

Every domain has its part in a file of its own, a function run(folder, options) that trains, prints, and leaves data
for `zoo.report`. The run's folder holds nothing that the user wrote, so that the next demo may replace it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.cli import CONFIGS

from .machine import describe

MARKER = "demo.json"
DEFAULT_SECONDS = 60.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status: 0, 2 for a mistake in the arguments, 130 after Ctrl-C."""
    try:
        options = _parser().parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        if not 0 < options.seconds < float("inf"):
            raise ValueError(f"--seconds must be above 0 and finite, got {options.seconds:g}")
        if not Path(options.config).is_file():
            raise ValueError(f"there is no config file {options.config}")
        prepare(options.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return _run(options)


def prepare(folder: Path) -> None:
    """Make an empty folder for a run, in place of an earlier demo's; raises FileExistsError for any other."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not is_demo(folder):
            raise FileExistsError(
                f"{folder} exists and was not made by zoo demo; nothing was changed. Choose another with --out"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _note(folder, status="running", started=time.strftime("%Y-%m-%d %H:%M:%S %Z"), **describe())


def is_demo(folder: Path) -> bool:
    """Whether a folder is what an earlier demo left."""
    try:
        return json.loads((folder / MARKER).read_text())["made_by"] == "zoo demo"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _run(options: argparse.Namespace) -> int:
    started = time.perf_counter()
    status, code = "finished", 0
    try:
        from .language import run

        finished = run(options.out / "language", options.config, options.seconds)
        if finished:
            from . import vision

            finished = vision.run(options.out / "vision", seconds=vision.SHARE * options.seconds)
        if finished:
            from . import vision_language

            for name, pair in vision_language.PAIRS.items():
                finished = finished and vision_language.run(name, options.out / name, pair.share * options.seconds)
        if finished:
            from . import recommendation

            seconds = recommendation.SHARE * options.seconds
            finished = recommendation.run(options.out / "recommendation", seconds=seconds)
    except KeyboardInterrupt:
        finished = False
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        _note(options.out, status="failed", wall_seconds=time.perf_counter() - started)
        return 2
    if not finished:
        status, code = "interrupted", 130
    _note(options.out, status=status, wall_seconds=time.perf_counter() - started)

    from zoo.report import build, summary

    report = build(options.out)
    print()
    print(summary(options.out))
    print(f"\nreport: {report}   ({time.perf_counter() - started:.0f} s in all)")
    return code


def _note(folder: Path, **facts: Any) -> None:
    """Add facts to the run's own file."""
    path = folder / MARKER
    known = json.loads(path.read_text()) if path.exists() else {"made_by": "zoo demo"}
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps({**known, **facts}, indent=1) + "\n")
    draft.replace(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="zoo demo", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--seconds",
        type=float,
        default=DEFAULT_SECONDS,
        help="training time of the language models, both at once (default %(default)g); the other parts add 0.8 of it",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the run (default %(default)s)")
    parser.add_argument(
        "--config",
        type=Path,
        default=CONFIGS / "language" / "demo.yaml",
        help="configuration of the mixture of experts, as for zoo language fit (default configs/language/demo.yaml)",
    )
    return parser
