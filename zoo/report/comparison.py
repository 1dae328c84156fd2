"""The mixture of experts against its dense twin: which figures are compared, and how."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .run import Row, at


@dataclass(frozen=True)
class Point:
    """Both models' figure, less being better, at the same `place`: a number of steps, or of seconds of training."""

    place: float
    moe: float
    dense: float

    @property
    def gain(self) -> float:
        """How much less the mixture of experts needs, as a share of the dense twin's; negative when it needs more."""
        return 1 - self.moe / self.dense

    @property
    def astray(self) -> str:
        """Whose figure is not finite, so that there is nothing to compare; empty where both are."""
        figures = {"the mixture of experts": self.moe, "the dense twin": self.dense}
        return " and ".join(who for who, value in figures.items() if not math.isfinite(value))


def equal_steps(moe: list[Row], dense: list[Row], key: str = "bits_per_byte") -> Point | None:
    """At the last step at which both were evaluated, if there is one."""
    common = {row["step"] for row in moe} & {row["step"] for row in dense}
    if not common:
        return None
    step = max(common)
    return Point(step, at(moe, "step", key, step), at(dense, "step", key, step))


def equal_time(moe: list[Row], dense: list[Row], key: str = "bits_per_byte") -> Point | None:
    """At the training time that both reached, on the line between the evaluations around it."""
    if not moe or not dense:
        return None
    seconds = min(moe[-1]["seconds"], dense[-1]["seconds"])
    return Point(seconds, at(moe, "seconds", key, seconds), at(dense, "seconds", key, seconds))


def speed(rows: list[Row]) -> float:
    """Tokens a second over a whole training."""
    return rows[-1]["tokens"] / max(rows[-1]["seconds"], 1e-9) if rows else 0.0


def points(curves: dict[str, list[Row]], key: str) -> list[tuple[Point, str]]:
    """Figures of "moe" and "dense" at equal steps and at equal time, with words for where that is."""
    steps, time = (compare(curves["moe"], curves["dense"], key) for compare in (equal_steps, equal_time))
    found = [(steps, f"at equal steps ({steps.place:.0f})")] if steps else []
    return found + ([(time, f"at equal training time ({time.place:.0f} s)")] if time else [])
