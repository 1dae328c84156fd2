"""The language part of a demo's report."""

from __future__ import annotations

from html import escape
from typing import Any

from . import analysis, experts
from .chart import Series, line_chart
from .comparison import Point, equal_steps, equal_time, speed
from .page import columns, figure, section, table
from .run import Row, Run, smooth

HOW = (
    "Both models are trained side by side, each in a process and on cores of its own, on the same batches in the same "
    "order, each with a clock that counts training alone; the learning rate stays constant after warm-up and a running "
    "average of the weights is evaluated, so that no moment of either run is favoured by its schedule."
)


def sections(run: Run) -> list[str]:
    """HTML of every section that the run left data for."""
    about = run.document("language", "about.json") or {"models": {}}
    curves = {name: run.table("language", name, "val.csv") for name in ("moe", "dense")}
    trains = {name: run.table("language", name, "train.csv") for name in ("moe", "dense")}
    return [
        _head(run, about),
        _tiles(curves, trains),
        section("Result", HOW, _table(curves, trains, about) if curves["moe"] else ""),
        _loss(curves, trains),
        *experts.sections(run),
        *analysis.sections(run.document("language", "moe", "analysis.json")),
        _samples(run.document("language", "moe", "samples.json") or []),
        _foot(run, about),
    ]


def summary(run: Run) -> str:
    """The result in plain text."""
    curves = {name: run.table("language", name, "val.csv") for name in ("moe", "dense")}
    trains = {name: run.table("language", name, "train.csv") for name in ("moe", "dense")}
    steps, time = equal_steps(curves["moe"], curves["dense"]), equal_time(curves["moe"], curves["dense"])
    lines = [f"{'bits per byte of unseen text':<30}{'MoE':>10}{'dense':>10}{'MoE gains':>12}"]
    for what, point in (("at equal steps", steps), ("at equal training time", time)):
        if point:
            unit = f" ({point.place:.0f})" if point is steps else f" ({point.place:.0f} s)"
            told = "-" if point.astray else f"{100 * point.gain:.1f}%"
            lines.append(f"{what + unit:<30}{point.moe:>10.3f}{point.dense:>10.3f}{told:>12}")
    if time is None:
        return "stopped before both models were evaluated: nothing to compare yet"
    rates = [speed(trains[name]) for name in ("moe", "dense")]
    if all(rates):
        gain = 100 * (rates[0] / rates[1] - 1)
        lines.append(f"{'training speed, tokens/s':<30}{rates[0]:>10,.0f}{rates[1]:>10,.0f}{gain:>11.1f}%")
    if time.astray:
        lines.append(f"nothing to compare: the loss of {time.astray} is not finite")
    elif time.gain <= 0:
        lines.append("the mixture of experts did not win at equal training time in this run")
    samples = run.document("language", "moe", "samples.json") or []
    lines += [f"\n--- text by the mixture of experts ---\n{sample['text'].rstrip()}" for sample in samples[:1]]
    return "\n".join(lines)


def _head(run: Run, about: dict[str, Any]) -> str:
    facts = run.facts
    machine = f"{facts.get('processor', 'unknown processor')}, {facts.get('cores', '?')} cores"
    text = f'<p class="soft">{escape(str(facts.get("started", "")))} · {escape(machine)}</p>'
    if facts.get("status") != "finished":
        text += '<p class="note">This run was stopped before its end: the report shows what there is.</p>'
    return f"<h1>A mixture of experts against its dense twin</h1>{text}"


def _tiles(curves: dict[str, list[Row]], trains: dict[str, list[Row]]) -> str:
    steps, time = equal_steps(curves["moe"], curves["dense"]), equal_time(curves["moe"], curves["dense"])
    tiles = []
    if time:
        tiles.append(_gain(time, f"at equal training time ({time.place:.0f} s each)"))
    if steps:
        tiles.append(_gain(steps, f"at equal steps ({steps.place:.0f} each)"))
    if trains["moe"] and trains["dense"]:
        share = speed(trains["moe"]) / speed(trains["dense"])
        tiles.append(_tile(f"{100 * share:.0f}%", "of the dense twin's training speed in tokens per second"))
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _gain(point: Point, where: str) -> str:
    if point.astray:
        return _tile('<span class="bad">diverged</span>', f"the loss of {point.astray} is not finite {where}")
    kind, word = ("good", "fewer") if point.gain > 0 else ("bad", "more")
    return _tile(f'<span class="{kind}">{100 * abs(point.gain):.1f}%</span>', f"{word} bits per byte {where}")


