"""Where tables come from: files with a schema, splits, and what is wrong with a source."""

import csv

import numpy as np
import pandas as pd
import pytest
import yaml

from zoo.data.tables import open_table
from zoo.data.tables_schema import Categorical, Dense, Schema, Target

SCHEMA = {
    "features": {"ad": {"kind": "categorical"}, "price": {"kind": "dense", "transform": "log"}},
    "tasks": {"click": {}},
}


def frame(count):
    random = np.random.default_rng()
    ads, prices = random.choice(["a", "b", "c"], count), random.random(count)
    return pd.DataFrame({"ad": ads, "price": prices, "click": random.integers(0, 2, count)})


def encoded(table):
    preparation = table.fit()
    return {split: table.encode(split, preparation) for split in table.splits}


def test_rows_of_a_file_are_dealt_out_once_and_always_in_the_same_way(tmp_path):
    data = frame(3000)
    data.to_csv(tmp_path / "ads.csv", index=False)
    rows = encoded(open_table(str(tmp_path / "ads.csv"), SCHEMA, held_out=0.2))
    numbers = {split: found.numbers.tolist() for split, found in rows.items()}
    assert sorted(n for found in numbers.values() for n in found) == list(range(3000))
    for split, share in (("train", 0.6), ("val", 0.2), ("test", 0.2)):
        assert len(numbers[split]) == pytest.approx(3000 * share, abs=5 * (3000 * share * (1 - share)) ** 0.5)
        np.testing.assert_allclose(rows[split].dense[:, 0], np.log1p(data.price[numbers[split]]), rtol=1e-5)
        np.testing.assert_array_equal(rows[split].labels[:, 0], data.click[numbers[split]])
    data.to_parquet(tmp_path / "ads.parquet")
    again = encoded(open_table(str(tmp_path / "ads.parquet"), SCHEMA, held_out=0.2))
    for split, found in again.items():
        assert found.numbers.tolist() == numbers[split]
        np.testing.assert_array_equal(found.ids, rows[split].ids)
    assert list(open_table(str(tmp_path / "ads.csv"), SCHEMA, held_out=0).splits) == ["train"]


def test_folders_and_files_named_after_splits_are_those(tmp_path):
    parts = {"training/a": frame(30), "training/b": frame(20), "valid": frame(7)}
    for name, data in parts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        data.to_csv(tmp_path / f"{name}.csv", index=False)
    rows = encoded(open_table(str(tmp_path), SCHEMA, held_out=0.1))
    assert len(rows["val"]) == 7
    assert len(rows["train"]) + len(rows["test"]) == 50
    assert rows["test"].numbers.tolist() == sorted({*range(50)} - {*rows["train"].numbers.tolist()})


def test_a_schema_may_be_written_in_a_yaml_file(tmp_path):
    frame(9).to_csv(tmp_path / "ads.csv", index=False)
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(SCHEMA))
    table = open_table([str(tmp_path / "ads.csv")], str(tmp_path / "schema.yaml"))
    assert table.schema == Schema((Categorical("ad"), Dense("price", transform="log")), (Target("click"),))
    assert table.description.endswith("ads.csv: 1 numbers and 1 features of ids a row; tasks click")
    with pytest.raises(FileNotFoundError, match=r"schema: there is no file 'none\.yaml'"):
        open_table(str(tmp_path / "ads.csv"), "none.yaml")
    (tmp_path / "schema.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"schema: .*schema.yaml is not YAML"):
        open_table(str(tmp_path / "ads.csv"), str(tmp_path / "schema.yaml"))


def test_what_is_wrong_with_the_rows_is_said_with_the_file(tmp_path):
    path = tmp_path / "ads.csv"
    for line, message in (
        ("a,,1", "feature 'price', row 1: expected a number in column 'price', got nan"),
        ("a,1,7", "label of task 'click', row 1: expected 0 or 1, got '7'"),
    ):
        path.write_text(f"ad,price,click\nb,2,0\n{line}\n")
        with pytest.raises(ValueError, match=rf"^{path}: {message}"):
            encoded(open_table(str(path), SCHEMA, held_out=0))
    path.write_text("ad,prize,clicks\nb,2,0\n")
    with pytest.raises(ValueError, match=rf"^{path}: unknown column \(feature 'price'\) 'price'; did you mean prize\?"):
        open_table(str(path), SCHEMA).check()
    path.write_text("ad,price,clicks\nb,2,0\n")
    with pytest.raises(ValueError, match=r"unknown column \(label of task 'click'\) 'click'; did you mean clicks\?"):
        open_table(str(path), SCHEMA).check()


def test_a_split_without_rows_is_an_error(tmp_path):
    for name in ("train", "val"):
        (tmp_path / f"{name}.csv").write_text("ad,price,click\n" + ("a,1,0\n" if name == "train" else ""))
    table = open_table(str(tmp_path), SCHEMA, held_out=0)
    table.check()
    with pytest.raises(ValueError, match=r"val\.csv: expected rows to val on, got none"):
        encoded(table)
    with pytest.raises(ValueError, match="has no rows to test on"):
        table.split("test")
    (tmp_path / "train.csv").write_text("")
    with pytest.raises(ValueError, match=r"train\.csv: the file is empty"):
        open_table(str(tmp_path), SCHEMA, held_out=0).check()


def test_what_is_wrong_with_a_source_is_one_line(tmp_path):
    frame(3).to_csv(tmp_path / "ads.csv", index=False)
    ads = str(tmp_path / "ads.csv")
    for arguments, options, message in (
        (["sinthetic"], {}, "unknown source of tables 'sinthetic'; did you mean synthetic"),
        ([ads], {}, "ads.csv: expected a schema that says what its columns mean, got none"),
        ([ads, SCHEMA], {"rows": 5}, "option 'rows': expected none beside files"),
        ([ads, SCHEMA], {"download": True}, "download: expected the name of a data set to fetch, got"),
        ([ads, SCHEMA], {"held_out": 0.5}, r"held_out must be at least 0 and below 0.5, got 0.5"),
        (["synthetic", SCHEMA], {}, "schema: synthetic has its own"),
        (["synthetic"], {"corelation": 1}, "unknown option of synthetic 'corelation'; did you mean correlation"),
        (["census:income"], {"group": "x"}, "unknown option of census:income 'group'"),
        (["criteo"], {"download": True}, "download: the licence of criteo forbids it; put its files into 'data'"),
        (["aliccp"], {"download": True}, "download: the licence of aliccp forbids it"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            open_table(*arguments, **options)
        assert "\n" not in str(raised.value)
    for missing in ("census:income", "movielens", "criteo", "aliccp"):
        with pytest.raises(FileNotFoundError, match=r"there is no .* in '.*none'"):
            open_table(missing, root=str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="there is no table"):
        open_table(str(tmp_path / "more.csv"), SCHEMA)


def test_values_that_need_quotes_are_read_as_csv_writes_them(tmp_path):
    words = ['say "x"', "a,b", "two\nlines", " spaced "]
    with (tmp_path / "ads.csv").open("w", newline="") as out:
        csv.writer(out).writerows([["ad", "price", "click"], *[[word, 1, 0] for word in words]])
    table = open_table(str(tmp_path / "ads.csv"), SCHEMA, held_out=0)
    assert set(table.fit().vocabularies["ad"]) == {'say "x"', "a,b", "two\nlines", "spaced"}
