"""The report of a vision-language run: which experts images and texts go to, and what the model recognises.

It is made from what `zoo vision_language fit` leaves beside its logs: modalities.json and metrics.csv.
"""

from __future__ import annotations

import csv
import json
from html import escape
from pathlib import Path
from typing import Any

from .chart import Series, bar_chart, line_chart
from .page import columns, figure, page, section, table

FILE, METRICS = "modalities.json", "metrics.csv"
COLORS = {"image": "--c0", "text": "--c1"}
FIGURES = {
    "zero_shot_top1": "class recognised by name",
    "zero_shot_top5": "class among the five nearest",
    "text_recall_1": "text found, recall at 1",
    "text_recall_5": "text found, recall at 5",
    "text_recall_10": "text found, recall at 10",
    "image_recall_1": "image found, recall at 1",
    "image_recall_5": "image found, recall at 5",
    "image_recall_10": "image found, recall at 10",
    "answers_right": "answers right",
    "token_accuracy": "tokens of answers foretold",
}


def is_run(folder: Path) -> bool:
    """Whether a folder holds the logs of such a run."""
    return (folder / FILE).is_file()


def build(folder: Path) -> str:
    """A whole page; raises ValueError for a file that is damaged."""
    found = _shares(folder)
    title = f"Experts of images and texts: {found['network'] or 'a vision-language model'}"
    rows = _metrics(folder)
    heading = f"<h1>{escape(title)}</h1><p>After step {found['step']}, on the validation split.</p>"
    return page(title, [heading, _recognised(rows), experts(found["layers"])])


def summary(folder: Path) -> str:
    """The latest figures and the experts that each modality uses, in plain text; raises as `build`."""
    found, rows = _shares(folder), _metrics(folder)
    latest = rows[-1] if rows else {}
    lines = [f"{what:<34}{latest[name]:>8.1%}" for name, what in FIGURES.items() if name in latest]
    for layer, kinds in found["layers"].items():
        used = ", ".join(f"{kind}s {figures['used']:.1f}" for kind, figures in kinds.items())
        lines.append(f"{'experts in use, ' + layer:<34}  {used}")
    return "\n".join(lines)


def _shares(folder: Path) -> Any:
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return {"network": found["network"], "step": found["step"], "layers": found["layers"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / FILE} is not what a vision-language run leaves: {error}") from None


def _metrics(folder: Path) -> list[dict[str, float]]:
    """Figures of every validation, with its step."""
    if not (folder / METRICS).is_file():
        return []
    with (folder / METRICS).open(newline="", encoding="utf-8") as lines:
        rows = []
        for row in csv.DictReader(lines):
            figures = {name: float(row[f"val/{name}"]) for name in FIGURES if row.get(f"val/{name}")}
            if figures:
                rows.append({"step": float(row["step"]) + 1, **figures})
    return rows


def _recognised(rows: list[dict[str, float]]) -> str:
    if not rows:
        return ""
    names = [name for name in FIGURES if name in rows[-1]]
    cells = [[FIGURES[name], f"{rows[-1][name]:.1%}"] for name in names]
    drawn = [name for name in names if name.endswith(("top1", "_1", "right"))]
    series = [
        Series(FIGURES[name], [(row["step"], row[name]) for row in rows if name in row], f"--c{i}")
        for i, name in enumerate(drawn)
    ]
    return section(
        "What it recognises",
        "Of contrastive models, classes that they were not trained on as classes, by the text that names them, and for "
        "each image the nearest texts, for each text the nearest images; of others, answers about images.",
        columns(table(["", "share"], cells), figure("Over training", line_chart(series, "steps", "share", (0.0, 1.0)))),
    )


def experts(layers: dict[str, Any]) -> str:
    """A section with a chart a layer: the share of each modality's tokens that every expert takes."""
    cards, rows = [], []
    for layer, kinds in layers.items():
        shares = {kind: figures["share"] for kind, figures in kinds.items()}
        colors = [COLORS.get(kind, "--c2") for kind in shares]
        cards.append(figure(layer, bar_chart(shares, colors, "expert", "share of the modality's tokens")))
        for kind, figures in kinds.items():
            number = len(figures["share"])
            rows.append([f"{layer}, {kind}", f"{figures['used']:.1f} of {number}", f"{figures['drop_rate']:.1%}"])
    return section(
        "Which experts images and texts go to",
        "The share of a modality's tokens that each expert takes, a layer each (LIMoE 2206.02770, section 4): experts "
        "for one modality emerge without being told what a token is. Experts in use are the exponential of the "
        "entropy of the shares.",
        columns(*cards),
        table(["", "experts in use", "tokens without an expert"], rows) if rows else "",
    )
