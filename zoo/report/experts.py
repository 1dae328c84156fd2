"""How experts were used: load over time, the gates' certainty, and the tokens each expert stands out for."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from .chart import Series, heat_map, line_chart
from .page import columns, figure, section
from .run import Row, Run

MAX_COLUMNS = 60  # of a heat map


def sections(run: Run) -> list[str]:
    """HTML of the sections about experts; empty ones where the run left nothing."""
    rows = run.table("language", "moe", "experts.csv")
    layers = {layer: [r for r in rows if r["layer"] == layer] for layer in sorted({r["layer"] for r in rows})}
    return [_load(layers), _gates(layers), _specialisation(run.document("language", "moe", "specialisation.json"))]


def _load(layers: dict[float, list[Row]]) -> str:
    maps = [figure(f"Layer {layer:.0f}", _heat(rows)) for layer, rows in layers.items()]
    return section(
        "Expert load over time",
        "Share of the training tokens that each expert got. Half strength of colour is an even share; an expert that "
        "nobody asks for is blank.",
        columns(*maps),
    )


def _heat(rows: list[Row]) -> str:
    names = [name for name in rows[0] if name.startswith("load_")]
    size = -(-len(rows) // MAX_COLUMNS)
    chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
    loads = [[sum(row[name] for row in chunk) / len(chunk) for chunk in chunks] for name in names]
    steps = [f"{chunk[-1]['step']:.0f}" for chunk in chunks]
    return heat_map(loads, [name.removeprefix("load_") for name in names], steps, 1 / len(names))


def _gates(layers: dict[float, list[Row]]) -> str:
    charts = []
    experts = next((sum(name.startswith("load_") for name in rows[0]) for rows in layers.values()), 1)
    for key, label, caption in (
        ("entropy", "nats", f"Entropy of a token's choice ({math.log(experts):.2f} is undecided)"),
        ("max_violation", "busiest load / mean - 1", "Imbalance (0 is even)"),
    ):
        series = [
            Series(f"layer {layer:.0f}", [(row["step"], row[key]) for row in rows], f"--c{i % 8}")
            for i, (layer, rows) in enumerate(layers.items())
        ]
        highest = max((y for s in series for _, y in s.points), default=1.0)
        charts.append(figure(caption, line_chart(series, "steps", label, (0.0, highest))))
    return section("Gates", "How certain the gates are, and how evenly they use the experts.", columns(*charts))


def _specialisation(layers: list[dict[str, Any]] | None) -> str:
    parts = []
    for layer in layers or []:
        cards = [_card(e, len(layer["load"]), expert, layer["load"][e]) for e, expert in enumerate(layer["experts"])]
        decided = (
            f"the token decides {100 * layer['decided_by_token']:.0f}% of the choice, "
            f"its position {100 * layer['decided_by_position']:.0f}%"
        )
        parts.append(f"<h3>Layer {layer['layer']} <span class='soft'>- {decided}</span></h3>")
        parts.append(f'<div class="experts">{"".join(cards)}</div><p></p>')
    return section(
        "What each expert specialises in",
        "Tokens of unseen text that set an expert apart from the others, with the share of that token's choices that "
        "goes to this expert; · is a space and ⏎ a line end. The bar is the expert's load; half of it is an even "
        "share. How far token and position decide is the uncertainty about the expert that they remove (mutual "
        "information over entropy), the question of OpenMoE (2402.01739).",
        *parts,
    )


def _card(number: int, experts: int, tokens: list[dict[str, Any]], load: float) -> str:
    chips = "".join(
        f'<span class="chip">{escape(visible(t["token"]))}<small>{100 * t["share"]:.0f}%</small></span>' for t in tokens
    )
    width = min(100.0, 50 * load * experts)
    return (
        f'<div class="card"><h3>Expert {number} <span class="soft">{100 * load:.0f}%</span></h3>'
        f'<div class="bar"><i style="width:{width:.1f}%"></i></div>{chips or "<span class=soft>none</span>"}</div>'
    )


def visible(token: str) -> str:
    """A token with its spaces and line ends to be seen; a long run of one is counted."""
    out, i = [], 0
    while i < len(token):
        end = i
        while end < len(token) and token[end] == token[i]:
            end += 1
        mark = {" ": "·", "\n": "⏎", "\t": "⇥"}.get(token[i], token[i])
        out.append(f"{mark}{end - i}" if end - i > 4 and mark != token[i] else mark * (end - i))
        i = end
    return "".join(out)
