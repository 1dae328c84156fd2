"""Labelled images: handwritten digits, folders, tables of paths, and torchvision's data sets.

Where a source does not say itself what to validate and test on, a share of each class is held out by a hash of the
image's name, so a split depends neither on the machine, nor on file order, nor on a seed.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..nearest import unknown
from .corpus import SPLITS
from .pictures import open_picture

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# What folders of a split may be called.
ALIASES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


class Source(Protocol):
    """Pictures by position."""

    def load(self, index: int) -> Image:
        """Decode one; raises OSError, ValueError or SyntaxError for a corrupt one."""
        ...


@dataclass(frozen=True)
class Split:
    """N images of a split: names [N] say where each is from, labels [N] number the classes, rows [N] the source."""

    source: Source
    names: Sequence[str]
    labels: Sequence[int]
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: int) -> Image:
        """The picture at `index`."""
        return self.source.load(self.rows[index])


@dataclass(frozen=True)
class Images:
    """Images by split; a split that has none is left out."""

    origin: str
    classes: tuple[str, ...]
    splits: Mapping[str, Split]

    @property
    def description(self) -> str:
        """What it is, and how many images each split has."""
        sizes = ", ".join(f"{len(self.splits[s])} {s}" for s in SPLITS if s in self.splits)
        return f"{self.origin}: {len(self.classes)} classes; {sizes} images"

    def split(self, name: str) -> Split:
        """Images of "train", "val" or "test"; raises ValueError when there are none."""
        if name not in self.splits:
            raise ValueError(f"{self.origin} has no images to {name} on")
        return self.splits[name]

    def check(self) -> None:
        """Raise ValueError when a class has no image to train on."""
        counts = Counter(self.split("train").labels)
        missing = [name for label, name in enumerate(self.classes) if not counts[label]]
        if missing:
            shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise ValueError(f"{self.origin}: no image to train on of {len(missing)} classes: {shown}")


def open_images(source: str, root: str = "data", download: bool = False, held_out: float = 0.1) -> Images:
    """Open "digits", "torchvision:NAME", a CSV file, or a folder with a folder a class.

    digits are scikit-learn's 1797 handwritten digits; torchvision's sets lie under `root`, and are fetched only with
    `download`; a CSV has columns path, label and, if it likes, split, with paths relative to itself; a folder may have
    train, val and test folders around those of its classes. `held_out` is the share of each class that val and test
    get each where the source has no such split.
    Raises FileNotFoundError or ValueError naming what is missing.
    """
    if not 0 <= held_out < 0.5:
        raise ValueError(f"held_out must be at least 0 and below 0.5, got {held_out}")
    if source == "digits":
        return digits(held_out)
    kind, _, name = source.partition(":")
    if kind == "torchvision":
        from .images_torchvision import torchvision_images

        return torchvision_images(name, root, download, held_out)
    path = Path(source).expanduser()
    if path.is_dir():
        return folder(path, held_out)
    if path.is_file() and path.suffix == ".csv":
        return table(path, held_out)
    if path.is_file():
        raise ValueError(f"{source} is neither a folder nor a .csv file with columns path and label")
    if any(mark in source for mark in "/\\."):
        raise FileNotFoundError(f"there is no folder or table of images {source!r} (from {Path.cwd()})")
    raise unknown("source of images", source, ["digits", "torchvision:CIFAR10", "a folder", "a .csv file"])


def digits(held_out: float = 0.1) -> Images:
    """scikit-learn's handwritten digits: 1797 images of 8x8 grey values, part of the package."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'moe-zoo[vision]'") from error
    bunch = load_digits()
    pixels = (bunch.images * (255 / 16)).round().astype("uint8")
    names = [f"digit {i}" for i in range(len(pixels))]
    labels = [int(label) for label in bunch.target]
    return divided("scikit-learn's digits", tuple("0123456789"), _Pixels(pixels), names, labels, held_out)


def folder(path: Path, held_out: float = 0.1) -> Images:
    """A folder with a folder a class, or with such folders for each split; these may go without one to train on."""
    homes = split_folders(path)
    if "train" not in homes and len(homes) < len(_class_folders(path)):
        homes = {"train": path}  # there are other folders too: all are classes, whatever they are called
    inside = {split: _class_folders(home) for split, home in homes.items()}
    classes = inside.get("train") or tuple(sorted({name for names in inside.values() for name in names}))
    for split, names in inside.items():
        if strange := [name for name in names if name not in classes]:
            raise ValueError(f"{homes[split] / strange[0]}: there is no class {strange[0]!r} in {homes['train']}")
    found = {split: _files_of(home, classes) for split, home in homes.items()}
    paths = [name for files, _ in found.values() for name in files]
    labels = [label for _, numbers in found.values() for label in numbers]
    given_splits = [split for split, (files, _) in found.items() for _ in files]
    keys = [Path(name).relative_to(path).as_posix() for name in paths]
    return divided(str(path), classes, Files(paths), paths, labels, held_out, given_splits, keys)


