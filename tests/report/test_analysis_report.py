"""The sections about a model's experts show what the document holds, and nothing that it does not."""

import json
import re

import pytest

from zoo.report.analysis import build_analysis, sections

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
    "agreement_over": "checkpoint",
    "agreement": {"layer <1>": [(10, 0.25), (20, 0.8), (30, 1.0)]},
}


def test_every_part_is_shown():
    html = build_analysis(WHOLE, "Experts")
    assert html.count("<h2>") == 4
    assert "layer &lt;1&gt;" in html
    assert "layer <1>" not in html
    assert "75.0%" in html
    assert "0.300, chance 0.020" in html
    assert "too few" in html  # of positions
    assert "expert 0, expert 1: 60.0% of the tokens" in html
    assert "expert 1, expert 0: 50.0% of the tokens" in html
    assert "expert 0, expert 0" not in html
    assert "expert 1, expert 0: 20.0% of the cosine of equal weights" in html
    assert "layer &lt;1&gt;: cosine of two experts&#x27; weights, at most 0.200" in html
    assert 'aria-label="share of the same choices over checkpoint"' in html
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


def test_a_folder_with_a_document_gives_the_same_page(tmp_path):
    (tmp_path / "analysis.json").write_text(json.dumps(WHOLE))
    assert build_analysis(tmp_path, "Experts") == build_analysis(WHOLE, "Experts")
    assert build_analysis(str(tmp_path), "A & B").count("A &amp; B") == 2  # as title and as heading


def test_what_is_no_analysis_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no analysis"):
        build_analysis(tmp_path)
    (tmp_path / "analysis.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        build_analysis(tmp_path)
    with pytest.raises(ValueError, match="about no layer"):
        build_analysis({"layers": {}})


def test_of_a_deep_model_layers_are_picked_from_the_first_to_the_last():
    def deep(layers, experts):
        square = [[0.5] * experts] * experts
        each = {"keys": KEYS, "drops": [0.0, 0.5], "similarity": square}
        return {
            "layers": {f"layer {n}": each for n in range(layers)},
            "agreement": {f"layer {n}": [(1, 0.5), (2, 1.0)] for n in range(layers)},
        }

    html = build_analysis(deep(48, 4))
    assert [f"<td>layer {n}</td>" in html for n in range(48)] == [True] * 48
    drawn = [int(n) for n in re.findall(r"layer (\d+): cosine", html)]
    assert len(drawn) == 8
    assert (drawn[0], drawn[-1]) == (0, 47)
    assert drawn == sorted(set(drawn))
    assert html.count("Shown are 8 of 48 layers") == 3
    assert html.count("<polyline") == 16
    wide = build_analysis(deep(48, 128))
    assert len(re.findall(r"layer (\d+): cosine", wide)) == 2
    assert "Shown are 2 of 48 layers" in wide
    assert len(wide) < 12e6
    assert "Shown are" not in build_analysis(deep(8, 4))


@pytest.mark.parametrize("experts", [8, 300])
def test_squares_of_more_experts_than_a_page_can_hold_are_left_out(experts):
    square = [[0.5] * experts] * experts
    found = {"keys": KEYS, "similarity": square, "co_activation": square}
    html = build_analysis({"layers": {"a": found}})
    assert ("How experts relate" in html) == (experts == 8)
    assert len(html) < 1_000_000


def test_the_demos_report_shows_it_after_the_experts(run_folder):
    from zoo.report import build

    before = build(run_folder).read_text()
    assert "What decides the expert" not in before
    (run_folder / "language" / "moe" / "analysis.json").write_text(json.dumps(WHOLE))
    headings = re.findall("<h2>(.*?)</h2>", build(run_folder).read_text())
    at = headings.index("What each expert specialises in")
    assert headings[at + 1 : at + 5] == [
        "What decides the expert",
        "Drop towards the end",
        "Early routing learning",
        "How experts relate",
    ]
