import csv
import json

import pytest

from zoo.report import build, summary
from zoo.report.recommendation import gates, sections
from zoo.report.run import Run


@pytest.fixture
def with_recommendation(run_folder):
    """A finished run with this part: MMoE's error at 100 steps is 0.20, the shared bottom's 0.25, and 0.18 at 200."""
    errors = {"moe": {50: 0.4, 100: 0.2}, "dense": {50: 0.5, 100: 0.25, 200: 0.18}}
    rates = {"moe": 10.0, "dense": 20.0}
    for name, points in errors.items():
        own = run_folder / "recommendation" / name
        own.mkdir(parents=True)
        rows = [
            {"step": step, "seconds": step / rates[name], "rows": 256 * step, "mse": e, "mse_a": 2 * e, "mse_b": 0.0}
            for step, e in points.items()
        ]
        with (own / "val.csv").open("w", newline="") as out:
            writer = csv.DictWriter(out, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        (own / "about.json").write_text(json.dumps({"total": 13_056, "table": "rows <of> nobody", "tasks": ["a", "b"]}))
    found = {"steps": [50, 100], "tasks": {"a": [[0.5, 0.5], [0.9, 0.1]], "b": [[0.5, 0.5], [0.25, 0.75]]}}
    (run_folder / "recommendation" / "moe" / "gates.json").write_text(json.dumps(found))
    return run_folder


def test_both_models_are_compared_at_equal_steps_and_at_equal_time(with_recommendation):
    lines = [line.split() for line in summary(with_recommendation).splitlines()]
    assert ["at", "equal", "steps", "(100)", "0.2000", "0.2500"] in lines
    assert ["at", "equal", "training", "time", "(10", "s)", "0.2000", "0.1800"] in lines
    page = build(with_recommendation).read_text()
    assert "squared error, a at equal steps (100)" in page
    assert '<b class="good">0.2000</b>' in page
    assert '<b class="bad">0.2000</b>' in page
    assert "rows &lt;of&gt; nobody" in page


def test_the_gate_of_every_task_is_drawn_with_the_weight_of_every_expert(with_recommendation):
    drawn = "".join(sections(Run(with_recommendation)))
    assert "Gate of a" in drawn
    assert "Gate of b" in drawn
    assert drawn.count('class="cell"') == 2 * 2 * 2
    assert "expert 0, step 100: 90.0% of the weight" in drawn
    assert "expert 1, step 100: 75.0% of the weight" in drawn


def test_a_run_without_this_part_has_no_section_of_it(run_folder):
    assert sections(Run(run_folder)) == []
    assert gates(None) == ""
