"""The vision-language parts of a demo's report: figures and curves, and which experts images and texts go to."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

from .chart import Series, line_chart
from .comparison import points
from .modalities import experts
from .page import columns, figure, section, table
from .run import Row, Run


@dataclass(frozen=True)
class Contest:
    """A mixture of experts against its dense twin, in a folder of the run."""

    folder: str
    label: str
    heading: str
    about: str
    figures: dict[str, str]
    unit: str
    drawn: str


CONTESTS = (
    Contest(
        "vision_language",
        "LIMoE",
        "Vision and language: LIMoE against its dense twin",
        "One tower reads pictures and captions. Then it says which of ten names is nearest to a picture of one unseen "
        "digit, and which caption to a picture.",
        {"error": "digits not told by their names", "missed": "pictures whose text is not the nearest"},
        "pairs",
        "share of unseen digits",
    ),
    Contest(
        "instruction",
        "MoE-LLaVA",
        "Answers about pictures: MoE-LLaVA against its dense twin",
        "A language model sees a picture through a vision tower and answers questions; it is judged by questions that "
        "count digits of unseen handwriting, of which every word of the answer must be right.",
        {"error": "counting questions answered wrong"},
        "questions",
        "share of counting questions",
    ),
)
DENSE = "dense twin"


def sections(run: Run) -> list[str]:
    """HTML of every section that the run left data for."""
    return [part for contest in CONTESTS for part in _sections(run, contest)]


def _sections(run: Run, contest: Contest) -> list[str]:
    curves = _curves(run, contest)
    if not all(curves.values()):
        return []
    about = {name: run.document(contest.folder, name, "about.json") or {} for name in curves}
    shares = run.document(contest.folder, "moe", "modalities.json")
    return [
        section(
            contest.heading,
            f"{escape(about['moe'].get('pictures', ''))}. {contest.about} Both trained side by side, a process and "
            "cores each; a running average of the weights is evaluated.",
            _table(contest, curves, about),
            columns(
                _chart(contest, curves, "seconds", "seconds of training"), _chart(contest, curves, "step", "steps")
            ),
        ),
        experts(shares["layers"]) if shares else "",
    ]


def summary(run: Run) -> str:
    """The result in plain text; empty where the run has no such part."""
    return "\n\n".join(text for contest in CONTESTS if (text := _summary(run, contest)))


def _summary(run: Run, contest: Contest) -> str:
    curves = _curves(run, contest)
    if not all(curves.values()):
        return ""
    lines = []
    for key, what in contest.figures.items():
        lines.append(f"{what:<40}{contest.label:>10}{'dense':>8}")
        for point, where in points(curves, key):
            lines.append(f"{where:<40}{point.moe:>10.1%}{point.dense:>8.1%}")
    return "\n".join(lines)


def _curves(run: Run, contest: Contest) -> dict[str, list[Row]]:
    return {name: run.table(contest.folder, name, "val.csv") for name in ("moe", "dense")}


def _table(contest: Contest, curves: dict[str, list[Row]], about: dict[str, Any]) -> str:
    rows = []
    for key, what in contest.figures.items():
        for point, where in points(curves, key):
            kind = "good" if point.moe < point.dense else "bad"
            rows.append([f"{what} {where}", f'<b class="{kind}">{point.moe:.1%}</b>', f"{point.dense:.1%}"])
    for key, what in (("active", "active parameters a token"), ("total", "parameters")):
        if all(key in facts for facts in about.values()):
            rows.append([what, *(f"{facts[key] / 1e3:,.0f} k" for facts in about.values())])
    for key, what in (("step", "steps"), (contest.unit, f"{contest.unit} seen")):
        rows.append([what, *(f"{rows_[-1][key]:,.0f}" for rows_ in curves.values())])
    return table(["", contest.label, DENSE], rows)


def _chart(contest: Contest, curves: dict[str, list[Row]], x: str, label: str) -> str:
    labels = {"moe": contest.label, "dense": DENSE}
    series = [
        Series(labels[name], [(row[x], row["error"]) for row in rows], f"--{name}") for name, rows in curves.items()
    ]
    what = next(iter(contest.figures.values()))
    return figure(f"{what[0].upper()}{what[1:]} over {label}", line_chart(series, label, contest.drawn))
