"""Reading tables in chunks: every row once, in order, with its number; and what is wrong with a file."""

import gzip

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from zoo.data.tables_files import Columns, CsvFiles, Part, open_files


def frame(count):
    random = np.random.default_rng()
    names = random.choice(["x", 'with "quotes"', "comma, inside", "line\nbreak", "ünï"], count)
    return pd.DataFrame({"id": np.arange(count), "name": names, "left": random.random(count)})


def write(path, data, rows_a_group=7):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pandas(data, preserve_index=False), path, row_group_size=rows_a_group)
    else:
        data.to_csv(path, index=False, sep="\t" if ".tsv" in path.suffixes else ",")


def read(reader, size, **options):
    chunks = list(reader.chunks(["name", "id"], size, **options))
    assert all(list(chunk.columns) == ["name", "id"] for chunk in chunks)
    rows = [int(row) for chunk in chunks for row in chunk.rows]
    values = {name: [v for chunk in chunks for v in chunk.columns[name].to_pylist()] for name in ("name", "id")}
    return rows, values, [len(chunk.rows) for chunk in chunks]


@pytest.mark.parametrize("ending", ["csv", "tsv", "csv.gz", "parquet"])
@pytest.mark.parametrize("skip", [0, 1, 7, 20, 33, 40, 47])
def test_chunks_hold_every_row_after_the_skipped_ones_in_order(tmp_path, ending, skip):
    data = frame(40)
    write(tmp_path / f"a.{ending}", data[:33])
    write(tmp_path / f"b.{ending}", data[33:])
    rows, values, sizes = read(open_files(str(tmp_path)), 10, skip=skip)
    assert rows == list(range(skip, 40))
    assert values["name"] == data.name[skip:].tolist()
    assert list(map(int, values["id"])) == rows
    assert max(sizes, default=0) <= 10
    if skip == 0:
        assert sizes == [10, 10, 10, 3, 7]  # no chunk spans two files


def test_csv_values_are_texts_as_they_stand_and_those_of_parquet_have_their_types(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfid,name\r\n007,NA\r\n,\r\n")
    assert read(open_files(str(tmp_path / "a.csv")), 9)[1] == {"name": ["NA", ""], "id": ["007", ""]}
    write(tmp_path / "b.parquet", frame(3))
    assert read(open_files(str(tmp_path / "b.parquet")), 9)[1]["id"] == [0, 1, 2]


def test_files_folders_and_patterns_are_read_in_the_order_given_and_of_names(tmp_path):
    data = frame(40)
    for i, name in enumerate(["c/z.csv", "c/deep/a.csv", "b.csv", "a1.csv"]):
        write(tmp_path / name, data[10 * i : 10 * i + 10])
    (tmp_path / "c" / "_SUCCESS").touch()
    (tmp_path / "c" / ".hidden.csv").write_text("x")
    (tmp_path / "c" / "notes.txt").write_text("x")
    sources = [str(tmp_path / "c"), str(tmp_path / "?.csv"), str(tmp_path / "a1.csv")]
    assert list(map(int, read(open_files(sources), 10)[1]["id"])) == [*range(10, 20), *range(10), *range(20, 40)]


def test_a_file_is_streamed_not_read_whole(tmp_path):
    write(tmp_path / "a.parquet", frame(10_000), rows_a_group=1000)
    before = pa.total_allocated_bytes()
    chunks = open_files(str(tmp_path / "a.parquet")).chunks(["name", "id"], 10)
    next(chunks)
    held = pa.total_allocated_bytes() - before
    whole = pq.read_table(tmp_path / "a.parquet", columns=["name", "id"]).nbytes
    assert held < whole / 2
    chunks.close()


def test_names_of_columns_given_for_a_file_without_a_header(tmp_path):
    (tmp_path / "day_0").write_text('1\ta"\n2\tb\n')
    reader = CsvFiles((tmp_path / "day_0",), delimiter="\t", header=("id", "name"), quoted=False)
    assert reader.names == ["id", "name"]
    assert read(reader, 5)[1] == {"name": ['a"', "b"], "id": ["1", "2"]}
    (tmp_path / "day_1.gz").write_bytes(gzip.compress(b"3\tc\n"))
    reader = CsvFiles((tmp_path / "day_1.gz",), delimiter="\t", header=("id", "name"))
    assert read(reader, 5)[1] == {"name": ["c"], "id": ["3"]}


def test_a_part_has_the_rows_that_are_kept(tmp_path):
    data = frame(50)
    write(tmp_path / "a.csv", data)
    part = Part(open_files(str(tmp_path / "a.csv")), lambda rows: rows % 3 == 1)
    rows, values, _ = read(part, 8)
    assert rows == list(range(1, 50, 3))
    assert values["name"] == data.name[1::3].tolist()
    assert part.names == ["id", "name", "left"]
    memory = Part(Columns("memory", {name: data[name].to_numpy() for name in data}), lambda rows: rows < 20)
    assert [int(i) for c in memory.chunks(["id"], 8) for i in np.asarray(c.columns["id"])] == list(range(20))
    assert [len(c.rows) for c in memory.chunks(["id"], 8)] == [8, 8, 4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty; expected a header line and rows"),
        (b"id,nam\n1,x\n", "unknown column 'name'; did you mean nam?"),
        (b"id,name\n1,x,3\n", r"Expected 2 columns, got 3: 1,x,3"),
        (b"id,name\n1,\xff\n", "invalid UTF8 data"),
        (b"id,name,id\n1,x,2\n", "expected one column 'id', got 2"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line_that_names_it(tmp_path, content, message):
    path = tmp_path / "ads.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"ads.csv: .*{message}") as raised:
        read(open_files(str(path)), 5)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("cut", [False, True])
def test_a_packed_file_that_is_broken_is_named(tmp_path, cut):
    content = b"id,name\n" + np.random.default_rng(0).bytes(90_000).hex().encode()
    (tmp_path / "ads.csv.gz").write_bytes(gzip.compress(content)[:1000] if cut else content)
    with pytest.raises(ValueError, match=r"^[^:]*ads\.csv\.gz: "):
        read(open_files(str(tmp_path / "ads.csv.gz")), 5)


def test_a_second_file_without_a_column_is_named(tmp_path):
    write(tmp_path / "a.parquet", frame(3))
    write(tmp_path / "b.parquet", frame(3).rename(columns={"name": "title"}))
    with pytest.raises(ValueError, match=r"b.parquet: unknown column 'name'"):
        read(open_files(str(tmp_path)), 5)


def test_what_is_no_table_is_said(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"a\.parquet: Parquet file size is 4 bytes"):
        list(open_files(str(tmp_path / "a.parquet")).chunks(["a"]))
    (tmp_path / "b.csv").write_text("a\n1\n")
    with pytest.raises(ValueError, match="expected files of one format, got CSV and Parquet"):
        open_files(str(tmp_path))
    (tmp_path / "c.xls").write_text("a")
    with pytest.raises(ValueError, match=r"c\.xls is no table; known are \.csv"):
        open_files(str(tmp_path / "c.xls"))
    for missing in ("none", "*.pq"):
        with pytest.raises(FileNotFoundError, match="there is no table"):
            open_files(str(tmp_path / missing))


def test_a_file_with_a_header_only_has_no_chunks(tmp_path):
    (tmp_path / "a.csv").write_text("id,name\n")
    assert read(open_files(str(tmp_path / "a.csv")), 5)[0] == []
    write(tmp_path / "a.parquet", frame(0))
    assert read(open_files(str(tmp_path / "a.parquet")), 5)[0] == []
