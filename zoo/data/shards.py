"""webdataset shards: .tar files whose members of one name, but for the ending, are a sample (KEY.jpg, KEY.txt, ...)."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from .images import EXTENSIONS
from .pictures import open_picture

if TYPE_CHECKING:
    from PIL.Image import Image

TEXTS = (".txt", ".caption", ".json")


@dataclass(frozen=True)
class Sample:
    """One sample as it is in a shard: its name, SHARD/KEY, its texts and the bytes of its image."""

    name: str
    texts: tuple[str, ...]
    image: bytes

    def load(self) -> Image:
        """Decode the image; raises OSError, ValueError or SyntaxError for a corrupt one."""
        return open_picture(io.BytesIO(self.image))


def read_shard(path: str) -> Iterator[Sample]:
    """The samples of a shard in order, read from front to back, one at a time in memory.

    Members of a sample must follow each other, as webdataset has it; members of other endings are passed over. A text
    is a .txt or .caption member, or "caption" or "text" of a .json one. Raises ValueError naming the shard and the
    sample for one without an image or a text, and the shard for a file that is no tar or is cut short.
    """
    key, parts = "", dict[str, bytes]()
    try:
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                this, ending = _key(member.name)
                if this != key and parts:
                    yield _sample(path, key, parts)
                    parts = {}
                key = this
                if ending in EXTENSIONS or ending in TEXTS:
                    content = tar.extractfile(member)
                    assert content is not None
                    parts[ending] = content.read()
                    if len(parts[ending]) < member.size:
                        raise tarfile.ReadError(f"{member.name} is cut short")
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path} is not a readable .tar file ({error})") from error
    if parts:
        yield _sample(path, key, parts)


def count_samples(path: str) -> int:
    """How many samples `read_shard` finds; only the headers of a shard are read. Raises as it for a damaged file."""
    count, key, counted = 0, "", True
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                this, ending = _key(member.name)
                if not member.isfile():
                    continue
                if this != key:
                    key, counted = this, False
                if not counted and (ending in EXTENSIONS or ending in TEXTS):
                    count, counted = count + 1, True
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path} is not a readable .tar file ({error})") from error
    return count


def _key(name: str) -> tuple[str, str]:
    """Key and ending of a member: webdataset's key ends at the first full stop of the file's own name."""
    at = PurePosixPath(name)
    stem = at.name.split(".", 1)[0]
    return str(at.parent / stem), at.name[len(stem) :].lower()


def _sample(path: str, key: str, parts: dict[str, bytes]) -> Sample:
    name = f"{path}/{key}"
    image = next((parts[e] for e in EXTENSIONS if e in parts), None)
    if image is None:
        raise ValueError(f"{name} has no image; it has {', '.join(parts)}, known are {', '.join(EXTENSIONS)}")
    text = next((parts[e].decode("utf-8", errors="replace").strip() for e in TEXTS[:2] if e in parts), "")
    if not text and ".json" in parts:
        try:
            about = json.loads(parts[".json"])
            text = str(about.get("caption") or about.get("text") or "").strip()
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{name}.json is not a JSON object ({error})") from None
    if not text:
        raise ValueError(f"{name} has no text: expected a .txt or .caption member, or a caption in .json")
    return Sample(name, (text,), image)


@dataclass(frozen=True)
class Shards:
    """Shards as pictures by number, for evaluation: they are read once, and kept as bytes. Training streams them."""

    paths: Sequence[str]

    @cached_property
    def samples(self) -> list[Sample]:
        """All samples of all shards, in order."""
        return [sample for path in self.paths for sample in read_shard(path)]

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, index: int) -> Image:
        """Decode one."""
        return self.samples[index].load()

    def name(self, index: int) -> str:
        """Shard and key of one."""
        return self.samples[index].name

    def texts(self, index: int) -> Sequence[str]:
        """The texts of one."""
        return self.samples[index].texts

    def group(self, index: int) -> int:
        """Every sample by itself."""
        return index
