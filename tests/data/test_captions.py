"""Drawn pictures: what they show is what their captions and conversations say, and splits share no handwriting."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from zoo.data.captions import NUMBERS, PLURALS, Scene, Scenes, digit_scenes, vocabulary, words
from zoo.data.images import digits

SMALL = {"train": 60, "val": 20, "test": 20}


def open_scenes(**options: Any) -> dict[str, Scenes]:
    return digit_scenes(**{"pictures": SMALL, **options})


def test_a_caption_says_what_is_there_in_both_orders() -> None:
    scene = Scene(((7, None), (2, 8)))
    assert scene.captions()[0] == "a seven above a two left of an eight"
    assert "an eight right of a two below a seven" in scene.captions()
    assert "a picture of a seven above a two left of an eight" in scene.captions()
    assert Scene(((None, 7), (None, None))).captions()[:2] == ["a seven", "a picture of a seven"]
    assert Scene(((None, 7), (2, None))).captions() == Scene(((7, None), (2, None))).captions()


@pytest.mark.parametrize(("grid", "number"), [(1, (1, 1)), (2, (1, 4)), (3, (2, 9))])
def test_what_is_drawn_is_what_is_said(grid: int, number: tuple[int, int]) -> None:
    handwriting = digits()
    known = {split: {} for split in SMALL}  # type: dict[str, dict[bytes, int]]
    for split in SMALL:
        part = handwriting.split(split)
        for i in range(len(part)):
            known[split][np.asarray(part.load(i)).tobytes()] = part.labels[i]
    for split, scenes in open_scenes(grid=grid, digits=number).items():
        for i in range(len(scenes)):
            picture, scene = np.asarray(scenes.load(i)), scenes.scene(i)
            assert picture.shape == (8 * grid, 8 * grid)
            for y in range(grid):
                for x in range(grid):
                    cell = np.ascontiguousarray(picture[8 * y : 8 * y + 8, 8 * x : 8 * x + 8])
                    # The handwriting of this split alone: a digit of another would not be found.
                    assert (known[split][cell.tobytes()] if cell.any() else None) == scene.cells[y][x]
            assert number[0] <= len(scene.digits) <= number[1]


def test_pictures_depend_on_the_seed_split_and_number_alone() -> None:
    first, again, other = open_scenes(), open_scenes(pictures={**SMALL, "train": 90}), open_scenes(seed=1)
    for split in SMALL:
        assert all(np.array_equal(first[split].load(i), again[split].load(i)) for i in range(20))
        assert [first[split].conversation(i) for i in range(9)] == [again[split].conversation(i) for i in range(9)]
    texts = [tuple(scenes["train"].texts(i) for i in range(60)) for scenes in (first, other)]
    assert texts[0] != texts[1]
    assert [first["train"].scene(i) for i in range(20)] != [first["val"].scene(i) for i in range(20)]


def test_pictures_of_the_same_meaning_have_one_group() -> None:
    scenes = digit_scenes(digits=(1, 3), pictures={"train": 3000})["train"]
    plain = [scenes.texts(i)[0] for i in range(3000)]
    groups = [scenes.group(i) for i in range(3000)]
    assert len(set(zip(plain, groups))) == len(set(plain)) == len(set(groups)) < 3000


def answer(scene: Scene, question: str) -> str:
    """By looking at the cells, one question at a time."""
    asked, cells = words(question), [cell for row in scene.cells for cell in row]
    here = Counter(cell for cell in cells if cell is not None)
    if asked[:2] == ["how", "many"]:
        return NUMBERS[sum(here.values()) if asked[2] == "digits" else here[PLURALS.index(asked[2])]]
    if asked[:2] == ["is", "there"]:
        return "yes" if here[NUMBERS.index(asked[3])] else "no"
    if "largest" in asked:
        return NUMBERS[max(here)]
    if "picture" in asked:
        return scene.captions()[0]
    y, x = ("top", "bottom").index(asked[5]), ("left", "right").index(asked[6])
    return "none" if scene.cells[y][x] is None else NUMBERS[scene.cells[y][x] or 0]


def test_conversations_are_llavas_and_true() -> None:
    scenes = digit_scenes(digits=(1, 4), pictures={"train": 300})["train"]
    asked = Counter()
    for i in range(300):
        record = scenes.conversation(i, turns=4)
        talk = record["conversations"]
        assert [turn["from"] for turn in talk] == ["human", "gpt"] * 4
        assert talk[0]["value"].startswith("<image>\n")
        assert sum("<image>" in turn["value"] for turn in talk) == 1
        questions = [turn["value"].removeprefix("<image>\n") for turn in talk[::2]]
        assert len(set(questions)) == 4
        for question, reply in zip(questions, talk[1::2]):
            assert reply["value"] == answer(scenes.scene(i), question)
            asked[question.split()[0], reply["value"] in ("no", "zero", "none")] += 1
    assert min(asked["how", False], asked["how", True], asked["is", False], asked["is", True]) > 40


def test_the_vocabulary_holds_every_word() -> None:
    known = set(vocabulary())
    for scenes in open_scenes(grid=3, digits=(1, 9)).values():
        for i in range(len(scenes)):
            said = [turn["value"].removeprefix("<image>\n") for turn in scenes.conversation(i, 8)["conversations"]]
            assert {word for text in [*scenes.texts(i), *said] for word in words(text)} <= known


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"grid": 4}, "1, 2 or 3"),
        ({"digits": (2, 5)}, "at most 4"),
        ({"digits": (0, 1)}, "at least 1"),
        ({"held_out": 0}, "held_out"),
    ],
)
def test_a_wrong_option_is_named(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        digit_scenes(**wrong)
