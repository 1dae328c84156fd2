"""What a run left in its folder."""

from __future__ import annotations

import csv
import json
from bisect import bisect_left
from pathlib import Path
from typing import Any

Row = dict[str, float]


class Run:
    """A demo's folder; raises ValueError when `folder` is none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.facts = json.loads((folder / "demo.json").read_text())
        except FileNotFoundError:
            raise ValueError(f"{folder} holds no run of zoo demo: there is no {folder / 'demo.json'}") from None
        except ValueError as error:
            raise ValueError(f"{folder / 'demo.json'} is not JSON: {error}") from None

    def table(self, *path: str) -> list[Row]:
        """Rows of a CSV file of numbers; none when there is no such file."""
        file = self.folder.joinpath(*path)
        if not file.exists():
            return []
        with file.open(newline="") as lines:
            # A row that was being written when the run was killed has fields without a value.
            return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(lines) if all(row.values())]

    def document(self, *path: str) -> Any:
        """Content of a JSON file, or None when there is no such file."""
        file = self.folder.joinpath(*path)
        return json.loads(file.read_text()) if file.exists() else None


def at(rows: list[Row], x: str, y: str, value: float) -> float:
    """y where x is `value`, on the straight line between the two rows around it; the nearest row's outside."""
    xs = [row[x] for row in rows]
    right = bisect_left(xs, value)
    if right == 0 or right == len(rows):
        return rows[min(right, len(rows) - 1)][y]
    if xs[right] == value:  # whatever the row before holds, not a number perhaps
        return rows[right][y]
    low, high = rows[right - 1], rows[right]
    share = (value - low[x]) / (high[x] - low[x])
    return low[y] + share * (high[y] - low[y])


def smooth(rows: list[Row], y: str, points: int = 120) -> list[Row]:
    """Means of consecutive rows, at most `points` of them: a noisy curve as thin as its picture."""
    size = -(-len(rows) // points) or 1
    chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [{**chunk[len(chunk) // 2], y: sum(row[y] for row in chunk) / len(chunk)} for chunk in chunks]
