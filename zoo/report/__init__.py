"""`zoo report`: one self-contained HTML page about a run, made from the data that lies in its folder.

A run is that of a demo, or the logs of a vision-language model, with the experts of images and of texts.

Nothing heavy is imported, and nothing is computed again: tables are read, charts are drawn as SVG. What a run that
was cut short did not leave is left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import language, modalities, recommendation, vision, vision_language
from .page import page
from .run import Run

FILE = "report.html"
OTHERS = (vision, vision_language, recommendation)  # the parts of a demo after the first


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report of a run's folder again; returns the exit status, 2 for a folder that holds no run."""
    parser = argparse.ArgumentParser(
        prog="zoo report", description="Write the report of a demo again, or of a vision-language run."
    )
    about = "of a demo, or of the logs of zoo vision_language; default %(default)s"
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/demo"), help=about)
    try:
        folder = parser.parse_args(argv).folder
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        path = build(folder)
        text = summary(folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{text}\n\nreport: {path}")
    return 0


def build(folder: Path) -> Path:
    """Write report.html into a run's folder; raises ValueError when the folder holds no run."""
    if modalities.is_run(folder):
        text = modalities.build(folder)
    else:
        run = Run(folder)
        *sections, foot = language.sections(run)
        others = [part for domain in OTHERS for part in domain.sections(run)]
        text = page("MoE Zoo demo", [*sections, *others, foot])
    path = folder / FILE
    draft = path.with_suffix(".tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
    return path


def summary(folder: Path) -> str:
    """The result as a plain text table; raises ValueError when the folder holds no run."""
    if modalities.is_run(folder):
        return modalities.summary(folder)
    run = Run(folder)
    parts = [language.summary(run), *(domain.summary(run) for domain in OTHERS)]
    return "\n\n".join(part for part in parts if part)
