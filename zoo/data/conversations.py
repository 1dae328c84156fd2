"""Conversations about images: LLaVA's JSON files, and drawn digits with questions and answers.

    [{"id": "7", "image": "a/b.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"},
                                                       {"from": "gpt", "value": "A cat."}]}, ...]

"image" may be a list, or missing where nothing is shown; each has its "<image>" in a question, in the same order. The
names of chat services are understood too: "messages" of "role" and "content", which is a text or a list of
{"type": "text", "text": ...} and {"type": "image", "image": path}, and "images".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .captions import IMAGE_TOKEN, Scenes
from .corpus import SPLITS, json_lines
from .images import ALIASES
from .pictures import in_mode, open_picture, picture_size

if TYPE_CHECKING:
    from PIL.Image import Image

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
ENDINGS = (".json", ".jsonl")


@dataclass(frozen=True)
class Conversation:
    """Turns of (role, text), the roles being "system", "user" and "assistant", and the images they are about."""

    name: str
    images: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]


class ConversationSource(Protocol):
    """The conversations of a split by number."""

    def __len__(self) -> int: ...

    def conversation(self, index: int) -> Conversation:
        """What is said."""
        ...

    def sizes(self, index: int) -> list[tuple[int, int]]:
        """Width and height of every image."""
        ...

    def load(self, index: int) -> list[Image]:
        """The images in RGB, in the order of the conversation; ValueError naming one that cannot be read."""
        ...

    @property
    def fingerprint(self) -> str:
        """Different for other conversations."""
        ...


def parse(record: Any, where: str) -> Conversation:
    """A record of LLaVA's, or with the names of chat services, as a conversation.

    Raises ValueError naming `where` for one without an answer, whose turns do not alternate, or whose "<image>"s are
    not as many as its images. What is said before the first question, other than by the system, is left out, as LLaVA
    does with conversations that begin in the middle.
    """
    said = record.get("conversations", record.get("messages")) if isinstance(record, Mapping) else None
    if not isinstance(said, list):
        raise ValueError(f'{where}: expected a record with a list "conversations" or "messages"')
    name = f"{where} (id {record['id']})" if "id" in record else where
    given = record.get("image", record.get("images"))
    inside: list[str] = []
    turns = [_turn(turn, name, inside) for turn in said]
    images = tuple(inside) if given is None else (given,) if isinstance(given, str) else tuple(given)
    system = [turn for turn in turns[:1] if turn[0] == "system"]
    rest = turns[len(system) :]
    if rest and rest[0][0] == "assistant":
        rest = rest[1:]
    for number, (role, _) in enumerate(rest):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            raise ValueError(f"{name}: turn {len(turns) - len(rest) + number} is by {role}, expected {expected}")
    if not rest or rest[-1][0] != "assistant":
        raise ValueError(f"{name}: {'ends with a question' if rest else 'has no question'}, expected an answer to it")
    for role, text in rest:
        if role == "assistant" and not text.strip():
            raise ValueError(f"{name}: an answer is empty")
        if role == "assistant" and IMAGE_TOKEN in text:
            raise ValueError(f"{name}: {IMAGE_TOKEN} stands in an answer; images belong to questions")
    shown = sum(text.count(IMAGE_TOKEN) for _, text in (*system, *rest))
    if shown != len(images):
        raise ValueError(f"{name}: {IMAGE_TOKEN} stands {shown} times in the text, but there are {len(images)} images")
    return Conversation(name, images, (*system, *rest))


def _turn(turn: Any, name: str, images: list[str]) -> tuple[str, str]:
    """Role and text of a turn; paths of images that stand in it are added to `images`."""
    told = turn if isinstance(turn, Mapping) else {}
    role, text = told.get("from", told.get("role")), told.get("value", told.get("content"))
    if isinstance(text, list):
        text = "".join(_part(part, name, images) for part in text)
    if not isinstance(text, str):
        raise ValueError(
            f'{name}: expected turns {{"from": ..., "value": text}} or {{"role": ..., "content": text or parts}}, got '
            f"{str(turn)[:80]}"
        )
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"{name}: a turn is from {role!r}, expected one of {', '.join(ROLES)}")
    return ROLES[role], text


def _part(part: Any, name: str, images: list[str]) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind == "image":
        if isinstance(path := part.get("image", part.get("path")), str):
            images.append(path)
        return f"{IMAGE_TOKEN}\n"
    raise ValueError(f"{name}: expected parts of type text or image, got {str(part)[:80]}")


@dataclass(frozen=True)
class FileConversations:
    """Conversations out of a file, with images from a folder."""

    conversations: Sequence[Conversation]
    folder: Path

    def __len__(self) -> int:
        return len(self.conversations)

    def conversation(self, index: int) -> Conversation:
        """One of them."""
        return self.conversations[index]

    def sizes(self, index: int) -> list[tuple[int, int]]:
        """Read from the head of each file."""
        return [read_image(self.folder / path, picture_size) for path in self.conversations[index].images]

    def load(self, index: int) -> list[Image]:
        """Decode them."""
        paths = self.conversations[index].images
        return [read_image(self.folder / path, lambda file: in_mode(open_picture(file), "RGB")) for path in paths]

    @property
    def fingerprint(self) -> str:
        """Of all that is said, and of the images' names."""
        digest = hashlib.sha256(str(self.folder.resolve()).encode())
        for conversation in self.conversations:
            digest.update(repr((conversation.images, conversation.turns)).encode())
        return digest.hexdigest()[:16]


