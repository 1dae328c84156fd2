"""A folder of predictions: whole parts in order, taken up where it was left, refused where it is of something else."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from tasks.recommendation_parts import Parts

ABOUT = {"model": "abc", "input": [["a.parquet", 10, 1]]}


def parts(folder, names=("click",), about=ABOUT, size=10):
    return Parts(folder, names, about, size)


def predict(made, rows, chunk, stop=None):
    """Feed all rows in chunks, as far as they are wanted; with `stop` break off at that row, as if killed."""
    made.start()
    skip = made.take_up()
    for at in range(skip, rows, chunk):
        numbers = np.arange(at, min(at + chunk, rows))
        if stop is not None and numbers[-1] >= stop:
            return
        numbers = numbers[made.wanted(numbers)]
        made.add(numbers, dict.fromkeys(made.names, numbers * 0.5))
    made.finish()


def check(folder, rows, size=10):
    files = sorted(folder.glob("part-*.parquet"))
    assert [f.name for f in files] == [f"part-{i:05d}.parquet" for i in range(-(-rows // size))]
    table = pq.read_table(folder)  # the manifest does not get into its way
    assert table.column_names == ["row", "click"]
    assert table["row"].to_pylist() == list(range(rows))
    assert table["click"].to_pylist() == [row * 0.5 for row in range(rows)]


@pytest.mark.parametrize("chunk", [1, 3, 10, 25, 100])
@pytest.mark.parametrize("rows", [1, 10, 37])
def test_every_row_is_there_once_in_order_whatever_the_chunks(tmp_path, rows, chunk):
    made = parts(tmp_path / "out")
    predict(made, rows, chunk)
    assert made.close() == rows
    check(tmp_path / "out", rows)
    assert parts(tmp_path / "out").start() == rows


@pytest.mark.parametrize("stop", [0, 9, 10, 25, 36])
def test_a_second_run_goes_on_after_the_last_whole_part(tmp_path, stop):
    predict(parts(tmp_path), 37, 4, stop=stop)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("part-*.parquet")}
    assert len(before) == (stop - stop % 4) // 10
    again = parts(tmp_path)
    assert again.start() is None
    assert again.take_up() == 10 * len(before)
    predict(again, 37, 7)
    again.close()
    check(tmp_path, 37)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_a_part_that_was_lost_is_made_again(tmp_path):
    predict(parts(tmp_path), 65, 8)
    (tmp_path / "part-00002.parquet").unlink()
    again = parts(tmp_path)
    assert (again.start(), again.take_up()) == (None, 20)
    predict(again, 65, 8)
    again.close()
    check(tmp_path, 65)


def test_a_part_that_was_being_written_is_not_taken_for_one(tmp_path):
    made = parts(tmp_path)
    made.start()
    (tmp_path / ".part-00000.parquet.partial").write_bytes(b"half")
    assert made.take_up() == 0
    predict(made, 12, 5)
    made.close()
    check(tmp_path, 12)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"about": {**ABOUT, "model": "xyz"}}, r'made with another model \("abc" there, "xyz" here\)'),
        ({"about": {**ABOUT, "input": [["b.parquet", 10, 1]]}}, "made with another input"),
        ({"size": 11}, r"another rows per part \(10 there, 11 here\)"),
        ({"names": ("click", "buy")}, "another columns"),
    ],
)
def test_a_folder_of_something_else_is_refused_and_left_as_it_is(tmp_path, other, told):
    made = parts(tmp_path)
    predict(made, 12, 5)
    made.close()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=told):
        parts(tmp_path, **other).start()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds no predictions"):
        parts(tmp_path).start()
    with pytest.raises(ValueError, match="holds no predictions"):
        parts(tmp_path / "thesis.txt").start()


def test_parts_that_are_missing_are_not_called_whole(tmp_path):
    made = parts(tmp_path)
    predict(made, 37, 5)
    (tmp_path / "part-00001.parquet").unlink()
    with pytest.raises(RuntimeError, match="parts are missing"):
        made.close()
    assert json.loads((tmp_path / "_manifest.json").read_text())["rows"] is None


def test_a_row_that_is_left_out_is_noticed(tmp_path):
    made = parts(tmp_path)
    made.start()
    rows = np.delete(np.arange(11), 4)
    with pytest.raises(RuntimeError, match="part 0 was given other rows than its own"):
        made.add(rows, {"click": rows})


def test_a_task_called_row_has_no_column(tmp_path):
    with pytest.raises(ValueError, match="expected another name for this task"):
        parts(tmp_path, names=("row",))
