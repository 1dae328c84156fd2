"""Tile sizes of every kernel, in one table by architecture, element size and rows per expert.

The table for "80" stays below 99 KB of shared memory a program: what every GPU from Ampere on has.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Block sizes m x n of the output and k of the inner loop, warps, pipeline stages, row tiles per L2 group.

    described: weights and contiguous rows are loaded through tensor descriptors, by the copy engine of Hopper (TMA);
    not for weights' gradients, nor in the tables for other GPUs or for widths that are no multiples of 16.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8
    described: bool = False

    def options(self) -> dict[str, int]:
        """The same as keyword arguments of a kernel launch."""
        return {
            "BLOCK_M": self.m,
            "BLOCK_N": self.n,
            "BLOCK_K": self.k,
            "GROUP": self.group,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


@dataclass(frozen=True)
class Plan:
    """One tile a kernel; up and down share m, and so do d_hidden and d_x: they walk one list of row tiles."""

    up: Tile
    down: Tile
    d_hidden: Tile
    d_x: Tile
    d_weight: Tile


# Most rows an expert has on average for each entry, and its name.
ROWS = ((24, "few"), (96, "some"))

PLANS: dict[tuple[str, int, str], Plan] = {
    ("90", 2, "few"): Plan(
        up=Tile(16, 64, 128, 4, 3),
        down=Tile(16, 128, 128, 4, 3),
        d_hidden=Tile(16, 64, 128, 4, 3),
        d_x=Tile(16, 128, 64, 4, 4),
        d_weight=Tile(64, 128, 16, 4, 3),
    ),
    ("90", 2, "some"): Plan(
        up=Tile(64, 64, 64, 4, 4),
        down=Tile(64, 128, 64, 4, 4),
        d_hidden=Tile(64, 64, 64, 4, 4),
        d_x=Tile(64, 128, 64, 4, 4),
        d_weight=Tile(128, 128, 32, 8, 4),
    ),
    ("90", 2, "many"): Plan(
        up=Tile(128, 128, 64, 8, 3),
        down=Tile(128, 256, 64, 8, 3),
        d_hidden=Tile(128, 128, 64, 8, 4),
        d_x=Tile(128, 256, 64, 8, 3),
        d_weight=Tile(128, 256, 64, 8, 3),
    ),
    ("80", 2, "few"): Plan(
        up=Tile(16, 64, 64, 4, 4),
        down=Tile(16, 64, 128, 4, 3),
        d_hidden=Tile(16, 64, 64, 4, 4),
        d_x=Tile(16, 64, 64, 4, 4),
        d_weight=Tile(64, 64, 16, 4, 3),
    ),
    ("80", 2, "some"): Plan(
        up=Tile(64, 64, 64, 4, 3),
        down=Tile(64, 128, 32, 4, 4),
        d_hidden=Tile(64, 64, 64, 4, 3),
        d_x=Tile(64, 128, 32, 4, 4),
        d_weight=Tile(64, 128, 32, 4, 4),
    ),
    ("80", 2, "many"): Plan(
        up=Tile(128, 64, 32, 8, 4),
        down=Tile(128, 128, 32, 8, 4),
        d_hidden=Tile(128, 64, 32, 8, 4),
        d_x=Tile(128, 128, 32, 8, 4),
        d_weight=Tile(128, 128, 32, 8, 4),
    ),
}
# Widths or addresses off 16: loads go element by element, and large tiles would run out of registers.
_ODD = Plan(
    up=Tile(64, 32, 32, 8, 2),
    down=Tile(64, 64, 32, 8, 2),
    d_hidden=Tile(64, 64, 32, 8, 2),
    d_x=Tile(64, 64, 32, 8, 2),
    d_weight=Tile(64, 64, 32, 8, 2),
)
_FLOAT32 = Plan(
    up=Tile(64, 32, 16, 8, 3),
    down=Tile(64, 64, 16, 8, 3),
    d_hidden=Tile(64, 64, 16, 8, 3),
    d_x=Tile(64, 64, 16, 8, 3),
    d_weight=Tile(64, 64, 16, 8, 3),
)
PLANS |= {(arch, 2, "odd"): _ODD for arch in ("80", "90")}
PLANS |= {(arch, 4, rows): _FLOAT32 for arch in ("80", "90") for rows in ("few", "some", "many", "odd")}

# For weights in few bits: n and k divide 128, as a block has one scale of float8. Many stages, as a block has few
# bytes. Weights that stay as they are need no gradient.
_FROZEN = Tile(64, 64, 16, 4, 3)
CODED: dict[tuple[str, int, str], Plan] = {
    ("90", 2, "few"): Plan(
        up=Tile(16, 64, 128, 4, 4),
        down=Tile(16, 64, 128, 4, 4),
        d_hidden=Tile(16, 64, 128, 4, 4),
        d_x=Tile(16, 64, 64, 4, 4),
        d_weight=_FROZEN,
    ),
    ("90", 2, "some"): Plan(
        up=Tile(64, 64, 128, 4, 3),
        down=Tile(64, 64, 128, 4, 3),
        d_hidden=Tile(64, 64, 128, 4, 3),
        d_x=Tile(64, 64, 64, 4, 4),
        d_weight=_FROZEN,
    ),
    ("80", 2, "few"): Plan(
        up=Tile(16, 64, 128, 4, 3),
        down=Tile(16, 64, 128, 4, 4),
        d_hidden=Tile(16, 64, 64, 4, 4),
        d_x=Tile(16, 64, 64, 4, 4),
        d_weight=_FROZEN,
    ),
    ("80", 2, "some"): Plan(
        up=Tile(64, 64, 64, 4, 3),
        down=Tile(64, 64, 64, 4, 3),
        d_hidden=Tile(64, 64, 64, 4, 3),
        d_x=Tile(64, 64, 64, 4, 3),
        d_weight=_FROZEN,
    ),
}
# Rows or widths off 16, whose loads go element by element, and float32.
_CODED_SMALL = Plan(
    up=Tile(16, 32, 32, 4, 2),
    down=Tile(16, 64, 32, 4, 2),
    d_hidden=Tile(16, 64, 32, 4, 2),
    d_x=Tile(16, 64, 32, 4, 2),
    d_weight=_FROZEN,
)
CODED |= {(arch, 2, "odd"): _CODED_SMALL for arch in ("80", "90")}
CODED |= {(arch, 4, rows): _CODED_SMALL for arch in ("80", "90") for rows in ("few", "some", "odd")}
