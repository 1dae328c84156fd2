"""Pictures with texts from files and shards, their batches, and a stream of shards that can be taken up again."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from zoo.data import Loader, open_tokenizer
from zoo.data.captions import digit_scenes
from zoo.data.images_transforms import Augment, Preparation
from zoo.data.pairs import open_pairs
from zoo.data.pairs_rows import PairRows, ShardLoader, encode_texts
from zoo.data.shards import Shards, count_samples, read_shard
from zoo.data.tokenizer import learn_words

PREPARATION = Preparation(8, 1)


def image(value: int) -> Image.Image:
    return Image.new("L", (8, 8), value)


def png(value: int) -> bytes:
    out = io.BytesIO()
    image(value).save(out, "PNG")
    return out.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


def beside(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        image(i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}\n")


def content(source: Any) -> list[tuple[int, list[str]]]:
    return sorted((source.load(i).getpixel((0, 0)), list(source.texts(i))) for i in range(len(source)))


def test_a_folder_with_texts_beside_images(tmp_path: Path) -> None:
    beside(tmp_path, 30)
    pairs = open_pairs(str(tmp_path), held_out=0.2)
    assert {split: len(part) for split, part in pairs.splits.items()} == {"train": 18, "val": 6, "test": 6}
    everything = [pair for part in pairs.splits.values() for pair in content(part)]
    assert sorted(everything) == [(i, [f"picture {i}"]) for i in range(30)]
    assert "18 train, 6 val, 6 test" in pairs.description
    (tmp_path / "7.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"7\.png: there is no 7\.txt"):
        open_pairs(str(tmp_path))


def test_texts_may_begin_with_a_mark_and_those_in_another_code_are_named(tmp_path: Path) -> None:
    beside(tmp_path, 3)
    (tmp_path / "1.txt").write_text("Übung", encoding="utf-8-sig")
    [train] = open_pairs(str(tmp_path), held_out=0).splits.values()
    assert (1, ["Übung"]) in content(train)
    (tmp_path / "1.txt").write_text("Übung", encoding="latin-1")
    with pytest.raises(ValueError, match=r"1\.txt: not UTF-8 text"):
        open_pairs(str(tmp_path))


def test_a_folder_of_splits(tmp_path: Path) -> None:
    beside(tmp_path / "train", 5)
    beside(tmp_path / "validation", 3)
    pairs = open_pairs(str(tmp_path), held_out=0)
    assert {split: len(part) for split, part in pairs.splits.items()} == {"train": 5, "val": 3}
    with pytest.raises(ValueError, match="no pictures to test on"):
        pairs.split("test")


def test_tables_of_every_kind_say_the_same(tmp_path: Path) -> None:
    for i in range(4):
        image(i).save(tmp_path / f"{i}.png")
    rows = [
        (0, "nought", "train"),
        (1, 'one, "so"\nto say', "train"),
        (2, "two", "val"),
        (3, "three\u2028lines", "test"),
        (0, "zero", "train"),
    ]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([("path", "caption", "split"), *((f"{i}.png", t, s) for i, t, s in rows)])
    (tmp_path / "b.jsonl").write_text(
        "".join(
            json.dumps({"image": f"{i}.png", "text": t, "split": s, "note": "\u2028"}, ensure_ascii=False) + "\n"
            for i, t, s in rows
        ),
        encoding="utf-8",
    )
    listed = [
        {"file_name": f"{i}.png", "captions": [t for j, t, _ in rows if j == i], "split": s} for i, _, s in rows[:4]
    ]
    (tmp_path / "c.json").write_text(json.dumps(listed))
    found = []
    for name in ("a.csv", "b.jsonl", "c.json"):
        pairs = open_pairs(str(tmp_path / name))
        found.append({split: content(part) for split, part in pairs.splits.items()})
    assert found[0] == found[1] == found[2]
    assert found[0]["train"] == [(0, ["nought", "zero"]), (1, ['one, "so"\nto say'])]
    assert found[0]["test"] == [(3, ["three\u2028lines"])]
    coco = {
        "images": [{"id": 90 + i, "file_name": f"{i}.png"} for i in range(4)],
        "annotations": [{"image_id": 90 + i, "caption": t} for i, t, _ in rows],
    }
    (tmp_path / "captions.json").write_text(json.dumps(coco))
    assert content(open_pairs(str(tmp_path), held_out=0).split("train"))[0] == (0, ["nought", "zero"])


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("a.csv", "path,caption\nnowhere.png,text\n", r"a\.csv: there is no image .*nowhere\.png"),
        (
            "a.csv",
            "path,words\n0.png,text\n",
            r"a\.csv, row 2: expected one of caption, text, captions; it has path, words",
        ),
        ("a.csv", "path,caption,split\n0.png,text,tran\n", r"unknown split 'tran'"),
        ("a.csv", "path,caption\n", "lists no image"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", '{"a": 1}', "expected a list of objects"),
        (
            "a.json",
            '{"images": [{"id": 1, "file_name": "0.png"}], "annotations": [{"image_id": 7, "caption": "text"}]}',
            r"a\.json: expected COCO's images .* there is no 7",
        ),
    ],
)
def test_a_wrong_table_is_named(file: str, text: str, told: str, tmp_path: Path) -> None:
    image(0).save(tmp_path / "0.png")
    (tmp_path / file).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        open_pairs(str(tmp_path / file))


def test_a_source_that_is_none_is_named(tmp_path: Path) -> None:
    for source, told in (("digts", "did you mean digits"), ("no/where", "does not exist"), (str(tmp_path), "no image")):
        with pytest.raises((ValueError, FileNotFoundError), match=told):
            open_pairs(source)


def test_shards_are_grouped_by_key(tmp_path: Path) -> None:
    members = {
        "a/002.png": png(2),
        "a/002.txt": b"two\n",
        "a/002.cls": b"9",
        "b/002.json": b'{"caption": "another two"}',
        "b/002.png": png(3),
    }
    path = write_tar(tmp_path / "x.tar", members)
    found = [(s.name, s.texts, s.load().getpixel((0, 0))) for s in read_shard(path)]
    assert found == [(f"{path}/a/002", ("two",), 2), (f"{path}/b/002", ("another two",), 3)]
    assert count_samples(path) == 2
    assert content(Shards([path])) == [(2, ["two"]), (3, ["another two"])]


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ({"1.txt": b"text"}, r"x\.tar/1 has no image; it has \.txt"),
        ({"1.png": b"", "2.txt": b"text"}, r"x\.tar/1 has no text"),
        ({"1.png": b"", "1.json": b"{"}, r"1\.json is not a JSON object"),
    ],
)
def test_a_wrong_sample_is_named(members: dict[str, bytes], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        list(read_shard(write_tar(tmp_path / "x.tar", members)))


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    path = Path(write_tar(tmp_path / "x.tar", {"1.png": png(1), "1.txt": b"text"}))
    whole = path.read_bytes()
    for damaged in (b"not a tar at all" * 64, whole[:600], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"x\.tar is not a readable \.tar file"):
            list(read_shard(str(path)))


def test_texts_become_ids_that_begin_and_end() -> None:
    words = learn_words(["A seven above a two", "is there a two?"])
    ids, mask = encode_texts(words, ["a two?", "a seven above a two above a seven", "an owl"], 6)
    assert ids.shape == mask.shape == (3, 6)
    assert mask.sum(1).tolist() == [5, 6, 4]
    assert words.decode(ids[0].tolist()) == "a two ?"
    assert words.decode(ids[1].tolist()) == "a seven above a"
    assert (ids[:, 0] == words.start).all()
    assert ids[1, -1] == words.end
    assert (ids[~mask] == words.pad).all()
    unknown = ids[2, 1]
    assert ids[2, 2] == unknown
    assert int(ids.max()) < words.vocab_size
    ids, mask = encode_texts(words, [], 6)
    assert ids.shape == mask.shape == (0, 1)


def test_a_text_length_without_room_for_a_token_is_an_error() -> None:
    words = learn_words(["a two"])
    assert encode_texts(words, ["a two"], 3)[0].tolist() == [
        [words.start, int(words.encode(["a"])[0][0][0]), words.end]
    ]
    for length in (2, 1, 0):
        with pytest.raises(ValueError, match=rf"text_length must be at least 3, start and end .* got {length}"):
            encode_texts(words, ["a two"], length)


def test_words_do_not_depend_on_order_and_the_frequent_are_kept(tmp_path: Path) -> None:
    texts = ["b a", "c a", "b a d"]
    assert learn_words(texts).fingerprint == learn_words(texts[::-1]).fingerprint
    few = learn_words(texts, 2)
    assert few.vocab_size == 4 + 2
    few.save_pretrained(tmp_path)
    again = open_tokenizer(str(tmp_path))
    for text in ("a b c d", "B, A!"):
        (mine, _), (theirs, _) = few.encode([text])[0], again.encode([text])[0]
        assert mine.tolist() == theirs.tolist()
    assert (again.start, again.end, again.pad) == (few.start, few.end, few.pad)


def rows(augment: Augment | None = None, **options: Any) -> PairRows:
    scenes = digit_scenes(grid=1, digits=(1, 1), pictures={"train": 40})["train"]
    return PairRows(scenes, PREPARATION, open_tokenizer("bytes"), 40, augment, **options)


def test_training_takes_one_text_of_each_picture_by_seed_and_epoch() -> None:
    found = []
    for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0)):
        data = rows(Augment(), seed=seed)
        data.epoch = epoch
        batch = data.collate([data[i] for i in range(40)])
        assert batch["image"].shape == (40, 1, 8, 8)
        assert len(batch["ids"]) == 40
        texts = [open_tokenizer("bytes").decode(ids[m].tolist()) for ids, m in zip(batch["ids"], batch["mask"])]
        assert all(text in data.source.texts(i) for i, text in enumerate(texts))
        found.append(texts)
    assert found[0] == found[1]
    assert len(set(map(tuple, found))) == 3


def test_evaluation_takes_all_texts_and_stand_ins_give_nothing() -> None:
    data = rows()
    batch = data.collate([data[3], data[-1], data[4]])
    assert batch["image"].shape[0] == 2
    assert len(batch["ids"]) == len(data.source.texts(3)) + len(data.source.texts(4))
    assert batch["index"].tolist() == [3, 4]
    assert batch["group"].tolist() == [data.source.group(3), data.source.group(4)]
    assert batch["text_group"].tolist() == [data.source.group(i) for i in (3, 4) for _ in data.source.texts(i)]
    nothing = data.collate([data[-1]])
    assert [len(value) for value in nothing.values()] == [0] * 6
    sizes = [sum(len(batch["image"]) for batch in Loader(data, 7, rank=r, world_size=3)) for r in range(3)]
    assert sum(sizes) == 40


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    beside(tmp_path, 1)
    (tmp_path / "0.png").write_bytes(b"no image")
    source = open_pairs(str(tmp_path), held_out=0).split("train")
    with pytest.raises(ValueError, match=r"0\.png is not a readable image"):
        PairRows(source, PREPARATION, open_tokenizer("bytes"), 8)[0]
    shard = write_tar(tmp_path / "x.tar", {"k.png": b"no image", "k.txt": b"text"})
    loader = stream([shard], batch_size=1)
    with pytest.raises(ValueError, match=r"x\.tar/k is not a readable image"):
        next(iter(loader))


def stream(paths: list[str], batch_size: int = 4, **options: Any) -> ShardLoader:
    shards = Shards(paths)
    data = PairRows(shards, PREPARATION, open_tokenizer("bytes"), 16, Augment(), seed=3)
    return ShardLoader(shards, data, batch_size, **{"buffer": 5, **options})


def some(loader: ShardLoader, count: int) -> list[str]:
    texts = []
    for _, batch in zip(range(count), loader):
        texts += [open_tokenizer("bytes").decode(ids[m].tolist()) for ids, m in zip(batch["ids"], batch["mask"])]
        assert torch.allclose(
            batch["image"][:, 0, 0, 0], torch.tensor([int(t) / 127.5 - 1 for t in texts[-len(batch["ids"]) :]])
        )
    return texts


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Six shards of six samples: the picture's grey value is its text."""
    return [
        write_tar(
            tmp_path / f"{s}.tar",
            {f"{i}.{e}": v for i in range(6 * s, 6 * s + 6) for e, v in (("png", png(i)), ("txt", str(i).encode()))},
        )
        for s in range(6)
    ]


