"""The page around a report's sections: everything inline, nothing loaded from anywhere."""

from __future__ import annotations

from html import escape

STYLE = """
:root { color-scheme: light dark;
  --back: #fbfaf8; --card: #ffffff; --ink: #1d1f24; --soft: #666b76; --line: #e4e2dd;
  --moe: #2f6fde; --dense: #c8711c; --chip: #eef2fb; --good: #1b7f4b; --bad: #b3392f;
  --c0: #2f6fde; --c1: #c8711c; --c2: #1b8a5a; --c3: #a2449b;
  --c4: #8a7a12; --c5: #4a90a4; --c6: #b3392f; --c7: #6d5bd0; }
@media (prefers-color-scheme: dark) { :root {
  --back: #14161a; --card: #1c1f25; --ink: #e8e6e1; --soft: #9aa0ac; --line: #31353d;
  --moe: #78a6ff; --dense: #f0a557; --chip: #283042; --good: #5fcf93; --bad: #ff8a7d;
  --c0: #78a6ff; --c1: #f0a557; --c2: #5fcf93; --c3: #dd8ad6;
  --c4: #d6c55a; --c5: #7fc6da; --c6: #ff8a7d; --c7: #a99bff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 28px 18px 60px; }
h1 { font-size: 27px; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 19px; margin: 38px 0 6px; }
h3 { font-size: 14px; margin: 0 0 6px; font-weight: 600; }
p { margin: 6px 0 12px; max-width: 76ch; }
.soft, figcaption, .legend, footer { color: var(--soft); font-size: 13px; }
.note { border-left: 3px solid var(--dense); padding: 2px 0 2px 12px; }
.grid2 { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 360px), 1fr)); gap: 14px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 220px), 1fr)); gap: 14px;
  margin: 18px 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; min-width: 0; }
.tile b { display: block; font-size: 30px; line-height: 1.15; font-variant-numeric: tabular-nums; }
.tile small { color: var(--soft); font-size: 13px; }
.moe { color: var(--moe); } .dense { color: var(--dense); } .good { color: var(--good); } .bad { color: var(--bad); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 6px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; padding-left: 0; }
@media (max-width: 520px) { th, td { padding: 5px 6px; white-space: normal; } }
th { font-weight: 600; font-size: 13px; color: var(--soft); }
figure { margin: 0; } svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 11.5px; } svg text.name { font-size: 12px; }
.grid { stroke: var(--line); } .axis { stroke: var(--soft); }
.curve { fill: none; stroke-width: 2.2; stroke-linejoin: round; }
.faint { fill: none; stroke-width: 1; opacity: .35; }
.cell { fill: var(--moe); shape-rendering: crispEdges; }
.legend span { margin-right: 14px; white-space: nowrap; } .legend i { display: inline-block; width: 10px; height: 10px;
  border-radius: 3px; margin-right: 5px; vertical-align: -1px; }
.experts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 225px), 1fr)); gap: 10px; }
.experts .card { padding: 10px 12px; }
.bar { height: 4px; border-radius: 2px; background: var(--line); margin: 2px 0 8px; }
.bar i { display: block; height: 4px; border-radius: 2px; background: var(--moe); }
.chip { display: inline-block; background: var(--chip); border-radius: 5px; padding: 0 6px; margin: 0 4px 4px 0;
  font: 12.5px/1.7 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre; max-width: 100%;
  overflow: hidden; text-overflow: ellipsis; vertical-align: top; }
.chip small { color: var(--soft); margin-left: 5px; font-size: 10.5px; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; overflow-x: auto;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
pre b { color: var(--moe); font-weight: 600; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .92em; }
footer { margin-top: 44px; border-top: 1px solid var(--line); padding-top: 12px; }
"""


def page(title: str, sections: list[str]) -> str:
    """A whole HTML document."""
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
    )
    body = "\n".join(section for section in sections if section)
    return f"{head}\n<body><main>\n{body}\n</main></body></html>\n"


def section(heading: str, text: str, *parts: str) -> str:
    """A headed section, or nothing when all its parts are empty; `text` and parts are HTML."""
    if not any(parts):
        return ""
    return f"<section><h2>{escape(heading)}</h2><p>{text}</p>{''.join(parts)}</section>"


def figure(caption: str, picture: str) -> str:
    """A picture on a card with a heading, or nothing without a picture."""
    return f'<figure class="card"><h3>{escape(caption)}</h3>{picture}</figure>' if picture else ""


def columns(*cards: str) -> str:
    """Cards side by side where there is room."""
    present = [card for card in cards if card]
    return f'<div class="grid2">{"".join(present)}</div>' if present else ""


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table of HTML cells."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
