"""MovieLens-1M with the two tasks that the DSelect-k paper trains on it."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from .tables_download import downloaded, written
from .tables_files import Columns
from .tables_schema import Bag, Categorical, Schema, Target
from .tables_split import HELD_OUT, Table, held_out_of

URL, MD5 = "https://files.grouplens.org/datasets/movielens/ml-1m.zip", "c4d9eecfca2ab87c1945afe126590906"
FILES = {
    "ratings": ("user", "movie", "rating", "timestamp"),
    "users": ("user", "gender", "age", "occupation", "zip"),
    "movies": ("movie", "title", "genres"),
}


def movielens_schema() -> Schema:
    """Who and what, and the tasks watch and rating; users are ranked apart."""
    features = [Categorical(name) for name in ("user", "movie", "gender", "age", "occupation", "zip")]
    genres = Bag("genres", pooling="mean")
    tasks = Target("watch"), Target("rating", kind="regression")
    return Schema((*features, genres), tasks, group="user")


def movielens_table(root: str = "data", download: bool = False, seed: int = 0, held_out: float = HELD_OUT) -> Table:
    """Pairs of a user and a movie: half of them rated, half not.

    Documented by the DSelect-k paper (Hazimeh et al., 2106.03760): on MovieLens-1M, task 1 is the classification
    whether a user watches a movie, task 2 the regression of the rating, with cross-entropy and squared error; 1.6
    million pairs to train on, and 0.2 million each to validate and test on. Chosen here: a rated movie is a watched
    one; for each rating one movie that the user has not rated is drawn evenly, with replacement (2,000,418 pairs,
    which fits those sizes), and has no rating; a hash of its number puts a pair into a split, 80:10:10 by default;
    inputs are all that is known of the user, and the movie with its genres. `seed` decides what is drawn.

    The .dat files lie in `root` or in its folder ml-1m. GroupLens lets one download but not hand on the data:
    `download` fetches it. Raises FileNotFoundError where files are missing, ValueError for what is not in their format.
    """
    if download:
        _download(Path(root))
    tables = {name: _read(_file(root, name), columns) for name, columns in FILES.items()}
    ratings, users, movies = (tables[name] for name in FILES)
    user = _position(ratings["user"], users["user"], "user")
    movie = _position(ratings["movie"], movies["movie"], "movie")
    others = unrated(user, movie, len(movies["movie"]), np.random.default_rng(seed))
    kept = np.concatenate([np.arange(len(user)), np.flatnonzero(others >= 0)])
    # A pair that is not watched comes right after its rated one.
    order = np.argsort(np.concatenate([2 * np.arange(len(user)), 2 * np.flatnonzero(others >= 0) + 1]))
    watch = (np.arange(len(kept)) < len(user))[order]
    kept = kept[order]
    user, movie = user[kept], np.where(watch, movie[kept], others[kept])
    columns = {name: users[name].take(user) for name in FILES["users"]}
    columns |= {name: movies[name].take(movie) for name in ("movie", "genres")}
    rating = ratings["rating"].cast("float32").to_numpy(zero_copy_only=False)[kept]
    columns |= {"watch": watch.astype(np.float32), "rating": np.where(watch, rating, np.float32(np.nan))}
    origin = "MovieLens-1M, tasks watch and rating"
    return Table(origin, movielens_schema(), held_out_of({"train": Columns(origin, columns)}, held_out))


def unrated(user: np.ndarray, movie: np.ndarray, movies: int, random: np.random.Generator) -> np.ndarray:
    """For each rating, of `movie` by `user` [N], one of the `movies` that this user has not rated, or -1 if none is."""
    rated = np.unique(user * movies + movie)
    left = movies - np.bincount(rated // movies, minlength=user.max(initial=0) + 1)
    drawn = np.full(len(user), -1, np.int64)
    open_ = np.flatnonzero(left[user] > 0)
    while len(open_):
        drawn[open_] = random.integers(movies, size=len(open_))
        open_ = open_[np.isin(user[open_] * movies + drawn[open_], rated)]
    return drawn


def _position(values: Any, known: Any, what: str) -> np.ndarray:
    """Where each value of ratings.dat stands among the known ones."""
    import pyarrow.compute as pc

    found = pc.fill_null(pc.index_in(values, known), -1).to_numpy(zero_copy_only=False).astype(np.int64)
    if len(missing := np.flatnonzero(found < 0)):
        raise ValueError(
            f"ratings.dat, row {missing[0]}: expected a {what} of {what}s.dat, got {values[int(missing[0])].as_py()!r}"
        )
    return found


def _read(path: Path, names: tuple[str, ...]) -> dict[str, Any]:
    import pyarrow as pa
    from pyarrow import csv

    content = path.read_bytes().replace(b"::", b"\t")
    if not content:
        raise ValueError(f"{path} is empty; expected lines of {'::'.join(names)}")
    try:
        table = csv.read_csv(
            io.BytesIO(content),
            csv.ReadOptions(column_names=names, encoding="latin-1"),
            csv.ParseOptions(delimiter="\t", quote_char=False),
            csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False),
        )
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: expected lines of {'::'.join(names)} ({' '.join(str(error).split())})") from error
    return {name: table.column(name).combine_chunks() for name in names}


def _file(root: str, name: str) -> Path:
    for folder in (Path(root).expanduser(), Path(root).expanduser() / "ml-1m"):
        if (path := folder / f"{name}.dat").is_file():
            return path
    raise FileNotFoundError(
        f"there is no {name}.dat in {root!r} or its folder ml-1m (from {Path.cwd()}); put it there, or set "
        "data.download to true"
    )


def _download(root: Path) -> None:
    if all((root / "ml-1m" / f"{name}.dat").is_file() for name in FILES):
        return
    with zipfile.ZipFile(io.BytesIO(downloaded(URL, MD5))) as archive:
        for name in [*(f"{name}.dat" for name in FILES), "README"]:
            written(root / "ml-1m" / name, archive.read(f"ml-1m/{name}"))
