"""The recommendation part of a demo's report: figures and curves, and how each task weighs the experts."""

from __future__ import annotations

from html import escape
from typing import Any

from .chart import Series, heat_map, line_chart
from .comparison import points
from .page import columns, figure, section, table
from .run import Row, Run

MODELS = {"moe": "MMoE", "dense": "shared bottom"}


def sections(run: Run) -> list[str]:
    """HTML of every section that the run left data for."""
    curves = _curves(run)
    if not all(curves.values()):
        return []
    about = {name: run.document("recommendation", name, "about.json") or {} for name in MODELS}
    return [
        section(
            "Recommendation: MMoE against a shared bottom",
            f"{escape(about['moe'].get('table', ''))}. MMoE has a gate a task over shared experts; the shared bottom "
            "is one network of as many parameters. Both trained side by side, a process and cores each, at a constant "
            "learning rate; a running average of the weights is evaluated, on rows that training did not see.",
            _table(curves, about),
            columns(_chart(curves, "seconds", "seconds of training"), _chart(curves, "step", "steps")),
        ),
        gates(run.document("recommendation", "moe", "gates.json")),
    ]


def summary(run: Run) -> str:
    """The result in plain text; empty where the run has no recommendation part."""
    curves = _curves(run)
    if not all(curves.values()):
        return ""
    lines = [f"{'two tasks: squared error':<34}{'MMoE':>8}{'shared':>8}"]
    lines += [f"{what:<34}{point.moe:>8.4f}{point.dense:>8.4f}" for point, what in points(curves, "mse")]
    return "\n".join(lines)


def _curves(run: Run) -> dict[str, list[Row]]:
    return {name: run.table("recommendation", name, "val.csv") for name in MODELS}


def _table(curves: dict[str, list[Row]], about: dict[str, Any]) -> str:
    rows = []
    keys = [key for key in curves["moe"][-1] if key.startswith("mse")]
    for key in keys:
        what = "squared error" + (f", {escape(key.removeprefix('mse_'))}" if key != "mse" else "")
        for point, where in points(curves, key):
            kind = "good" if point.moe < point.dense else "bad"
            rows.append([f"{what} {where}", f'<b class="{kind}">{point.moe:.4f}</b>', f"{point.dense:.4f}"])
    if all("total" in facts for facts in about.values()):
        rows.append(["parameters", *(f"{about[name]['total']:,}" for name in MODELS)])
    for key, what in (("step", "steps"), ("rows", "rows seen")):
        rows.append([what, *(f"{curves[name][-1][key]:,.0f}" for name in MODELS)])
    return table(["", *MODELS.values()], rows)


def _chart(curves: dict[str, list[Row]], x: str, label: str) -> str:
    series = [
        Series(MODELS[name], [(row[x], row["mse"]) for row in rows], f"--{name}") for name, rows in curves.items()
    ]
    return figure(f"Squared error over {label}", line_chart(series, label, "squared error, mean of the tasks"))


def gates(found: dict[str, Any] | None) -> str:
    """A section with a figure a task: the mean weight of every expert in its gate, over the steps of training."""
    if not found:
        return ""
    cards = []
    steps = [str(step) for step in found["steps"]]
    for task, weights in found["tasks"].items():
        experts = len(weights[0])
        rows = [[moment[e] for moment in weights] for e in range(experts)]
        cards.append(
            figure(f"Gate of {task}", heat_map(rows, [str(e) for e in range(experts)], steps, 1 / experts, "weight"))
        )
    return section(
        "How each task weighs the experts",
        "Mean weight that a task's gate gives to each expert, a row an expert, on rows that training did not see. Half "
        "strength of colour is an even share. Tasks that have nothing in common settle on different experts.",
        columns(*cards),
    )
