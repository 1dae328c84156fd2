"""Pictures with texts: drawn digits, folders of images and .txt files, tables of captions, and webdataset shards.

Nothing is decoded until it is asked for. Splits are given by the source, or held out by a hash of the image's name, as
in `zoo.data.images`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .corpus import SPLITS, json_lines
from .images import ALIASES, Files, divided, is_image, split_folders, text_of

if TYPE_CHECKING:
    from PIL.Image import Image

TABLES = ("captions.csv", "captions.json", "captions.jsonl")


class PairSource(Protocol):
    """The pictures of a split by number, each with one text or more."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> Image:
        """Decode a picture; raises OSError, ValueError or SyntaxError for a corrupt one."""
        ...

    def name(self, index: int) -> str:
        """Where a picture is from."""
        ...

    def texts(self, index: int) -> Sequence[str]:
        """The texts of a picture, at least one."""
        ...

    def group(self, index: int) -> int:
        """The same number for pictures that each other's texts are true of, in retrieval."""
        ...


@dataclass(frozen=True)
class Pairs:
    """Pictures with texts by split; a split that has none is left out."""

    origin: str
    splits: Mapping[str, PairSource]

    @property
    def description(self) -> str:
        """What it is, and how many pictures each split has."""
        sizes = ", ".join(f"{len(self.splits[s])} {s}" for s in SPLITS if s in self.splits)
        return f"{self.origin}: {sizes} pictures with texts"

    def split(self, name: str) -> PairSource:
        """Pictures of "train", "val" or "test"; raises ValueError when there are none."""
        if name not in self.splits:
            raise ValueError(f"{self.origin} has no pictures to {name} on")
        return self.splits[name]


@dataclass(frozen=True)
class FilePairs:
    """Images in files, each with its texts."""

    paths: Sequence[str]
    captions: Sequence[Sequence[str]]

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> Image:
        """Decode one."""
        return Files(self.paths).load(index)

    def name(self, index: int) -> str:
        """The path of one."""
        return self.paths[index]

    def texts(self, index: int) -> Sequence[str]:
        """The texts of one."""
        return self.captions[index]

    def group(self, index: int) -> int:
        """Every image by itself."""
        return index


def open_pairs(source: str, held_out: float = 0.1, **scenes: Any) -> Pairs:
    """Open "digits" (see `zoo.data.captions.digit_scenes`, which gets `scenes`), a folder, a table, or .tar shards.

    A folder has train, val and test folders or none, and in each images beside .txt files of the same name, or one of
    captions.csv, captions.json and captions.jsonl; or .tar shards. A table has an image's path, relative to itself, as
    "path", "image" or "file_name", its text or list of texts as "caption", "text" or "captions", and maybe "split";
    COCO's own JSON (images and annotations) is one too. An image in several rows has several texts. Raises
    FileNotFoundError or ValueError naming what is missing.
    """
    if source == "digits":
        from .captions import digit_scenes

        return Pairs("scikit-learn's digits on a grid", digit_scenes(held_out=held_out, **scenes))
    path = Path(source).expanduser()
    if path.is_file() and path.suffix in (".csv", ".json", ".jsonl"):
        return _from_rows(path, _table(path), held_out)
    if path.is_file() and path.suffix == ".tar":
        return _from_shards(source, {"train": [path]})
    if not path.is_dir():
        if not path.exists() and not any(mark in source for mark in "/\\."):
            from ..nearest import unknown

            raise unknown("source of pictures with texts", source, ["digits", "a folder", "a .csv, .json or .tar file"])
        kind = "is neither a folder nor a .csv, .json, .jsonl or .tar file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{source} {kind} (from {Path.cwd()})")
    homes = split_folders(path)
    if "train" not in homes:
        homes = {"train": path}
    shards = {split: sorted(home.glob("*.tar")) for split, home in homes.items()}
    if any(shards.values()):
        return _from_shards(source, {split: files for split, files in shards.items() if files})
    rows = [
        (name, text, None if len(homes) == 1 else split)
        for split, home in homes.items()
        for name, text, given in _folder(home)
        for split in [given or split]
    ]
    if not rows:
        raise FileNotFoundError(f"{path}: no image with a .txt file beside it, no {', '.join(TABLES)}, no .tar")
    return _from_rows(path, rows, held_out)


