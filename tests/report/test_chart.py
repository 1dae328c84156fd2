import re
import xml.etree.ElementTree as ET

import pytest

from zoo.report.chart import HEIGHT, LEFT, TOP, WIDTH, Series, heat_map, line_chart, ticks


def svg(html):
    return ET.fromstring(re.search(r"<svg.*?</svg>", html, re.S)[0])


def points(html):
    line = next(e for e in svg(html).iter() if e.get("class") == "curve")
    return [tuple(map(float, p.split(","))) for p in line.get("points").split()]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1.72, 2.31), (0, 987), (-3, 4), (1e-6, 3e-6), (0, 80.02)])
def test_ticks_are_round_ordered_and_inside(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 7
    assert found == sorted(found)
    assert low <= found[0]
    assert found[-1] <= high * (1 + 1e-9)
    assert all(len(f"{t:g}") <= 7 for t in found)


def test_curves_are_straight_lines_from_data_to_pixels():
    (x0, y0), (x1, y1), (x2, y2) = points(line_chart([Series("a", [(0, 1), (5, 2), (10, 3)], "--moe")], "x", "y"))
    assert x0 == LEFT
    assert (x1 - x0, y1 - y0) == (pytest.approx(x2 - x1, abs=0.11), pytest.approx(y2 - y1, abs=0.11))
    assert y2 < y0  # more is higher
    assert 0 < x2 <= WIDTH
    assert TOP <= y2 < y0 < HEIGHT


def test_no_data_is_no_chart():
    assert line_chart([Series("a", [], "--moe")], "x", "y") == ""
    assert heat_map([], [], [], 1.0) == ""


def test_one_point_and_equal_values_can_be_drawn():
    assert points(line_chart([Series("a", [(3, 2.0)], "--moe")], "x", "y"))
    assert points(line_chart([Series("a", [(0, 0.0), (0, 0.0)], "--moe")], "x", "y"))


def test_labels_are_text():
    chart = line_chart([Series("<a>", [(0, 1)], "--moe"), Series("b & c", [(1, 2)], "--dense")], "x < y", "&")
    assert "&lt;a&gt;" in chart
    assert svg(chart) is not None


def test_heat_is_half_at_an_even_load_and_full_from_twice_that():
    cells = svg(heat_map([[0.25, 0.5], [0.0, 0.9]], ["0", "1"], ["10", "20"], 0.25)).iter("rect")
    assert [float(c.get("fill-opacity")) for c in cells] == [0.5, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("window", [None, (float("nan"), float("nan")), (1.0, float("inf"))])
def test_points_that_are_not_finite_are_left_out(bad, window):
    kept = [(0, 1.0), (5, 2.0), (10, 3.0)]
    astray = [(0, 1.0), (2, bad), (5, 2.0), (10, 3.0)]
    plain, drawn = (line_chart([Series("a", p, "--moe")], "x", "y", window) for p in (kept, astray))
    assert points(drawn) == points(plain)
    assert not re.search(r"\b(nan|inf)\b", drawn)
    assert line_chart([Series("a", [(1, bad)], "--moe")], "x", "y", window) == ""