def read_image(path: Path, read: Callable[[Path], Any]) -> Any:
    """What `read` makes of an image; raises ValueError naming one that cannot be read."""
    try:
        return read(path)
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{path} is not a readable image ({error})") from error


@dataclass(frozen=True)
class SceneConversations:
    """Conversations of `turns` questions about drawn pictures; `asked` is how a question must begin."""

    scenes: Scenes
    turns: int = 3
    asked: str = ""

    def __len__(self) -> int:
        return len(self.scenes)

    def conversation(self, index: int) -> Conversation:
        """The questions of one picture."""
        record = self.scenes.conversation(index, self.turns, self.asked)
        return parse({"conversations": record["conversations"], "image": record["id"]}, record["id"])

    def sizes(self, index: int) -> list[tuple[int, int]]:
        """The same for all."""
        return [self.scenes.size]

    def load(self, index: int) -> list[Image]:
        """The picture."""
        return [self.scenes.load(index).convert("RGB")]

    @property
    def fingerprint(self) -> str:
        """Of all that decides what is drawn and asked."""
        s = self.scenes
        return repr((s.split, s.count, s.grid, s.fewest, s.most, s.seed, len(s.labels), self.turns, self.asked))


@dataclass(frozen=True)
class Conversations:
    """Conversations by split; a split that has none is left out."""

    origin: str
    splits: Mapping[str, ConversationSource]

    @property
    def description(self) -> str:
        """What it is, and how many conversations each split has."""
        sizes = ", ".join(f"{len(self.splits[s])} {s}" for s in SPLITS if s in self.splits)
        return f"{self.origin}: {sizes} conversations"

    def split(self, name: str) -> ConversationSource:
        """Conversations of "train", "val" or "test"; raises ValueError when there are none."""
        if name not in self.splits:
            raise ValueError(f"{self.origin} has no conversations to {name} on")
        return self.splits[name]


def open_conversations(source: str, images: str | None = None, held_out: float = 0.1) -> Conversations:
    """Conversations of a .json or .jsonl file, or of a folder with train.json, val.json and test.json.

    images is the folder that the records' paths begin in, by default the one of the file. Of a source without them, val
    and test get a share `held_out` each, by the image, so that none is in two splits. Raises FileNotFoundError and
    ValueError for what is not there, naming record and file, before any image is decoded.
    """
    path = Path(source)
    if not 0 <= held_out < 0.5:
        raise ValueError(f"held_out must be at least 0 and below 0.5, got {held_out}")
    if images is not None and not Path(images).is_dir():
        raise FileNotFoundError(f"there is no folder of images {images!r}")
    files = _files(path)
    root = Path(images) if images is not None else path if path.is_dir() else path.parent
    found = {split: list(_read(file, root)) for split, file in files.items()}
    if "train" in found:
        missing = [split for split in ("val", "test") if split not in found]
        found |= _held_out(found["train"], missing, held_out)
    return Conversations(source, {split: FileConversations(rows, root) for split, rows in found.items() if rows})


def _files(path: Path) -> dict[str, Path]:
    if path.is_file():
        if path.suffix not in ENDINGS:
            raise ValueError(f"{path}: expected a file of conversations that ends in {' or '.join(ENDINGS)}")
        return {"train": path}
    if not path.is_dir():
        raise FileNotFoundError(f"there is no file or folder of conversations {str(path)!r}")
    there = {file.stem: file for file in sorted(path.iterdir()) if file.suffix in ENDINGS}
    files = {split: there[name] for split in SPLITS for name in ALIASES[split] if name in there}
    if not files:
        raise ValueError(f"{path}: expected train.json, val.json or test.json (or .jsonl) in it")
    return files


def _read(file: Path, root: Path) -> Iterator[Conversation]:
    checked: set[str] = set()
    for number, record in _records(file):
        conversation = parse(record, f"{file}, record {number}")
        for image in conversation.images:
            if image not in checked and not (root / image).is_file():
                raise FileNotFoundError(f"{conversation.name}: there is no image {str(root / image)!r}")
            checked.add(image)
        yield conversation


def _records(file: Path) -> Iterator[tuple[int, Any]]:
    text = file.read_text(encoding="utf-8")
    try:
        if file.suffix == ".json":
            records = json.loads(text)
        else:
            records = [json.loads(line) for _, line in json_lines(text)]
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(records, list) or not records:
        raise ValueError(f"{file}: expected a list of at least one record")
    return enumerate(records)


def _held_out(train: list[Conversation], missing: Sequence[str], share: float) -> dict[str, list[Conversation]]:
    """The conversations by split, those about the same image in the same one."""
    keys = {c: (c.images[0] if c.images else repr(c.turns)) for c in train}
    order = sorted(set(keys.values()), key=lambda key: hashlib.sha256(key.encode()).digest())
    size = max(round(len(order) * share), int(share > 0 and len(order) > len(missing)))
    home = {key: split for place, split in enumerate(missing) for key in order[place * size : (place + 1) * size]}
    return {split: [c for c in train if home.get(keys[c], "train") == split] for split in ("train", *missing)}