def _tile(value: str, text: str) -> str:
    return f'<div class="card tile"><b>{value}</b><small>{escape(text)}</small></div>'


def _table(curves: dict[str, list[Row]], trains: dict[str, list[Row]], about: dict[str, Any]) -> str:
    steps, time = equal_steps(curves["moe"], curves["dense"]), equal_time(curves["moe"], curves["dense"])
    rows = []
    if steps:
        rows.append(_compared(f"bits per byte at equal steps ({steps.place:.0f})", steps))
    if time:
        rows.append(_compared(f"bits per byte at equal training time ({time.place:.0f} s)", time))
    models = about["models"]
    for key, what in (("active", "active parameters a token"), ("total", "parameters")):
        if "moe" in models and "dense" in models:
            rows.append([what, *(f"{models[name][key] / 1e6:.2f} M" for name in ("moe", "dense")), ""])
    if trains["moe"] and trains["dense"]:
        for what, figure_of in (
            ("steps", lambda t: f"{t[-1]['step']:,.0f}"),
            ("tokens seen", lambda t: f"{t[-1]['tokens'] / 1e6:.2f} M"),
            ("training tokens per second", lambda t: f"{speed(t):,.0f}"),
        ):
            rows.append([what, figure_of(trains["moe"]), figure_of(trains["dense"]), ""])
    return table(["", "mixture of experts", "dense twin", "difference"], rows)


def _compared(what: str, point: Point) -> list[str]:
    kind = "good" if point.gain > 0 else "bad"
    change = "" if point.astray else f'<span class="{kind}">{-100 * point.gain:+.1f}%</span>'
    return [f"<b>{escape(what)}</b>", f"<b>{point.moe:.3f}</b>", f"<b>{point.dense:.3f}</b>", change]


def _loss(curves: dict[str, list[Row]], trains: dict[str, list[Row]]) -> str:
    """Loss over time and over steps, and training speed is what makes the two differ."""
    values = [row["bits_per_byte"] for rows in curves.values() for row in rows]
    window = (min(values), max(values)) if len(values) > 2 and max(values) > min(values) else None
    charts = []
    for x, label, caption in (
        ("seconds", "seconds of training", "At equal training time"),
        ("step", "steps", "At equal steps"),
    ):
        series = []
        for name, text in (("moe", "mixture of experts"), ("dense", "dense twin")):
            thin = [(row[x], row["bits_per_byte"]) for row in smooth(trains[name], "bits_per_byte")]
            series.append(Series(text + ", training", thin, f"--{name}", faint=True))
            series.append(Series(text, [(row[x], row["bits_per_byte"]) for row in curves[name]], f"--{name}"))
        charts.append(figure(caption, line_chart(series, label, "bits per byte", window)))
    return section(
        "Loss",
        "Bits per byte of unseen text, of the averaged weights (points), and of the training batches, of the weights "
        "as they were (thin lines). Lower is better.",
        columns(*charts),
    )


def _samples(samples: list[dict[str, str]]) -> str:
    blocks = []
    for sample in samples:
        prompt, text = sample["prompt"], sample["text"]
        rest = text.removeprefix(prompt)
        blocks.append(f"<pre><b>{escape(prompt)}</b>{escape(rest)}</pre>")
    return section("Text by the mixture of experts", "Sampled; the prompt is in colour.", *blocks)


def _foot(run: Run, about: dict[str, Any]) -> str:
    facts = run.facts
    versions = " · ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())
    wall = f" · {facts['wall_seconds']:.0f} s in all" if "wall_seconds" in facts else ""
    corpus = "; ".join(str(about[key]) for key in ("corpus", "tokenizer", "precision") if key in about)
    return (
        f"<footer>{escape(corpus)}<br>Python {escape(str(facts.get('python', '')))} · {escape(versions)}{wall}<br>"
        "Made by <code>zoo demo</code>; <code>zoo report FOLDER</code> makes it again from the data beside it."
        "</footer>"
    )
