"""The sections about a model's experts show what the document holds, and nothing that it does not."""

import re

from zoo.report.analysis import analysis_page, sections

KEYS = {
    "token id": {"explained": 0.75, "std": 0.3, "chance": 0.02, "values": 40},
    "position": {"explained": 0.01, "values": 0},
}
WHOLE = {
    "layers": {
        "layer <1>": {
            "keys": KEYS,
            "drops": [0.0, 0.1, 0.4],
            "similarity": [[1.0, 0.2], [0.2, 1.0]],
            "co_activation": [[1.0, 0.6], [0.5, 1.0]],
        }
    },
    "agreement": {"layer <1>": [(10, 0.25), (20, 0.8), (30, 1.0)]},
}


def test_every_part_is_shown():
    html = analysis_page(WHOLE, "Experts")
    assert html.count("<h2>") == 4
    assert "layer &lt;1&gt;" in html
    assert "layer <1>" not in html
    assert "75.0%" in html
    assert "0.300, chance 0.020" in html
    assert "too few" in html  # of positions
    assert "expert 0, expert 1: 60.0% of the tokens" in html
    assert "expert 1, expert 0: 50.0% of the tokens" in html
    assert "expert 0, expert 0" not in html
    for figure in ("0.4 at 2", "0.25 at 10", "1 at 30"):
        assert f": {figure}</title>" in html


def test_the_largest_value_has_the_full_colour():
    html = "".join(sections(WHOLE))
    cells = re.findall(r'fill-opacity="([\d.]+)"><title>expert (\d), expert (\d): [\d.]+% of the tokens', html)
    assert {(i, j): float(strength) for strength, i, j in cells} == {("0", "1"): 1.0, ("1", "0"): 0.833}


def test_parts_without_data_are_left_out():
    assert sections(None) == []
    bare = {"layers": {"a": {"keys": KEYS}}, "agreement": {"a": [(10, 1.0)]}}
    [only] = sections(bare)
    assert "What decides the expert" in only