def test_a_stream_gives_every_sample_once_a_pass_mixed(shards: list[str]) -> None:
    found = some(stream(shards), 18)
    assert len(found) == 72
    assert sorted(found[:36], key=int) != found[:36]
    assert all(found.count(str(i)) == 2 for i in range(36))
    assert found[:36] != found[36:]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [3, 10])
def test_a_stream_goes_on_where_it_was(shards: list[str], workers: int, done: int) -> None:
    whole = some(stream(shards, num_workers=workers), 13)
    first = stream(shards, num_workers=workers)
    begun = some(first, done)
    state = first.state_dict()
    assert state == {"batches": done}
    second = stream(shards, num_workers=workers)
    second.load_state_dict(state)
    assert begun + some(second, 13 - done) == whole


def test_passes_that_are_over_are_not_read_again(shards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("zoo.data.pairs_rows.read_shard", lambda path: opened.append(path) or read_shard(path))
    loader = stream(shards, batch_size=6)
    loader.load_state_dict({"batches": 6 * 1000})
    some(loader, 6)
    assert sorted(opened) == sorted(shards)


def test_processes_read_shards_of_their_own(shards: list[str]) -> None:
    parts = [some(stream(shards, batch_size=6, rank=rank, world_size=3), 2) for rank in range(3)]
    assert sorted(int(text) for part in parts for text in part) == list(range(36))
    with pytest.raises(ValueError, match="6 shards do not go round 4 process"):
        stream(shards, rank=0, world_size=4, num_workers=2)
