"""Line charts and heat maps as inline SVG; colours are CSS variables of the page, so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from zlib import crc32

WIDTH, HEIGHT = 460, 290
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 40


@dataclass(frozen=True)
class Series:
    """A curve: label, points (x, y), the CSS colour; `faint` draws a thin one without markers or legend."""

    label: str
    points: Sequence[tuple[float, float]]
    color: str
    faint: bool = False


@dataclass(frozen=True)
class _Scale:
    """From values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low or 1.0)
        return self.start + share * (self.end - self.start)


def line_chart(series: Sequence[Series], x_label: str, y_label: str, y_range: tuple[float, float] | None = None) -> str:
    """Curves over common axes; what lies outside y_range is cut off. Without points, an empty string.

    Points that are not finite, as a loss that went astray, are left out.
    """
    finite = [replace(s, points=[p for p in s.points if all(map(math.isfinite, p))]) for s in series]
    drawn = [s for s in finite if s.points]
    if not drawn:
        return ""
    xs = [x for s in drawn for x, _ in s.points]
    ys = [y for s in drawn for _, y in s.points]
    low, high = y_range if y_range and all(map(math.isfinite, y_range)) else (min(ys), max(ys))
    margin = 0.06 * ((high - low) or abs(high) or 1.0)
    x = _Scale(min(0.0, min(xs)), max(xs) or 1.0, LEFT, WIDTH - RIGHT)
    y = _Scale(low - margin, high + margin, HEIGHT - BOTTOM, TOP)
    name = f"clip{crc32(repr((xs, ys, x_label)).encode())}"  # ids are shared by all charts of a page
    parts = [_axes(x, y, x_label, y_label)]
    parts.append(f'<clipPath id="{name}"><rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT}" ')
    parts.append(f'height="{HEIGHT - TOP - BOTTOM}"/></clipPath><g clip-path="url(#{name})">')
    parts += [_curve(s, x, y) for s in drawn]
    parts.append("</g>")
    return _svg(WIDTH, HEIGHT, "".join(parts), f"{y_label} over {x_label}") + _legend(drawn)


def _curve(series: Series, x: _Scale, y: _Scale) -> str:
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in series.points)
    kind = "faint" if series.faint else "curve"
    line = f'<polyline class="{kind}" style="stroke:var({series.color})" points="{path}"/>'
    if series.faint or len(series.points) > 40:
        return line
    dots = [
        f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3.2" style="fill:var({series.color})">'
        f"<title>{escape(series.label)}: {b:.4g} at {a:.4g}</title></circle>"
        for a, b in series.points
    ]
    return line + "".join(dots)


def _axes(x: _Scale, y: _Scale, x_label: str, y_label: str, bare: bool = False) -> str:
    """Lines and numbers; a `bare` horizontal axis has no numbers."""
    parts = []
    for value in ticks(y.low, y.high):
        at = y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in [] if bare else ticks(x.low, x.high):
        parts.append(f'<text x="{x(value):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{value:g}</text>')
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="name" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    across = (TOP + base) / 2
    parts.append(
        f'<text class="name" transform="translate(11 {across}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    return "".join(parts)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between low and high, about `count` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough)
    first = math.ceil(low / step)
    return [float(f"{i * step:.10g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _legend(series: Sequence[Series]) -> str:
    items = [f'<span><i style="background:var({s.color})"></i>{escape(s.label)}</span>' for s in series if not s.faint]
    return f'<div class="legend">{"".join(items)}</div>' if len(items) > 1 else ""


def heat_map(
    rows: Sequence[Sequence[float]],
    labels: Sequence[str],
    columns: Sequence[str],
    even: float,
    share: str = "tokens",
    column: str = "step",
) -> str:
    """Shares rows x columns as cells: one at `even` is half as strong in colour as one at twice of it or more.

    `share` says of what: the tokens, for loads of experts. `column` says what a column is: a step of training, where
    shares are watched over time. A share that is not a number leaves its cell blank.
    """
    if not rows or not rows[0]:
        return ""
    cell = 15
    height = TOP + cell * len(rows) + 26
    wide = (WIDTH - LEFT - RIGHT) / len(columns)
    parts = []
    for i, (row, label) in enumerate(zip(rows, labels)):
        top = TOP + i * cell
        parts.append(f'<text x="{LEFT - 7}" y="{top + 11}" text-anchor="end">{escape(label)}</text>')
        for j, value in enumerate(row):
            if math.isnan(value):
                continue
            strength = min(max(value, 0.0) / (2 * even), 1.0)
            parts.append(
                f'<rect class="cell" x="{LEFT + j * wide:.2f}" y="{top}" width="{wide:.2f}" height="{cell - 1}" '
                f'fill-opacity="{strength:.3f}"><title>expert {escape(label)}, {column} {escape(columns[j])}: '
                f"{100 * value:.1f}% of the {share}</title></rect>"
            )
    for j in sorted({0, len(columns) // 2, len(columns) - 1}):
        anchor = "start" if j == 0 else "end" if j == len(columns) - 1 else "middle"
        at = LEFT + (j + (0 if j == 0 else 1 if j == len(columns) - 1 else 0.5)) * wide
        name = f"{column} {escape(columns[j])}"
        parts.append(f'<text x="{at:.1f}" y="{height - 10}" text-anchor="{anchor}">{name}</text>')
    return _svg(WIDTH, height, "".join(parts), f"share of the {share} by expert and {column}")


def bar_chart(groups: Mapping[str, Sequence[float]], colors: Sequence[str], x_label: str, y_label: str) -> str:
    """Bars side by side: one of each group in each place, groups apart by CSS colour. Without values, empty."""
    places = max((len(values) for values in groups.values()), default=0)
    if not places:
        return ""
    highest = max(max(values, default=0.0) for values in groups.values()) or 1.0
    x, y = _Scale(0, places, LEFT, WIDTH - RIGHT), _Scale(0, 1.06 * highest, HEIGHT - BOTTOM, TOP)
    parts = [_axes(_Scale(0, places, LEFT, WIDTH - RIGHT), y, "", y_label, bare=True)]
    wide = 0.8 * (x(1) - x(0)) / len(groups)
    for number, (label, values) in enumerate(groups.items()):
        for place, value in enumerate(values):
            left = x(place) + 0.1 * (x(1) - x(0)) + number * wide
            parts.append(
                f'<rect x="{left:.2f}" y="{y(value):.2f}" width="{wide:.2f}" height="{y(0) - y(value):.2f}" '
                f'style="fill:var({colors[number]})"><title>{escape(label)}, {x_label} {place}: '
                f"{100 * value:.1f}%</title></rect>"
            )
    for place in range(0, places, -(-places // 16)):
        parts.append(f'<text x="{x(place + 0.5):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{place}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="name" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    legend = [Series(label, (), color) for label, color in zip(groups, colors)]
    return _svg(WIDTH, HEIGHT, "".join(parts), f"{y_label} by {x_label}") + _legend(legend)


def _svg(width: int, height: int, body: str, title: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{body}</svg>'
