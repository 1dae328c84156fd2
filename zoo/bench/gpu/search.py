"""A search among plans of tiles: from one plan, step by step, to one that no single change makes faster.

Kernels of the forward and of the backward are improved apart: a change in one does not slow the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

# Kernels that walk one list of row tiles, and so have tiles of one height.
PAIRS = (("up", "down"), ("d_hidden", "d_x"))
FORWARD = ("up", "down")
# Values to try in place of the present one, beside half and double.
OTHERS = {"warps": (4, 8), "stages": (2, 3, 4, 5), "group": (4, 8, 16)}
SMALLEST, LARGEST = {"m": 16, "n": 32, "k": 16}, {"m": 256, "n": 256, "k": 128}
LARGEST_TILE = 128 * 256
# Less is noise.
GAIN = 1.01


@dataclass(frozen=True)
class Candidate:
    """A plan that differs from the present one in the tiles of `kernels`."""

    kernels: tuple[str, ...]
    plan: Any

    @property
    def forward(self) -> bool:
        """Whether the kernels are the forward's."""
        return self.kernels[0] in FORWARD


def variations(tile: Any, described: bool) -> Iterator[Any]:
    """Tiles that differ in one thing, heights apart; described: whether the GPU has tensor descriptors."""
    for each in fields(tile):
        value = getattr(tile, each.name)
        if each.name in OTHERS:
            tried: tuple[Any, ...] = OTHERS[each.name]
        elif each.name in ("n", "k"):
            tried = tuple(v for v in (value // 2, 2 * value) if SMALLEST[each.name] <= v <= LARGEST[each.name])
        elif isinstance(value, bool) and described:
            tried = (not value,)
        else:
            continue
        for other in tried:
            changed = replace(tile, **{each.name: other})
            if other != value and changed.m * changed.n <= LARGEST_TILE:
                yield changed


def candidates(plan: Any, described: bool = True) -> list[Candidate]:
    """Each kernel's variations, then other heights for the kernels that share them."""
    found = []
    names = [each.name for each in fields(plan)]
    for name in names:
        changed = variations(getattr(plan, name), described)
        found += [Candidate((name,), replace(plan, **{name: tile})) for tile in changed]
    paired = {name for pair in PAIRS for name in pair}
    for group in (*PAIRS, *((name,) for name in names if name not in paired)):
        for factor in (0.5, 2):
            tiles = {name: getattr(plan, name) for name in group}
            tiles = {name: replace(tile, m=int(tile.m * factor)) for name, tile in tiles.items()}
            if all(SMALLEST["m"] <= t.m <= LARGEST["m"] and t.m * t.n <= LARGEST_TILE for t in tiles.values()):
                found.append(Candidate(group, replace(plan, **tiles)))
    return found


@dataclass
class Found:
    """What a search found: the best plan, seconds by direction before and after, and everything that was tried."""

    plan: Any
    before: dict[bool, float]
    after: dict[bool, float]
    tried: list[dict[str, Any]] = field(default_factory=list)
    rounds: int = 0
    whole: bool = False

    def gain(self, forward: bool) -> float:
        """How much faster the best plan is than the first."""
        return self.before[forward] / self.after[forward]


def search(
    plan: Any,
    time: Callable[[Any, bool], float],
    prepare: Callable[[Sequence[Any]], object] = lambda plans: None,
    rounds: int = 4,
    more: Callable[[], bool] = lambda: True,
    described: bool = True,
    most: int | None = None,
) -> Found:
    """Improve `plan` while a round of single changes does.

    Args:
        plan: where to begin.
        time: seconds of the forward (True) or backward (False) with a plan; may raise where a plan cannot run.
        prepare: is given the plans of a round before they are timed.
        rounds: at most so many.
        more: whether there is time to go on; asked before every plan is timed.
        described: whether the GPU has tensor descriptors.
        most: time at most so many candidates a round.
    """
    both = (True, False)
    first = {forward: time(plan, forward) for forward in both}
    found = Found(plan, first, dict(first))
    seen = {(_part(plan, forward), forward) for forward in both}
    while found.rounds < rounds and not found.whole:
        options = candidates(found.plan, described)
        unseen = [one for one in options if (_part(one.plan, one.forward), one.forward) not in seen]
        fresh = unseen[:most]
        seen |= {(_part(one.plan, one.forward), one.forward) for one in fresh}
        prepare([one.plan for one in fresh])
        timed: dict[bool, list[tuple[float, Candidate]]] = {forward: [] for forward in both}
        over = False
        for one in fresh:
            if over := not more():
                break
            seconds = _timed(found, one, time)
            if seconds is not None:
                timed[one.forward].append((seconds, one))
        start = found.plan
        for forward in both:
            _improve(found, start, timed[forward], forward, time)
            seen.add((_part(found.plan, forward), forward))
        if over:
            break
        found.rounds += 1
        found.whole = found.plan == start and fresh == unseen
    return found


def _part(plan: Any, forward: bool) -> tuple[Any, ...]:
    """The tiles of one direction."""
    return tuple(tile for name, tile in vars(plan).items() if (name in FORWARD) == forward)


def _timed(found: Found, one: Candidate, time: Callable[[Any, bool], float]) -> float | None:
    entry: dict[str, Any] = {"kernels": one.kernels, **{name: asdict(getattr(one.plan, name)) for name in one.kernels}}
    found.tried.append(entry)
    try:
        seconds = time(one.plan, one.forward)
    except Exception as error:  # more shared memory or registers than there are
        entry["error"] = f"{type(error).__name__}: {str(error)[:200]}"
        return None
    entry |= {"ms": 1e3 * seconds, "gain": found.after[one.forward] / seconds}
    return seconds


def _improve(
    found: Found,
    start: Any,
    timed: list[tuple[float, Candidate]],
    forward: bool,
    time: Callable[[Any, bool], float],
) -> None:
    """Take each kernel's best change together, or the best one alone, if that is faster."""
    better = sorted((pair for pair in timed if found.after[forward] / pair[0] >= GAIN), key=lambda pair: pair[0])
    if not better:
        return
    singles: dict[str, Any] = {}
    for _, one in better:
        if len(one.kernels) == 1 and getattr(one.plan, one.kernels[0]).m == getattr(start, one.kernels[0]).m:
            singles.setdefault(one.kernels[0], getattr(one.plan, one.kernels[0]))
    choices = [better[0]]
    if len(singles) > 1:
        together = replace(start, **singles)
        choices.append((time(together, forward), Candidate(tuple(singles), together)))
    seconds, best = min(choices, key=lambda pair: pair[0])
    found.plan = replace(found.plan, **{name: getattr(best.plan, name) for name in best.kernels})
    found.after[forward] = seconds
