"""The vision part of a demo's report: figures and curves, and images with the expert of every patch drawn on them."""

from __future__ import annotations

from html import escape
from typing import Any

from .chart import Series, line_chart
from .comparison import points
from .page import columns, figure, section, table
from .run import Row, Run

MODELS = {"moe": "V-MoE", "dense": "dense twin"}
FIGURES = {"error": "wrongly classified", "loss": "cross-entropy"}
SIZE, GAP, PER_ROW = 84, 12, 5  # of the images, in pixels, and how many stand side by side


def sections(run: Run) -> list[str]:
    """HTML of every section that the run left data for."""
    curves = _curves(run)
    if not all(curves.values()):
        return []
    about = {name: run.document("vision", name, "about.json") or {} for name in MODELS}
    return [
        section(
            "Vision: V-MoE against its dense twin",
            f"{escape(about['moe'].get('images', ''))}. The twin has an MLP as wide as a token's two experts together. "
            "Both trained side by side, a process and cores each, at a constant learning rate; a running average of "
            "the weights is evaluated, on images that training did not see.",
            _table(curves, about),
            columns(_chart(curves, "seconds", "seconds of training"), _chart(curves, "step", "steps")),
        ),
        patches(run.document("vision", "moe", "routes.json")),
    ]


def summary(run: Run) -> str:
    """The result in plain text; empty where the run has no vision part."""
    curves = _curves(run)
    if not all(curves.values()):
        return ""
    lines = [f"{'unseen digits: wrongly classified':<34}{'V-MoE':>8}{'dense':>8}"]
    for point, what in points(curves, "error"):
        lines.append(f"{what:<34}{point.moe:>8.1%}{point.dense:>8.1%}")
    lines.append(f"{'unseen digits: cross-entropy':<34}{'V-MoE':>8}{'dense':>8}")
    for point, what in points(curves, "loss"):
        lines.append(f"{what:<34}{point.moe:>8.3f}{point.dense:>8.3f}")
    return "\n".join(lines)


def _curves(run: Run) -> dict[str, list[Row]]:
    return {name: run.table("vision", name, "val.csv") for name in MODELS}


def _table(curves: dict[str, list[Row]], about: dict[str, Any]) -> str:
    rows = []
    for key, what in FIGURES.items():
        for point, where in points(curves, key):
            values = [f"{value:.1%}" if key == "error" else f"{value:.3f}" for value in (point.moe, point.dense)]
            kind = "good" if point.moe < point.dense else "bad"
            rows.append([f"{what} {where}", f'<b class="{kind}">{values[0]}</b>', values[1]])
    for key, what in (("active", "active parameters a token"), ("total", "parameters")):
        if all(key in facts for facts in about.values()):
            rows.append([what, *(f"{about[name][key] / 1e3:,.0f} k" for name in MODELS)])
    for key, what in (("step", "steps"), ("images", "images seen")):
        rows.append([what, *(f"{curves[name][-1][key]:,.0f}" for name in MODELS)])
    return table(["", *MODELS.values()], rows)


def _chart(curves: dict[str, list[Row]], x: str, label: str) -> str:
    series = [
        Series(MODELS[name], [(row[x], row["loss"]) for row in rows], f"--{name}") for name, rows in curves.items()
    ]
    return figure(f"Cross-entropy over {label}", line_chart(series, label, "cross-entropy of unseen digits"))


def patches(found: dict[str, Any] | None) -> str:
    """A section with a figure a layer: images, and on every patch the colour of the expert that it prefers."""
    if not found:
        return ""
    cards = []
    for layer in found["layers"]:
        decided = (
            f"a patch's place decides {100 * layer['decided_by_place']:.0f}% of the choice, "
            f"the class of its image {100 * layer['decided_by_class']:.0f}%"
        )
        pictures = zip(found["images"].items(), layer["experts"].values())
        drawn = [_image(i, name, png, experts, found["side"]) for i, ((name, png), experts) in enumerate(pictures)]
        rows = -(-len(drawn) // PER_ROW)
        width, height = PER_ROW * (SIZE + GAP) - GAP, rows * (SIZE + GAP) - GAP
        svg = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="experts of patches">{"".join(drawn)}</svg>'
        cards.append(figure(f"Layer {layer['layer']}: {decided}", svg + _legend(layer["experts"])))
    return section(
        "Which patches go to which expert",
        "One unseen image of every class. The colour on a patch is the expert that the router gives it the highest "
        "weight. How far place and class decide is the uncertainty about the expert that they remove.",
        columns(*cards),
    )


def _image(number: int, name: str, png: str, experts: list[int], side: int) -> str:
    left, top = (number % PER_ROW) * (SIZE + GAP), (number // PER_ROW) * (SIZE + GAP)
    patch = SIZE / side
    parts = [
        f'<image x="{left}" y="{top}" width="{SIZE}" height="{SIZE}" style="image-rendering:pixelated" '
        f'href="data:image/png;base64,{png}"/>'
    ]
    for i, expert in enumerate(experts):
        x, y = left + (i % side) * patch, top + (i // side) * patch
        parts.append(
            f'<rect x="{x + 1:.2f}" y="{y + 1:.2f}" width="{patch - 2:.2f}" height="{patch - 2:.2f}" '
            f'style="fill:{_color(expert)};fill-opacity:.35;stroke:{_color(expert)};stroke-width:2">'
            f"<title>{escape(name)}: expert {expert}</title></rect>"
        )
    return "".join(parts)


def _legend(experts: dict[str, list[int]]) -> str:
    used = sorted({expert for patch in experts.values() for expert in patch})
    items = [f'<span><i style="background:{_color(e)}"></i>expert {e}</span>' for e in used]
    return f'<div class="legend">{"".join(items)}</div>'


def _color(expert: int) -> str:
    return f"var(--c{expert % 8})"
