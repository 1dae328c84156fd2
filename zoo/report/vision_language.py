"""The vision-language part of a demo's report: figures and curves, and which experts images and texts go to."""

from __future__ import annotations

from html import escape
from typing import Any

from .chart import Series, line_chart
from .comparison import points
from .modalities import experts
from .page import columns, figure, section, table
from .run import Row, Run

MODELS = {"moe": "LIMoE", "dense": "dense twin"}
FIGURES = {"error": "digits not told by their names", "missed": "pictures whose text is not the nearest"}


def sections(run: Run) -> list[str]:
    """HTML of every section that the run left data for."""
    curves = _curves(run)
    if not all(curves.values()):
        return []
    about = {name: run.document("vision_language", name, "about.json") or {} for name in MODELS}
    shares = run.document("vision_language", "moe", "modalities.json")
    return [
        section(
            "Vision and language: LIMoE against its dense twin",
            f"{escape(about['moe'].get('pictures', ''))}. One tower reads pictures and captions. Then it says which "
            "of ten names is nearest to a picture of one unseen digit, and which caption to a picture. Both trained "
            "side by side, a process and cores each; a running average of the weights is evaluated.",
            _table(curves, about),
            columns(_chart(curves, "seconds", "seconds of training"), _chart(curves, "step", "steps")),
        ),
        experts(shares["layers"]) if shares else "",
    ]


def summary(run: Run) -> str:
    """The result in plain text; empty where the run has no such part."""
    curves = _curves(run)
    if not all(curves.values()):
        return ""
    lines = []
    for key, what in FIGURES.items():
        lines.append(f"{what:<40}{'LIMoE':>8}{'dense':>8}")
        for point, where in points(curves, key):
            lines.append(f"{where:<40}{point.moe:>8.1%}{point.dense:>8.1%}")
    return "\n".join(lines)


def _curves(run: Run) -> dict[str, list[Row]]:
    return {name: run.table("vision_language", name, "val.csv") for name in MODELS}


def _table(curves: dict[str, list[Row]], about: dict[str, Any]) -> str:
    rows = []
    for key, what in FIGURES.items():
        for point, where in points(curves, key):
            kind = "good" if point.moe < point.dense else "bad"
            rows.append([f"{what} {where}", f'<b class="{kind}">{point.moe:.1%}</b>', f"{point.dense:.1%}"])
    for key, what in (("active", "active parameters a token"), ("total", "parameters")):
        if all(key in facts for facts in about.values()):
            rows.append([what, *(f"{about[name][key] / 1e3:,.0f} k" for name in MODELS)])
    for key, what in (("step", "steps"), ("pairs", "pairs seen")):
        rows.append([what, *(f"{curves[name][-1][key]:,.0f}" for name in MODELS)])
    return table(["", *MODELS.values()], rows)


def _chart(curves: dict[str, list[Row]], x: str, label: str) -> str:
    series = [
        Series(MODELS[name], [(row[x], row["error"]) for row in rows], f"--{name}") for name, rows in curves.items()
    ]
    return figure(f"Digits not told by name over {label}", line_chart(series, label, "share of unseen digits"))
