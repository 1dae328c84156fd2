"""LLaVA's JSON, and drawn pictures with questions, as conversations: what is read, split and refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from zoo.data.captions import NUMBERS, PLURALS, digit_scenes
from zoo.data.conversations import SceneConversations, open_conversations, parse


def record(*turns: str, **more) -> dict:
    """Turns by human and gpt in turn."""
    who = ("human", "gpt")
    return {**more, "conversations": [{"from": who[i % 2], "value": text} for i, text in enumerate(turns)]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for number in range(20):
        Image.new("L", (10 + number, 8), number).save(tmp_path / "pictures" / f"{number}.png")
    return tmp_path


def test_a_file_is_split_by_the_image_and_read_as_it_is(folder: Path) -> None:
    records = [
        record("<image>\nWhat?", f"It is {i}.", f"Sure, {j}?", "Yes.", id=f"{i}-{j}", image=f"pictures/{i}.png")
        for i in range(20)
        for j in range(3)
    ]
    (folder / "all.json").write_text(json.dumps(records))
    found = open_conversations(str(folder / "all.json"), held_out=0.2)
    assert found.description.endswith("all.json: 36 train, 12 val, 12 test conversations")
    parts = {split: found.split(split) for split in ("train", "val", "test")}
    images = {s: {p.conversation(i).images for i in range(len(p))} for s, p in parts.items()}
    assert not images["train"] & images["val"] | images["train"] & images["test"] | images["val"] & images["test"]
    said = {p.conversation(i).turns for p in parts.values() for i in range(len(p))}
    assert said == {
        tuple((t["from"].replace("human", "user").replace("gpt", "assistant"), t["value"]) for t in r["conversations"])
        for r in records
    }
    one = parts["val"].conversation(0)
    number = int(re.findall(r"\d+", one.images[0])[0])
    assert parts["val"].sizes(0) == [(10 + number, 8)]
    assert parts["val"].load(0)[0].getpixel((0, 0)) == (number,) * 3


def test_a_line_separator_inside_a_text_ends_no_line(folder: Path) -> None:
    rows = [json.dumps(record("Why?\u2028Say.", f"So {i}.\u0085"), ensure_ascii=False) for i in range(4)]
    (folder / "all.jsonl").write_text("\n".join(rows), encoding="utf-8")
    found = open_conversations(str(folder / "all.jsonl"), held_out=0).split("train")
    assert [found.conversation(i).turns[1][1] for i in range(len(found))] == [f"So {i}.\u0085" for i in range(4)]


def test_a_folder_has_its_own_splits_and_images_elsewhere(folder: Path) -> None:
    (folder / "talk").mkdir()
    for split, count in (("train", 3), ("validation", 2)):
        rows = [record("<image> and <image>?", "No.", image=[f"{i}.png", "0.png"]) for i in range(count)]
        (folder / "talk" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    found = open_conversations(str(folder / "talk"), images=str(folder / "pictures"), held_out=0)
    assert {split: len(part) for split, part in found.splits.items()} == {"train": 3, "val": 2}
    assert [image.size for image in found.split("train").load(2)] == [(12, 8), (10, 8)]
    with pytest.raises(ValueError, match="no conversations to test on"):
        found.split("test")


def test_what_precedes_the_first_question_is_left_out_but_the_system() -> None:
    talk = {"conversations": [{"from": "gpt", "value": "Hi."}, *record("A?", "B.")["conversations"]]}
    assert parse(talk, "x").turns == (("user", "A?"), ("assistant", "B."))
    system = {"conversations": [{"from": "system", "value": "Be brief."}, *record("A?", "B.")["conversations"]]}
    assert parse(system, "x").turns[0] == ("system", "Be brief.")


def test_the_names_of_chat_services_say_the_same() -> None:
    ours = parse(record("<image>\nWhat?", "This.", "<image>\nAnd <image>\nthat?", "Those.", image=["a", "b", "c"]), "x")
    flat = [{"role": role, "content": text} for role, text in ours.turns]
    assert parse({"messages": flat, "images": ["a", "b", "c"]}, "x") == ours

    def shown(path: str) -> dict:
        return {"type": "image", "image": path}

    def said(text: str) -> dict:
        return {"type": "text", "text": text}

    parts = [
        {"role": "user", "content": [shown("a"), said("What?")]},
        {"role": "assistant", "content": "This."},
        {"role": "user", "content": [shown("b"), said("And "), shown("c"), said("that?")]},
        {"role": "assistant", "content": [said("Those.")]},
    ]
    assert parse({"messages": parts}, "x") == ours
    unnamed = [
        {**turn, "content": [{"type": "image"} if p == shown("a") else p for p in turn["content"]]}
        for turn in parts[:1]
    ]
    assert parse({"messages": [*unnamed, parts[1]], "images": ["a"]}, "x").images == ("a",)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "expected parts of type text or image"),
        ({"messages": [{"role": "user", "content": 3}]}, "expected turns"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "a"}]},
            "1 times",
        ),
        ([], "expected a record"),
        ({"image": "a.png"}, 'a list "conversations" or "messages"'),
        (record("<image>\nWhat?", id=7, image="a.png"), r"x \(id 7\): ends with a question, expected an answer"),
        (record("What?", "This.", "And?"), "ends with a question"),
        ({"conversations": []}, "has no question, expected an answer"),
        (record("What?", " "), "an answer is empty"),
        (record("What?", "See <image>.", image="a.png"), "<image> stands in an answer"),
        (record("What?", "This.", image="a.png"), "<image> stands 0 times in the text, but there are 1 images"),
        (record("<image><image>", "This.", image="a.png"), "stands 2 times in the text, but there are 1 images"),
        (record("<image>", "This."), "stands 1 times in the text, but there are 0 images"),
        ({"conversations": [{"from": "human", "value": "a"}] * 2}, "turn 1 is by user, expected assistant"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, "a turn is from 'robot', expected one of human"),
        ({"conversations": [{"from": "human", "text": "a"}]}, "expected turns"),
    ],
)
def test_what_is_wrong_with_a_record_is_said(given, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(given, "x")


def test_what_is_wrong_with_a_source_is_said(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file or folder of conversations"):
        open_conversations(str(folder / "none.json"))
    with pytest.raises(ValueError, match=r"expected train\.json"):
        open_conversations(str(folder / "pictures"))
    with pytest.raises(FileNotFoundError, match="no folder of images"):
        open_conversations(str(folder), images="nowhere")
    for name, text, message in (
        ("a.json", "{", "a.json is not JSON"),
        ("b.jsonl", "{}\n[", "b.jsonl is not JSON"),
        ("c.json", "[]", "at least one record"),
        ("d.txt", "[]", r"ends in \.json"),
    ):
        (folder / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            open_conversations(str(folder / name))
    (folder / "e.json").write_text(json.dumps([record("a", "b"), record("<image>", "b", image="pictures/99.png")]))
    with pytest.raises(FileNotFoundError, match=r"e\.json, record 1: there is no image .*99\.png"):
        open_conversations(str(folder / "e.json"))
    (folder / "pictures" / "0.png").write_bytes(b"no picture")
    (folder / "f.json").write_text(json.dumps([record("<image>", "b", image="pictures/0.png")]))
    damaged = open_conversations(str(folder / "f.json"), held_out=0).split("train")
    for read in (damaged.load, damaged.sizes):
        with pytest.raises(ValueError, match=r"0\.png is not a readable image"):
            read(0)


def test_drawn_pictures_are_asked_about_what_is_on_them() -> None:
    scenes = digit_scenes(digits=(1, 4), pictures={"train": 60})["train"]
    source = SceneConversations(scenes, turns=4, asked="how many")
    for index in range(60):
        talk = source.conversation(index)
        drawn = scenes.scene(index).digits
        assert len(talk.images) == len(source.load(index)) == 1
        assert source.sizes(index) == [source.load(index)[0].size]
        for (_, question), (_, answer) in zip(talk.turns[::2], talk.turns[1::2], strict=True):
            what = re.fullmatch(r"(?:<image>\n)?how many (\w+) are there\?", question)[1]
            count = len(drawn) if what == "digits" else drawn.count(PLURALS.index(what))
            assert answer == NUMBERS[count]
    with pytest.raises(ValueError, match="12 questions wanted, 11 begin with 'how many'"):
        SceneConversations(scenes, turns=12, asked="how many").conversation(0)
