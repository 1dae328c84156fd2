"""Pictures with captions and conversations that need no download: handwritten digits on a grid, and what is on it.

A picture is a function of the seed, its split and its number; digits of one split are on no picture of another. What a
caption says is the digits from left to right and from above to below; where there is an empty cell it does not say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..nearest import unknown
from .corpus import SPLITS

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLURALS = ("zeros", "ones", "twos", "threes", "fours", "fives", "sixes", "sevens", "eights", "nines")
TEMPLATES = ("{}", "a picture of {}", "this is {}")
IMAGE_TOKEN = "<image>"
CELL = 8  # pixels of a digit
ROWS = {1: ("",), 2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
COLUMNS = {1: ("",), 2: ("left", "right"), 3: ("left", "middle", "right")}


@dataclass(frozen=True)
class Scene:
    """What is on a picture: the digit of every cell, row by row, None for an empty one."""

    cells: tuple[tuple[int | None, ...], ...]

    @property
    def rows(self) -> list[list[int]]:
        """The digits of every row that has any, from above."""
        return [row for row in ([d for d in cells if d is not None] for cells in self.cells) if row]

    @property
    def digits(self) -> list[int]:
        """All digits in reading order."""
        return [digit for row in self.rows for digit in row]

    @property
    def key(self) -> int:
        """A number that scenes have in common whose captions mean the same."""
        found = 0
        for row in self.rows:
            for digit in row:
                found = found * 12 + digit + 1
            found = found * 12 + 11
        return found

    def captions(self) -> list[str]:
        """All captions: in reading order and against it, in every template; the first is the plain one."""
        forth = " above ".join(" left of ".join(map(with_article, row)) for row in self.rows)
        back = " below ".join(" right of ".join(map(with_article, row[::-1])) for row in self.rows[::-1])
        return list(dict.fromkeys(t.format(text) for t in TEMPLATES for text in (forth, back)))

    def questions(self) -> list[tuple[str, str]]:
        """All questions with their answers, the same questions for every scene of a grid but for the digits asked."""
        found = [
            ("what is in the picture?", self.captions()[0]),
            ("how many digits are there?", NUMBERS[len(self.digits)]),
            ("which digit is the largest?", NUMBERS[max(self.digits)]),
        ]
        for digit in range(10):
            count = self.digits.count(digit)
            found.append((f"how many {PLURALS[digit]} are there?", NUMBERS[count]))
            found.append((f"is there {with_article(digit)}?", "yes" if count else "no"))
        for y, cells in enumerate(self.cells):
            for x, cell in enumerate(cells):
                found.append((f"which digit is {place(y, x, len(cells))}?", "none" if cell is None else NUMBERS[cell]))
        return found


def place(y: int, x: int, grid: int) -> str:
    """Words for a cell of a grid x grid picture, such as "at the top left"."""
    row, column = ROWS[grid][y], COLUMNS[grid][x]
    return "in the centre" if row == column else f"at the {row} {column}"


def words(text: str) -> list[str]:
    """Words of a caption, question or answer, question marks apart."""
    return text.replace("?", " ?").split()


def with_article(digit: int) -> str:
    """A digit's word after "a" or "an"."""
    return f"an {NUMBERS[digit]}" if digit == 8 else f"a {NUMBERS[digit]}"