def split_folders(path: Path) -> dict[str, Path]:
    """Folders of splits in a folder, by split; upper and lower case are the same."""
    there = {p.name.lower(): p for p in sorted(path.iterdir(), reverse=True) if p.is_dir()}
    homes = {split: next((there[a] for a in ALIASES[split] if a in there), None) for split in SPLITS}
    return {split: home for split, home in homes.items() if home is not None}


def table(path: Path, held_out: float = 0.1) -> Images:
    """A CSV file with columns path and label, and maybe split."""
    reader = csv.DictReader(io.StringIO(text_of(path), newline=""))
    columns = reader.fieldnames or []
    for column in ("path", "label"):
        if column not in columns:
            raise ValueError(f"{path}: no column {column!r}; it has {', '.join(columns) or 'none'}")
    rows = list(reader)
    if not rows:
        raise ValueError(f"{path} lists no image")
    names, splits = [str(path.parent / row["path"]) for row in rows], [_split_name(path, row) for row in rows]
    for number, (name, row) in enumerate(zip(names, rows), 2):
        if not row["label"]:
            raise ValueError(f"{path}, line {number}: no label")
        if not Path(name).is_file():
            raise FileNotFoundError(f"{path}, line {number}: there is no image {name}")
    found = {row["label"] for row in rows}
    classes = tuple(sorted(found, key=lambda c: (int(c), c)) if all(c.isdecimal() for c in found) else sorted(found))
    numbers = {name: i for i, name in enumerate(classes)}
    labels = [numbers[row["label"]] for row in rows]
    return divided(str(path), classes, Files(names), names, labels, held_out, splits, [row["path"] for row in rows])


def text_of(path: Path) -> str:
    """What a file of text says; raises ValueError where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None


def image_files(paths: Sequence[str]) -> list[str]:
    """Images among files and, in order of their names, below folders; raises FileNotFoundError where there are none."""
    found: list[str] = []
    for given in paths:
        path = Path(given).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"there is no image or folder {given!r} (from {Path.cwd()})")
        inside = [str(path)] if path.is_file() else [str(p) for p in sorted(path.rglob("*")) if is_image(p)]
        if not inside:
            raise FileNotFoundError(f"no image below {given!r}; known are {', '.join(EXTENSIONS)}")
        found += inside
    return found


def is_image(path: Path) -> bool:
    """Whether a file's name is that of an image; hidden ones, such as macOS leaves beside images, are none."""
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and path.is_file()


@dataclass(frozen=True)
class Files:
    """Images in files."""

    paths: Sequence[str]

    def load(self, index: int) -> Image:
        """Decode one."""
        return open_picture(self.paths[index])


@dataclass(frozen=True)
class _Pixels:
    """Grey images in memory, [N, H, W] uint8."""

    pixels: np.ndarray

    def load(self, index: int) -> Image:
        from PIL import Image

        return Image.fromarray(self.pixels[index])


def divided(
    origin: str,
    classes: tuple[str, ...],
    source: Source,
    names: Sequence[str],
    labels: Sequence[int],
    held_out: float,
    given: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
) -> Images:
    """Images in the splits that `given` names; val and test are held out of train, by their keys, where it names none.

    Keys are the names by default; those of files are relative to the source, so that it can be moved.
    """
    home, keys = list(given or ["train"] * len(names)), keys or names
    missing = [split for split in ("val", "test") if split not in home]
    by_class: dict[int, list[int]] = defaultdict(list)
    for row, (label, split) in enumerate(zip(labels, home)):
        if split == "train":
            by_class[label].append(row)
    for rows in by_class.values():
        rows.sort(key=lambda row: hashlib.sha256(keys[row].encode()).digest())
        # One at least of a class that can spare it: a small folder is enough to train and test on.
        share = max(round(len(rows) * held_out), int(held_out > 0 and len(rows) > len(missing)))
        for place, split in enumerate(missing):
            for row in rows[place * share : (place + 1) * share]:
                home[row] = split
    splits = {}
    for split in SPLITS:
        mine = [row for row, theirs in enumerate(home) if theirs == split]
        if mine:
            splits[split] = Split(source, [names[r] for r in mine], [labels[r] for r in mine], mine)
    return Images(origin, classes, splits)


def _class_folders(path: Path) -> tuple[str, ...]:
    found = tuple(sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if not found:
        raise ValueError(f"{path} has no folders: expected one for each class, with its images inside")
    return found


def _files_of(path: Path, classes: Sequence[str]) -> tuple[list[str], list[int]]:
    """Images and labels below a folder of classes."""
    found = [
        (str(file), label)
        for label, name in enumerate(classes)
        for file in sorted((path / name).rglob("*"))
        if is_image(file)
    ]
    if not found:
        raise FileNotFoundError(f"no image below {path}; known are {', '.join(EXTENSIONS)}")
    return [file for file, _ in found], [label for _, label in found]


def _split_name(path: Path, row: Mapping[str, str | None]) -> str:
    given = (row.get("split") or "train").lower()
    for split, aliases in ALIASES.items():
        if given in aliases:
            return split
    raise ValueError(f"{path}: unknown split {given!r}; known: {', '.join(SPLITS)}")
