"""Sections about what the experts of a trained model do, from what `zoo.analysis.analyse` found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from .chart import Series, heat_map, line_chart
from .page import columns, figure, page, section, table


def analysis_page(document: Mapping[str, Any], title: str) -> str:
    """A whole page about a model."""
    return page(title, [f"<h1>{escape(title)}</h1>", *sections(document)])


def sections(document: Mapping[str, Any] | None) -> list[str]:
    """HTML of every section that the document has data for.

    It has what `analyse` gives, and may have `agreement` {layer: [[step, overlap], ...]}: see `routing_over_training`.
    """
    if not document:
        return []
    layers = document["layers"]
    found = [_specialisation(layers), _drops(layers), _early(document.get("agreement") or {}), _relations(layers)]
    return [part for part in found if part]


def _specialisation(layers: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys(name for figures in layers.values() for name in figures["keys"]))
    rows = []
    for layer, figures in layers.items():
        cells = []
        for name in names:
            key = figures["keys"].get(name, {})
            std = f' <small class="soft">{key["std"]:.3f}, chance {key["chance"]:.3f}</small>' if "std" in key else ""
            cells.append(f"{key['explained']:.1%}{std}" if key.get("values") else "too few")
        rows.append([escape(layer), *cells])
    return section(
        "What decides the expert",
        "How much of the uncertainty about a token's experts goes when one of these is known: 100% means that it "
        "decides alone, as in a hash layer. In small print OpenMoE's measure (2402.01739), the deviation of a key's "
        "shares over the experts, and what it is by chance. Specialisation is context-independent where the token id "
        "says far more than position or domain.",
        table(["layer", *map(escape, names)], rows),
    )


def _drops(layers: Mapping[str, Any]) -> str:
    series = [
        Series(layer, list(enumerate(figures["drops"])), f"--c{i % 8}")
        for i, (layer, figures) in enumerate(layers.items())
        if "drops" in figures
    ]
    if not series:
        return ""
    highest = max(share for s in series for _, share in s.points)
    return section(
        "Drop towards the end",
        "The share of the choices that found no place, by the position of the token in its sequence. Where places go "
        "by order, the end of a sequence loses most.",
        columns(figure("Dropped share", line_chart(series, "position", "dropped share", (0.0, highest)))),
    )


def _early(agreement: Mapping[str, Any]) -> str:
    series = [
        Series(layer, [(step, overlap) for step, overlap in points], f"--c{i % 8}")
        for i, (layer, points) in enumerate(agreement.items())
        if len(points) > 1
    ]
    if not series:
        return ""
    chart = line_chart(series, "steps", "share of the same choices", (0.0, 1.0))
    return section(
        "Early routing learning",
        "The share of the choices that are already those of the last checkpoint, on the same tokens. A curve that is "
        "high early says that routing was learnt before the experts were.",
        columns(figure("Agreement with the last checkpoint", chart)),
    )


def _relations(layers: Mapping[str, Any]) -> str:
    cards = []
    for layer, figures in layers.items():
        for name, share, caption in (
            ("co_activation", "tokens of the row's expert", "of an expert's tokens, those that meet another too"),
            ("similarity", "likeness of weights that are the same", "cosine of two experts' weights"),
        ):
            if name in figures and len(figures[name]) > 1:
                cards.append(figure(f"{escape(layer)}: {caption}", _pairs(figures[name], share)))
    if not cards:
        return ""
    return section(
        "How experts relate",
        "Which experts work on the same tokens, and which have alike weights; an expert with itself is left blank. "
        "Full strength of colour is the largest value of a figure. Cosines are near 0 for experts drawn apart, and 1 "
        "right after upcycling.",
        columns(*cards),
    )


def _pairs(values: list[list[float]], share: str) -> str:
    """A square of experts, without what each has in common with itself."""
    rows = [[math.nan if i == j else value for j, value in enumerate(row)] for i, row in enumerate(values)]
    highest = max(value for row in rows for value in row if not math.isnan(value))
    names = [str(e) for e in range(len(values))]
    return heat_map(rows, names, names, max(highest, 1e-3) / 2, share, "expert")