def _folder(home: Path) -> Iterable[tuple[str, str, str | None]]:
    """(image, text, split) of everything in a folder."""
    table = next((home / name for name in TABLES if (home / name).is_file()), None)
    if table is not None:
        yield from _table(table)
        return
    for image in sorted(home.rglob("*")):
        if is_image(image):
            beside = image.with_suffix(".txt")
            if not beside.is_file():
                raise FileNotFoundError(f"{image}: there is no {beside.name} beside it with its text")
            yield str(image), text_of(beside).strip(), None


def _table(path: Path) -> Iterable[tuple[str, str, str | None]]:
    """(image, text, split) of every row of a table."""
    for number, row in _rows(path):
        where = f"{path}, row {number}"
        image = _one_of(row, ("path", "image", "file_name"), where)
        texts = _one_of(row, ("caption", "text", "captions"), where)
        for text in texts if isinstance(texts, list) else [texts]:
            yield str(path.parent / str(image)), str(text).strip(), row.get("split") or None


def _rows(path: Path) -> Iterable[tuple[int, Mapping[str, Any]]]:
    text = text_of(path)
    if path.suffix == ".csv":
        yield from enumerate(csv.DictReader(io.StringIO(text, newline="")), 2)
        return
    try:
        content = [json.loads(line) for _, line in json_lines(text)] if path.suffix == ".jsonl" else json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
        try:
            names = {image["id"]: image["file_name"] for image in content["images"]}
            content = [{"path": names[a["image_id"]], "caption": a["caption"]} for a in content["annotations"]]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: expected COCO's images with id and file_name, and annotations with a caption and the "
                f"image_id of one of them; there is no {error}"
            ) from None
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ValueError(f"{path}: expected a list of objects, or COCO's images and annotations")
    yield from enumerate(content, 1)


def _one_of(row: Mapping[str, Any], names: Sequence[str], where: str) -> Any:
    for name in names:
        if row.get(name):
            return row[name]
    raise ValueError(f"{where}: expected one of {', '.join(names)}; it has {', '.join(map(str, row)) or 'nothing'}")


def _from_rows(path: Path, rows: Iterable[tuple[str, str, str | None]], held_out: float) -> Pairs:
    """Pairs from (image, text, split) rows; an image's rows are its texts."""
    texts: dict[str, list[str]] = {}
    given: dict[str, str | None] = {}
    for name, text, split in rows:
        if not text:
            raise ValueError(f"{path}: the text of {name} is empty")
        if name not in texts and not Path(name).is_file():
            raise FileNotFoundError(f"{path}: there is no image {name}")
        texts.setdefault(name, []).append(text)
        given[name] = _split_name(path, split)
    if not texts:
        raise ValueError(f"{path} lists no image")
    names, base = list(texts), path if path.is_dir() else path.parent
    keys = [Path(name).relative_to(base).as_posix() if Path(name).is_relative_to(base) else name for name in names]
    stated = [given[name] or "train" for name in names]
    # What is held out is a matter of names and splits alone: `divided` sees one class.
    images = divided(str(path), ("",), Files(names), names, [0] * len(names), held_out, stated, keys)
    splits = {
        split: FilePairs(part.names, [texts[name] for name in part.names]) for split, part in images.splits.items()
    }
    return Pairs(str(path), splits)


def _split_name(path: Path, given: str | None) -> str | None:
    if given is None:
        return None
    for split, aliases in ALIASES.items():
        if given.lower() in aliases:
            return split
    raise ValueError(f"{path}: unknown split {given!r}; known: {', '.join(SPLITS)}")


def _from_shards(source: str, shards: Mapping[str, Sequence[Path]]) -> Pairs:
    from .shards import Shards

    return Pairs(source, {split: Shards([str(file) for file in files]) for split, files in shards.items()})
