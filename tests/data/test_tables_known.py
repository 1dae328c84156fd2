"""Readers of known data sets, on small files written by hand in their formats."""

import gzip
import io
import tarfile
import zipfile

import numpy as np
import pandas as pd
import pytest

from zoo.data import tables_census, tables_movielens
from zoo.data.tables import open_table
from zoo.data.tables_download import downloaded, written
from zoo.data.tables_movielens import unrated
from zoo.data.tables_schema import Bag, Categorical, Dense


def encoded(table):
    table.check()
    preparation = table.fit()
    return preparation, {split: table.encode(split, preparation) for split in table.splits}


# --- Census-Income ---

# The 42 columns as UCI's census-income.names lists them: class of worker, industry code, and so on.
PERSON = [
    "58",
    "Self-employed-not incorporated",
    "4",
    "34",
    "Some college but no degree",
    "0",
    "Not in universe",
    "Divorced",
    "Construction",
    "Precision production craft & repair",
    "White",
    "All other",
    "Male",
    "Not in universe",
    "Not in universe",
    "Children or Armed Forces",
    "0",
    "0",
    "0",
    "Head of household",
    "South",
    "Arkansas",
    "Householder",
    "Householder",
    "1053.55",
    "MSA to MSA",
    "Same county",
    "Same county",
    "No",
    "Yes",
    "1",
    "Not in universe",
    "United-States",
    "United-States",
    "United-States",
    "Native- Born in the United States",
    "0",
    "Not in universe",
    "2",
    "52",
    "94",
    "- 50000.",
]
AT = {name: i for i, name in enumerate(tables_census.COLUMNS)}


def person(**changed):
    values = list(PERSON)
    for name, value in changed.items():
        values[AT[name]] = str(value)
    return ", ".join(values)


@pytest.fixture
def census(tmp_path):
    random = np.random.default_rng()
    levels = ["Children", "Some college but no degree", "Bachelors degree(BA AB BS)", "Doctorate degree(PhD EdD)"]
    people = pd.DataFrame(
        {
            "age": random.integers(0, 90, 101),
            "education": random.choice(levels, 101),
            "marital_stat": random.choice(["Never married", "Divorced"], 101),
            "income_50k": random.choice(["- 50000.", "50000+."], 101),
            "stock_dividends": random.choice([0, 120, 9999], 101),
        }
    )
    lines = [person(**row) for row in people.to_dict("records")]
    (tmp_path / "census-income.data").write_text("\n".join(lines[:60]) + "\n")
    (tmp_path / "census-income.test.gz").write_bytes(gzip.compress("\n".join(lines[60:]).encode()))
    return str(tmp_path), people


@pytest.mark.parametrize("group", ["income", "education"])
def test_census_has_the_labels_and_inputs_of_the_paper(census, group):
    root, people = census
    preparation, rows = encoded(open_table(f"census:{group}", root=root))
    schema = preparation.schema
    assert [task.name for task in schema.tasks] == [group, "never_married"]
    assert len(schema.of(Dense)) + len(schema.of(Categorical)) == 38  # 40 features without education and marital status
    assert not {f.name for f in schema.features} & {"education", "marital_stat", "instance_weight", "income_50k"}
    truth = {
        "income": people.income_50k == "50000+.",
        "education": people.education.str.contains("degree(", regex=False),
        "never_married": people.marital_stat == "Never married",
    }
    column = [f.name for f in schema.of(Dense)].index("age")
    dividends = [f.name for f in schema.of(Dense)].index("stock_dividends")
    for split, at in (("train", 0), ("val", 60), ("test", 60)):
        mine = people.iloc[at + rows[split].numbers]
        for task, name in enumerate((group, "never_married")):
            np.testing.assert_array_equal(rows[split].labels[:, task], truth[name][mine.index])
        np.testing.assert_allclose(rows[split].dense[:, column], np.log1p(mine.age), rtol=1e-6)
        np.testing.assert_allclose(rows[split].dense[:, dividends], np.log1p(mine.stock_dividends), rtol=1e-6)
    # The published test file is halved at random, and always in the same way.
    assert sorted([*rows["val"].numbers, *rows["test"].numbers]) == list(range(41))
    assert len(rows["val"]) == 20
    assert rows["val"].numbers.tolist() != list(range(20))
    _, again = encoded(open_table(f"census:{group}", root=root))
    assert again["val"].numbers.tolist() == rows["val"].numbers.tolist()


