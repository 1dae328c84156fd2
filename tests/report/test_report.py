import re
from html.parser import HTMLParser

import pytest

from zoo.report import build, main, summary
from zoo.report.comparison import Point, equal_steps, equal_time
from zoo.report.experts import visible
from zoo.report.run import at, smooth

VOID = {"meta", "br"}


class Balanced(HTMLParser):
    """Fails unless every element is closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag not in VOID

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(page):
    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return " ".join(parser.text)


def rows(*points, rate=1.0):
    return [{"step": s, "seconds": s / rate, "tokens": s * 10, "bits_per_byte": b} for s, b in points]


def test_equal_steps_takes_the_last_step_that_both_evaluated():
    moe, dense = rows((10, 3.0), (20, 2.0), (25, 1.9)), rows((10, 3.1), (20, 2.5), (30, 2.2))
    assert equal_steps(moe, dense) == Point(20, 2.0, 2.5)
    assert equal_steps(moe, dense).gain == pytest.approx(0.2)
    assert equal_steps(rows((7, 1.0)), rows((8, 1.0))) is None


def test_equal_time_gives_the_faster_model_its_further_steps():
    moe = rows((10, 3.0), (20, 2.0), rate=1)  # 20 s
    dense = rows((20, 3.1), (50, 2.5), rate=2)  # 25 s; at 20 s it has made 40 steps, two thirds of the way
    assert equal_time(moe, dense) == Point(20, 2.0, pytest.approx(2.7))
    assert equal_time(moe, []) is None


def test_values_between_rows_lie_on_a_straight_line():
    table = rows((10, 4.0), (20, 2.0))
    assert [at(table, "step", "bits_per_byte", x) for x in (5, 10, 15, 20, 99)] == [4.0, 4.0, 3.0, 2.0, 2.0]


def test_smoothing_keeps_the_mean_and_shortens():
    table = rows(*((i, float(i % 7)) for i in range(1000)))
    short = smooth(table, "bits_per_byte", points=100)
    assert len(short) == 100
    assert sum(r["bits_per_byte"] for r in short) / 100 == pytest.approx(sum(r["bits_per_byte"] for r in table) / 1000)


def test_a_whole_report_is_one_page_that_loads_nothing(run_folder):
    page = build(run_folder).read_text()
    text = parsed(page)
    for heading in ("Result", "Loss", "Expert load over time", "Gates", "What each expert specialises in"):
        assert heading in text
    assert not re.search(r"""(src|href)\s*=|url\((?!#)|@import|<script|https?://""", page)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)


def test_text_from_the_run_is_not_markup(run_folder):
    page = build(run_folder).read_text()
    assert "<b>&" not in page
    assert "return x &lt; 3 &amp; True" in page
    assert "return x < 3 & True" in parsed(page)


def test_a_report_is_made_from_the_data_alone_and_always_the_same(run_folder):
    first = build(run_folder).read_bytes()
    assert build(run_folder).read_bytes() == first
    path = run_folder / "language" / "dense" / "val.csv"
    path.write_text(path.read_text().rsplit("\n", 2)[0] + "\n")
    assert build(run_folder).read_bytes() != first


def test_the_summary_says_who_won(run_folder):
    assert re.search(r"at equal steps \(400\) +1\.68\d +1\.83\d +8\.\d%", summary(run_folder))
    assert "did not win" not in summary(run_folder)
    language = run_folder / "language"
    (language / "moe").rename(language / "other")
    (language / "dense").rename(language / "moe")
    (language / "other").rename(language / "dense")
    assert "did not win" in summary(run_folder)
    assert "more bits per byte" in build(run_folder).read_text()


@pytest.mark.parametrize(
    "missing",
    [
        ["language/dense/val.csv"],
        ["language/moe/val.csv"],
        ["language/moe/experts.csv", "language/moe/specialisation.json"],
        ["language/about.json", "language/moe/samples.json"],
        ["language/moe/val.csv", "language/dense/val.csv", "language/moe/train.csv", "language/dense/train.csv"],
    ],
)
def test_what_a_run_did_not_leave_is_left_out(run_folder, missing):
    for file in missing:
        (run_folder / file).unlink()
    parsed(build(run_folder).read_text())
    assert summary(run_folder)


def test_a_row_cut_short_is_left_out(run_folder):
    path = run_folder / "language" / "moe" / "train.csv"
    before = build(run_folder).read_bytes()
    path.write_text(path.read_text() + "401,80.")
    assert build(run_folder).read_bytes() == before


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "holds no run of zoo demo" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_spaces_and_line_ends_of_tokens_can_be_seen():
    assert visible(" self") == "·self"
    assert visible("\n        ") == "⏎·8"
    assert visible("____") == "____"


@pytest.mark.parametrize("bad", ["nan", "inf"])
@pytest.mark.parametrize("who", ["*", "moe", "dense"])
def test_a_run_whose_loss_went_astray_has_a_report(run_folder, bad, who):
    for path in run_folder.glob(f"language/{who}/*.csv"):
        head, *lines = path.read_text().splitlines()
        if (at := head.split(",").index("bits_per_byte") if "bits_per_byte" in head else None) is not None:
            cells = [line.split(",") for line in lines]
            told = [",".join([*c[:at], bad, *c[at + 1 :]]) for c in cells[1:]]
            path.write_text("\n".join([head, *lines[:1], *told]) + "\n")
    page = build(run_folder).read_text()
    parsed(page)
    assert not any(re.search(r"\b(nan|inf)\b", picture) for picture in re.findall(r"<svg.*?</svg>", page, re.S))
    assert not re.search(r"\b(nan|inf|-inf)(\.\d)?%", page)
    told = {"moe": "the mixture of experts", "dense": "the dense twin"}
    told["*"] = " and ".join(told.values())
    assert f"the loss of {told[who]} is not finite" in page
    assert f"nothing to compare: the loss of {told[who]} is not finite" in summary(run_folder)
    values = {"*": f"{bad} +{bad}", "moe": rf"{bad} +\d\.\d+", "dense": rf"\d\.\d+ +{bad}"}[who]
    assert re.search(rf"at equal steps \(\d+\) +{values} +-$", summary(run_folder), re.MULTILINE)


@pytest.mark.parametrize("name", ["moe", "dense"])
def test_a_run_without_a_log_of_training_has_a_summary_without_speed(run_folder, name):
    (run_folder / "language" / name / "train.csv").unlink()
    build(run_folder)
    assert "at equal steps" in summary(run_folder)
    assert "speed" not in summary(run_folder)
