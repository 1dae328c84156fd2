"""Sections about what the experts of a trained model do, from what `zoo.analysis.analyse` found."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from .chart import Series, heat_map, line_chart
from .page import columns, figure, page, section, table

FILE = "analysis.json"
CURVES = 8  # of one chart: the page has as many colours
CELLS = 40_000  # of all heat maps together, where there are several layers to choose from
MOST_CELLS = 150_000  # of one layer's: a browser must still open the page
PAIRS = {  # of a square of experts: its caption, and what a value is a share of
    "co_activation": ("share of the row's tokens that meet the other expert too", "tokens of the row's expert"),
    "similarity": ("cosine of two experts' weights", "cosine of equal weights"),
}


def build_analysis(source: Mapping[str, Any] | str | Path, title: str = "What the experts do") -> str:
    """A whole page from a document, or from a folder with one in analysis.json, as `zoo demo` leaves it.

    Raises ValueError for a folder without one, and for a document that is about no layer.
    """
    if not isinstance(source, Mapping):
        path = Path(source) / FILE
        try:
            source = json.loads(path.read_text(encoding="utf-8"))
        except OSError:
            raise ValueError(f"{path.parent} holds no analysis: there is no {path}") from None
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
    assert isinstance(source, Mapping)
    if not source.get("layers"):
        raise ValueError("the analysis is about no layer")
    return page(title, [f"<h1>{escape(title)}</h1>", *sections(source)])


def sections(document: Mapping[str, Any] | None) -> list[str]:
    """HTML of every section that the document has data for.

    It has what `zoo.analysis.analyse` gives: "layers", and may have "agreement" {layer: [[number, overlap], ...]}, over
    steps where "agreement_over" does not say otherwise.
    """
    if not document:
        return []
    layers = document["layers"]
    early = _early(document.get("agreement") or {}, document.get("agreement_over", "step"))
    found = [_specialisation(layers), _drops(layers), early, _relations(layers)]
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
    curves = {
        layer: [(float(place), share) for place, share in enumerate(figures["drops"])]
        for layer, figures in layers.items()
        if "drops" in figures
    }
    if not curves:
        return ""
    highest = max(share for points in curves.values() for _, share in points)
    chart = line_chart(_series(curves), "position", "dropped share", (0.0, highest))
    return section(
        "Drop towards the end",
        "The share of the choices that found no place, by the position of the token in its sequence. Where places go "
        f"by order, the end of a sequence loses most.{_of_all(curves, CURVES)}",
        columns(figure("Dropped share", chart)),
    )


def _early(agreement: Mapping[str, Any], over: str) -> str:
    curves = {layer: [(at, overlap) for at, overlap in points] for layer, points in agreement.items()}
    curves = {layer: points for layer, points in curves.items() if len(points) > 1}
    if not curves:
        return ""
    chart = line_chart(_series(curves), over, "share of the same choices", (0.0, 1.0))
    return section(
        "Early routing learning",
        "The share of the choices that are already those of the last checkpoint, on the same tokens. A curve that is "
        f"high early says that routing was learnt before the experts were.{_of_all(curves, CURVES)}",
        columns(figure("Agreement with the last checkpoint", chart)),
    )


def _relations(layers: Mapping[str, Any]) -> str:
    squares = {
        layer: {name: figures[name] for name in PAIRS if len(figures.get(name, ())) > 1}
        for layer, figures in layers.items()
    }
    squares = {layer: found for layer, found in squares.items() if found}
    if not squares:
        return ""
    cells = max(sum(len(square) ** 2 for square in found.values()) for found in squares.values())
    if cells > MOST_CELLS:
        return ""
    shown = min(CURVES, max(1, CELLS // cells))
    cards = []
    for layer in _spread(list(squares), shown):
        for name, square in squares[layer].items():
            caption, share = PAIRS[name]
            highest = max(value for i, row in enumerate(square) for j, value in enumerate(row) if i != j)
            heat = _heat(square, highest, share)
            cards.append(figure(f"{layer}: {caption}, at most {highest:.3f}", heat))
    return section(
        "How experts relate",
        "Which experts work on the same tokens, and which have alike weights; an expert with itself is left blank. "
        "Full strength of colour is the largest value of a figure. Cosines are near 0 for experts drawn apart, and 1 "
        f"right after upcycling.{_of_all(squares, shown)}",
        columns(*cards),
    )


def _heat(square: list[list[float]], highest: float, share: str) -> str:
    """A square of experts, without what each has in common with itself."""
    rows = [[math.nan if i == j else value for j, value in enumerate(row)] for i, row in enumerate(square)]
    names = [str(e) for e in range(len(square))]
    return heat_map(rows, names, names, max(highest, 1e-3) / 2, share, "expert")


def _series(curves: Mapping[str, list[tuple[float, float]]]) -> list[Series]:
    """As many curves as there are colours."""
    return [Series(layer, curves[layer], f"--c{i}") for i, layer in enumerate(_spread(list(curves), CURVES))]


def _spread(names: list[str], most: int) -> list[str]:
    """At most so many of the names, evenly from the first to the last."""
    if len(names) <= most:
        return names
    return [names[round(i * (len(names) - 1) / max(most - 1, 1))] for i in range(most)]


def _of_all(layers: Mapping[str, Any], shown: int) -> str:
    return f" Shown are {shown} of {len(layers)} layers, spread over the depth." if len(layers) > shown else ""