def test_census_columns_stand_where_the_paper_and_uci_have_them():
    assert len(tables_census.COLUMNS) == len(set(tables_census.COLUMNS)) == len(PERSON) == 42
    by_number = {1: "age", 5: "education", 8: "marital_stat", 25: "instance_weight", 41: "year", 42: "income_50k"}
    assert {i: tables_census.COLUMNS[i - 1] for i in by_number} == by_number
    # Numbers are the columns that hold numbers, but for codes of industry, occupation, business, benefits and year.
    numeric = {name for name, value in zip(tables_census.COLUMNS, PERSON) if value.replace(".", "").isdecimal()}
    codes = {"det_ind_code", "det_occ_code", "own_or_self", "vet_benefits", "year", "instance_weight"}
    assert numeric - codes == set(tables_census.NUMBERS)


def test_a_census_line_of_another_length_is_an_error(census):
    root, _ = census
    with open(f"{root}/census-income.data", "a") as out:
        out.write("1, 2, 3\n")
    with pytest.raises(ValueError, match=r"census-income\.data: .*Expected 42 columns, got 3"):
        open_table("census:income", root=root).fit()


def test_census_is_fetched_and_checked(tmp_path, monkeypatch):
    inner, outer = io.BytesIO(), tmp_path / "census.zip"
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        for part, count in (("data", 5), ("test", 4)):
            content = (person() + "\n").encode() * count
            info = tarfile.TarInfo(f"census-income.{part}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with zipfile.ZipFile(outer, "w") as archive:
        archive.writestr("census.tar.gz", inner.getvalue())
    monkeypatch.setattr(tables_census, "URL", outer.as_uri())
    root = tmp_path / "data"
    with pytest.raises(ValueError, match=r"expected 199523 lines in census-income\.data, got 5"):
        open_table("census:income", root=str(root), download=True)
    assert not root.exists()
    monkeypatch.setattr(tables_census, "TRAIN_ROWS", 5)
    monkeypatch.setattr(tables_census, "TEST_ROWS", 4)
    _, rows = encoded(open_table("census:income", root=str(root), download=True))
    assert {split: len(found) for split, found in rows.items()} == {"train": 5, "val": 2, "test": 2}
    outer.unlink()  # what is there is not fetched again
    open_table("census:income", root=str(root), download=True)


# --- MovieLens ---


@pytest.fixture
def movielens(tmp_path):
    random = np.random.default_rng()
    home = tmp_path / "ml-1m"
    home.mkdir()
    users = pd.DataFrame({"user": range(1, 31), "gender": "F", "age": 25, "occupation": 3, "zip": "02139"})
    movies = pd.DataFrame({"movie": range(10, 50), "title": "Léon: The Professional (1994)", "genres": "Crime|Drama"})
    pairs = random.choice(30 * 40, 400, replace=False)
    ratings = pd.DataFrame({"user": 1 + pairs // 40, "movie": 10 + pairs % 40})
    ratings["rating"], ratings["time"] = random.integers(1, 6, 400), 978300760
    for name, data in (("users", users), ("movies", movies), ("ratings", ratings)):
        lines = ["::".join(map(str, row)) for row in data.itertuples(index=False)]
        (home / f"{name}.dat").write_bytes("\n".join([*lines, ""]).encode("latin-1"))
    return tmp_path, ratings


def test_movielens_has_each_rating_and_as_many_pairs_that_were_not_rated(movielens):
    root, ratings = movielens
    preparation, rows = encoded(open_table("movielens", root=str(root), held_out=0.2))
    words = {name: ("", *values) for name, values in preparation.vocabularies.items()}
    found = []
    user, movie = (preparation.schema.of(Categorical).index(preparation.schema[n]) for n in ("user", "movie"))
    for part in rows.values():
        # Ids of values that only other splits have are 0; the numbers of groups are the users themselves.
        for ids, group, (watch, rating) in zip(part.ids, part.group, part.labels):
            assert words["user"][ids[user]] in (str(group), "")
            found.append((int(group), words["movie"][ids[movie]], watch, rating))
        np.testing.assert_array_equal(np.isnan(part.labels[:, 1]), part.labels[:, 0] == 0)
    pairs = pd.DataFrame(found, columns=["user", "movie", "watch", "rating"])
    assert len(pairs) == 800
    watched = pairs[(pairs.watch == 1) & (pairs.movie != "")].astype({"movie": int, "rating": int})
    ours = watched[["user", "movie", "rating"]].sort_values(["user", "movie"]).to_numpy().tolist()
    truth = {(u, m): r for u, m, r in zip(ratings.user, ratings.movie, ratings.rating)}
    assert all(truth[u, m] == r for u, m, r in ours)
    assert (pairs.watch == 1).sum() == 400
    others = pairs[(pairs.watch == 0) & (pairs.movie != "")]
    assert not {(u, int(m)) for u, m in zip(others.user, others.movie)} & set(truth)
    assert pairs[pairs.watch == 0].user.value_counts().equals(ratings.user.value_counts()) or (
        pairs[pairs.watch == 0].user.value_counts().sort_index().tolist()
        == ratings.user.value_counts().sort_index().tolist()
    )
    assert preparation.vocabularies["genres"] == ("Crime", "Drama")
    assert isinstance(preparation.schema["genres"], Bag)


def test_nothing_is_drawn_for_a_user_who_rated_everything():
    user, movie = np.array([0, 0, 0, 1, 1]), np.array([0, 1, 2, 0, 2])
    assert unrated(user, movie, 3, np.random.default_rng()).tolist() == [-1, -1, -1, 1, 1]


def test_movies_that_were_not_rated_are_drawn_evenly():
    user, movie = np.zeros(20_000, np.int64), np.tile([0, 3], 10_000)
    drawn = unrated(user, movie, 6, np.random.default_rng())
    counts = np.bincount(drawn, minlength=6)
    assert counts[[0, 3]].tolist() == [0, 0]
    assert ((counts[[1, 2, 4, 5]] - 5000) ** 2 / 5000).sum() < 16.3  # chi-squared, 3 degrees of freedom, 0.999


def test_what_is_wrong_with_movielens_files_is_said(movielens):
    root, _ = movielens
    path = root / "ml-1m" / "ratings.dat"
    path.write_text("99::10::5::978300760\n")
    with pytest.raises(ValueError, match=r"ratings\.dat, row 0: expected a user of users\.dat, got '99'"):
        open_table("movielens", root=str(root))
    path.write_text("1::10::5\n")
    with pytest.raises(ValueError, match=r"ratings\.dat: expected lines of user::movie::rating::timestamp"):
        open_table("movielens", root=str(root))


def test_movielens_is_fetched_with_its_checksum(movielens, tmp_path, monkeypatch):
    archive = tmp_path / "ml-1m.zip"
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr("ml-1m/README", "licence")
        for name in tables_movielens.FILES:
            out.writestr(f"ml-1m/{name}.dat", (tmp_path / "ml-1m" / f"{name}.dat").read_bytes())
    monkeypatch.setattr(tables_movielens, "URL", archive.as_uri())
    with pytest.raises(ValueError, match="expected the MD5 checksum c4d9eecfca2ab87c1945afe126590906, got"):
        open_table("movielens", root=str(tmp_path / "new"), download=True)
    monkeypatch.setattr(tables_movielens, "MD5", None)
    assert open_table("movielens", root=str(tmp_path / "new"), download=True).fit().vocabularies["user"]
    assert (tmp_path / "new" / "ml-1m" / "README").read_text() == "licence"


# --- Criteo ---


def criteo_lines(random, count):
    rows = []
    for _ in range(count):
        numbers = [str(n) if n > -3 else "" for n in random.integers(-5, 50, 13)]
        categories = [f"{c:08x}" if c else "" for c in random.integers(0, 9, 26)]
        rows.append([str(random.integers(0, 2)), *numbers, *categories])
    return rows


def test_criteo_days_of_lines_are_read_and_the_last_is_halved(tmp_path):
    random = np.random.default_rng()
    days = [criteo_lines(random, 40) for _ in range(3)]
    texts = ["\n".join("\t".join(row) for row in day) + "\n" for day in days]
    (tmp_path / "day_10").write_text(texts[2])  # after day_2, not before it
    (tmp_path / "day_2.tsv").write_text(texts[1])
    (tmp_path / "day_0.gz").write_bytes(gzip.compress(texts[0].encode()))
    (tmp_path / "day_0.tsv.gz").write_bytes(gzip.compress(b"the same day again"))
    preparation, rows = encoded(open_table("criteo", root=str(tmp_path), num_embeddings=64))
    assert [len(preparation.schema.of(kind)) for kind in (Dense, Categorical)] == [13, 26]
    assert preparation.schema["int_0"].transform == "log"
    for split, source in (("train", days[0] + days[1]), ("val", days[2]), ("test", days[2])):
        for number, dense, labels in zip(rows[split].numbers, rows[split].dense, rows[split].labels):
            values = np.array([float(v or 0) for v in source[number][1:14]])
            np.testing.assert_allclose(dense, np.sign(values) * np.log1p(abs(values)), rtol=1e-6)
            assert labels.tolist() == [float(source[number][0])]
    assert rows["train"].numbers.tolist() == list(range(80))
    assert sorted([*rows["val"].numbers, *rows["test"].numbers]) == list(range(40))
    assert 0 < len(rows["val"]) < 40
    assert rows["train"].ids.max() < 64


def test_criteo_days_that_torchrec_preprocessed_are_read_as_torchrec_splits_them(tmp_path):
    from torchrec.datasets.criteo import DEFAULT_CAT_NAMES, DEFAULT_INT_NAMES

    random = np.random.default_rng()
    days = []
    for number, count in ((0, 30), (1, 21)):
        arrays = {
            "dense": random.random((count, 13)).astype(np.float32),
            "sparse": random.integers(0, 2**31, (count, 26)),
            "labels": random.integers(0, 2, (count, 1)).astype(np.int32),
        }
        for part, array in arrays.items():
            np.save(tmp_path / f"day_{number}_{part}.npy", array)
        days.append(arrays)
    preparation, rows = encoded(open_table("criteo", root=str(tmp_path)))
    assert [f.name for f in preparation.schema.features] == [*DEFAULT_INT_NAMES, *DEFAULT_CAT_NAMES]
    for split, day, part in (("train", 0, slice(30)), ("val", 1, slice(11)), ("test", 1, slice(11, 21))):
        np.testing.assert_array_equal(rows[split].dense, days[day]["dense"][part])
        np.testing.assert_array_equal(rows[split].labels, days[day]["labels"][part])
        # Equal ids stay equal, and others apart where the hash does not join them.
        assert len(np.unique(rows[split].ids[:, 3])) >= len(np.unique(days[day]["sparse"][part][:, 3])) - 2
    np.save(tmp_path / "day_0_dense.npy", days[0]["dense"][:, :12])
    with pytest.raises(ValueError, match=r"day_0_dense\.npy: expected 13 columns, got an array of \(30, 12\)"):
        open_table("criteo", root=str(tmp_path)).fit()


def test_a_single_criteo_file_has_a_share_held_out(tmp_path):
    lines = criteo_lines(np.random.default_rng(), 200)
    (tmp_path / "train.txt").write_text("\n".join("\t".join(row) for row in lines))
    _, rows = encoded(open_table("criteo", root=str(tmp_path), held_out=0.25))
    assert sorted(n for part in rows.values() for n in part.numbers) == list(range(200))
    assert 60 < len(rows["train"]) < 140


# --- Ali-CCP ---

ALICCP = """click,purchase,101,121,122,124,125,126,127,128,129,205,206,207,210,216,508,509,702,853,301,109_14,110_14,\
127_14,150_14,D109_14,D110_14,D127_14,D150_14,D508,D509,D702,D853
0,0,1,1,1,1,1,0,1,1,1,65,36,84,88,52,23,0,17,0,1,1,1,1,1,0.4734,0.562,0.0856,0.1902,0.1754,0.0,0.3555,0.0
1,0,1,1,1,1,1,0,1,1,1,66,20,85,89,0,0,0,0,0,1,1,1,1,1,0.4734,0.562,0.0856,0.1902,0.0,0.0,0.0,0.0
1,1,2,1,1,1,1,0,1,1,1,67,29,86,90,0,19,0,0,0,1,1,1,1,1,0.4734,0.562,0.0856,0.1902,0.11975,0.0,0.0,0.0
"""


@pytest.mark.parametrize("ending", ["", "_sample"])
def test_aliccp_has_clicks_and_conversions_given_a_click(tmp_path, ending):
    for split in ("train", "val", "test"):
        (tmp_path / f"ali_ccp_{split}{ending}.csv").write_text(ALICCP)
    preparation, rows = encoded(open_table("aliccp", root=str(tmp_path)))
    click, conversion = preparation.schema.tasks
    assert (click.name, conversion.name, conversion.given) == ("click", "conversion", "click")
    assert [len(preparation.schema.of(kind)) for kind in (Dense, Categorical)] == [8, 23]
    for part in rows.values():
        assert part.labels.tolist() == [[0, 0], [1, 0], [1, 1]]
        assert part.group.tolist() == [1, 1, 2]
        np.testing.assert_allclose(part.dense[0, :5], [0.4734, 0.562, 0.0856, 0.1902, 0.1754], rtol=1e-6)
    assert preparation.vocabularies["205"] == ("65", "66", "67")


def test_aliccp_files_without_a_field_are_read_without_it(tmp_path):
    table = pd.read_csv(io.StringIO(ALICCP), dtype=str).drop(columns=["210", "D853"])
    table.to_csv(tmp_path / "ali_ccp_train.csv", index=False)
    schema = open_table("aliccp", root=str(tmp_path)).schema
    assert [len(schema.of(kind)) for kind in (Dense, Categorical)] == [7, 22]


def test_aliccp_in_its_original_form_needs_to_be_preprocessed(tmp_path):
    (tmp_path / "sample_skeleton_train.csv").touch()
    with pytest.raises(FileNotFoundError, match=r"sample_skeleton_train\.csv is the original form: run torch-rechub's"):
        open_table("aliccp", root=str(tmp_path))


# --- Downloads ---


def test_what_cannot_be_fetched_leaves_nothing(tmp_path):
    with pytest.raises(ConnectionError, match=r"cannot fetch file:.*none"):
        downloaded((tmp_path / "none").as_uri())
    (tmp_path / "folder").mkdir()
    written(tmp_path / "folder" / "deep" / "a.txt", b"first")
    written(tmp_path / "folder" / "deep" / "a.txt", b"second")
    assert (tmp_path / "folder" / "deep" / "a.txt").read_bytes() == b"second"
    with pytest.raises(TypeError):
        written(tmp_path / "folder" / "b.txt", "no bytes")
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["deep"]