@dataclass(frozen=True)
class Scenes:
    """`count` pictures of a split: load, texts, names and groups as `zoo.data.pairs.PairSource` has them.

    pixels [N, 8, 8] uint8 and labels [N] are the handwriting of the split; a picture has fewest to most digits.
    """

    split: str
    count: int
    pixels: np.ndarray
    labels: np.ndarray
    grid: int
    fewest: int
    most: int
    seed: int

    def __len__(self) -> int:
        return self.count

    def _drawn(self, index: int) -> tuple[Scene, dict[tuple[int, int], int]]:
        """The scene of a picture, and whose handwriting is in which cell; all else is derived from these."""
        import numpy as np

        random = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        number = int(random.integers(self.fewest, self.most + 1))
        cells = random.permutation(self.grid**2)[:number]
        # The digit first and then a hand: classes are alike in number, whatever the data set has.
        hands = [int(random.choice(self._by_digit[int(random.integers(10))])) for _ in cells]
        where = {divmod(int(cell), self.grid): hand for cell, hand in zip(cells, hands)}
        found = [
            tuple(int(self.labels[where[y, x]]) if (y, x) in where else None for x in range(self.grid))
            for y in range(self.grid)
        ]
        return Scene(tuple(found)), where

    @cached_property
    def _by_digit(self) -> list[np.ndarray]:
        import numpy as np

        return [np.flatnonzero(self.labels == digit) for digit in range(10)]

    def scene(self, index: int) -> Scene:
        """What is on a picture."""
        return self._drawn(index)[0]

    def load(self, index: int) -> Image:
        """The picture, grey, 8 pixels a cell."""
        import numpy as np
        from PIL import Image

        canvas = np.zeros((self.grid * CELL, self.grid * CELL), dtype=np.uint8)
        for (y, x), hand in self._drawn(index)[1].items():
            canvas[y * CELL : (y + 1) * CELL, x * CELL : (x + 1) * CELL] = self.pixels[hand]
        return Image.fromarray(canvas)

    def name(self, index: int) -> str:
        """Where a picture is from."""
        return f"{self.split} picture {index}"

    def texts(self, index: int) -> Sequence[str]:
        """All captions of a picture, the plain one first."""
        return self.scene(index).captions()

    def group(self, index: int) -> int:
        """The same number for pictures whose captions mean the same."""
        return self.scene(index).key

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of a picture."""
        return self.grid * CELL, self.grid * CELL

    def conversation(self, index: int, turns: int = 3, asked: str = "") -> dict[str, Any]:
        """A record as LLaVA has them: "id", and "conversations" of {"from": "human" or "gpt", "value": text}.

        The first question begins with "<image>" and a line end; which `turns` questions are asked, of those that begin
        with `asked`, depends on the seed and the number of the picture. Half of the digits that are asked about are on
        the picture. Raises ValueError where there are fewer questions.
        """
        import numpy as np

        random = np.random.default_rng([self.seed, SPLITS.index(self.split), index, 1])
        scene = self.scene(index)
        questions = [pair for pair in scene.questions() if pair[0].startswith(asked)]
        if len(questions) < turns:
            raise ValueError(f"{self.name(index)}: {turns} questions wanted, {len(questions)} begin with {asked!r}")
        present = {PLURALS[d] for d in scene.digits} | {NUMBERS[d] for d in scene.digits}
        by_digit = [(q, a) for q, a in questions if {*words(q)} & {*NUMBERS, *PLURALS}]
        there = [pair for pair in by_digit if {*words(pair[0])} & present]
        absent = [pair for pair in by_digit if pair not in there]
        rest = [pair for pair in questions if pair not in by_digit]
        talk = []
        for turn in range(turns):
            # Not by what is left over: the order of questions would tell which digits are on the picture.
            share = [(len(pool) > 0) * part for pool, part in ((rest, 2), (there, 1), (absent, 1))]
            pool = (rest, there, absent)[int(random.choice(3, p=[part / sum(share) for part in share]))]
            question, answer = pool.pop(int(random.integers(len(pool))))
            talk.append({"from": "human", "value": f"{IMAGE_TOKEN}\n{question}" if turn == 0 else question})
            talk.append({"from": "gpt", "value": answer})
        return {"id": self.name(index), "conversations": talk}


def digit_scenes(
    grid: int = 2,
    digits: tuple[int, int] = (1, 2),
    pictures: Mapping[str, int] | None = None,
    seed: int = 0,
    held_out: float = 0.1,
) -> dict[str, Scenes]:
    """Pictures of scikit-learn's digits by split: `digits` (fewest, most) of them on a grid x grid picture.

    pictures are how many each split has, by default 20,000 to train and 1,000 to val and test. held_out is the share of
    the handwriting that val and test get each, as in `zoo.data.images.digits`. Raises ValueError for what does not fit.
    """
    import numpy as np

    from .images import digits as handwriting

    fewest, most = digits
    if grid not in ROWS:
        raise ValueError(f"grid must be 1, 2 or 3, got {grid}")
    if not 1 <= fewest <= most <= grid**2:
        raise ValueError(f"digits must be at least 1 and at most {grid**2}, the cells of the grid, got {list(digits)}")
    if not 0 < held_out < 0.5:
        raise ValueError(f"held_out must be above 0 and below 0.5, got {held_out}")
    for name in pictures or {}:
        if name not in SPLITS:
            raise unknown("split of pictures", name, SPLITS)
    counts = {"train": 20_000, "val": 1_000, "test": 1_000, **(pictures or {})}
    images, found = handwriting(held_out), {}
    for split in SPLITS:
        part = images.split(split)
        pixels = np.stack([np.asarray(part.load(i)) for i in range(len(part))])
        labels = np.array(part.labels)
        found[split] = Scenes(split, counts[split], pixels, labels, grid, fewest, most, seed)
    return found


def vocabulary(grid: int = 3) -> list[str]:
    """The words of all captions, questions and answers, whatever is on a picture of this grid or a smaller one."""
    found: set[str] = set()
    for size in range(1, grid + 1):
        for digit in range(10):
            full = [[digit] * size for _ in range(size)]
            alone: list[list[int | None]] = [[None] * size for _ in range(size)]
            alone[0][0] = digit
            for cells in (full, alone):
                scene = Scene(tuple(tuple(row) for row in cells))
                texts = [*scene.captions(), *(text for pair in scene.questions() for text in pair)]
                found |= {word for text in texts for word in words(text)}
    return sorted(found)
