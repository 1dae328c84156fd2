"""Experts of one layer in a checkpoint's files, to be read one by one."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..moe import Experts, QuantisedExperts
from ..moe.kernels.codes import BLOCK
from ..moe.quantised import KINDS
from ..pretrained.quantised import Fp8, Quantised
from ..pretrained.sharded import View, part_of
from ..pretrained.tensorfile import Entry

Found = dict[str, tuple[Entry, View]]  # by name in the files


class ExpertFiles:
    """What of the files is each expert's of the stack `name`; copies share it.

    shapes: those of the stack's parameters, [E, ...]; found: of each of them, what of the files it is made of.
    """

    def __init__(self, name: str, shapes: Mapping[str, torch.Size], found: Mapping[str, Found]) -> None:
        self.name, self.shapes = name, dict(shapes)
        self.parts: dict[int, dict[str, Found]] = defaultdict(lambda: defaultdict(dict))
        for own, tensors in found.items():
            for key, (entry, view) in tensors.items():
                count = view.shape[view.dims.index(0)] if 0 in view.dims else 1
                for e in range(view.origin[0], view.origin[0] + count):
                    self.parts[e][own][key] = entry, view
        self.parts = {e: dict(parts) for e, parts in self.parts.items()}
        self.files = {
            path: _state(path) for tensors in found.values() for entry, _ in tensors.values() for path in _paths(entry)
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertFiles:
        return self

    @torch.no_grad()
    def read(self, expert: int, held: Experts | QuantisedExperts, slot: int) -> None:
        """Fill one slot of `held` with an expert, rounded to its kind; one matrix is held as it was at a time.

        Raises ValueError naming layer, matrix and expert for numbers that few bits cannot hold, and the file where one
        was written to since.
        """
        for path in {
            p for found in self.parts.get(expert, {}).values() for entry, _ in found.values() for p in _paths(entry)
        }:
            if _state(path) != self.files[path]:
                raise ValueError(f"{path} has changed since {self.name} was found in it; read the model again")
        for own, found in self.parts.get(expert, {}).items():
            if isinstance(held, QuantisedExperts) and not own.endswith("_bias"):
                try:
                    self._encode(expert, own, found, held, slot)
                except ValueError as error:
                    raise ValueError(f"{self.name}.{own}, expert {expert}: {error}") from None
            else:
                self._fill(expert, own, found, getattr(held, own)[slot : slot + 1])

    def _encode(self, expert: int, own: str, found: Found, held: QuantisedExperts, slot: int) -> None:
        if _in_our_blocks(found, held, own):
            for entry, view in found.values():
                part = view.origin[1] // view.shape[0]
                codes, scales = (getattr(held, f"{own}_{kind}")[slot].chunk(held.parts[own])[part] for kind in KINDS)
                entry.read_codes(codes, scales)  # type: ignore[attr-defined]  # an Fp8
            return
        matrix = torch.empty(self.shapes[own][1:], dtype=torch.float32, device="cpu")
        self._fill(expert, own, found, matrix[None])
        held.encode(own, slot, matrix.to(getattr(held, f"{own}_codes").device))

    def _fill(self, expert: int, own: str, found: Found, one: Tensor) -> None:
        """Fill one expert's [1, ...] from the files' tensors that it has part in."""
        offset = (expert, *(0 for _ in self.shapes[own][1:]))
        for entry, view in found.values():
            if part := part_of(view, (1, *self.shapes[own][1:]), offset, one):
                entry.read_part(*part)


def _paths(entry: Entry) -> set[Path]:
    """The files that a tensor is read from: its scales may be in another."""
    return {entry.path, entry.scale.path} if isinstance(entry, Quantised) else {entry.path}


def _state(path: Path) -> tuple[int, int]:
    """What changes with a file's content."""
    found = os.stat(path)
    return found.st_mtime_ns, found.st_size


def _in_our_blocks(found: Found, held: QuantisedExperts, own: str) -> bool:
    """Whether the files have a matrix in float8 themselves, with scales for the same blocks."""
    return held.format == "float8" and all(
        isinstance(entry, Fp8)
        and entry.block == (BLOCK, BLOCK)
        and (view.dims, view.shape) == ((1, 2), entry.shape)
        and view.shape[0] * held.parts[own] == getattr(held, f"{own}_codes").shape[1]
        for entry, view in found.values()
    )


def parted(
    where: Mapping[str, View], entries: Mapping[str, Entry], stacks: Mapping[str, Experts]
) -> tuple[dict[str, View], dict[str, ExpertFiles]]:
    """What of the files a model's experts `stacks` are made of, after where all the others go."""
    found: dict[str, dict[str, Found]] = {name: defaultdict(dict) for name in stacks}
    rest = {}
    for key, view in where.items():
        stack, _, own = view.name.rpartition(".")
        if stack in stacks:
            found[stack][own][key] = entries[key], view
        else:
            rest[key] = view
    shapes = {name: {own: p.shape for own, p in experts.named_parameters()} for name, experts in stacks.items()}
    return rest, {name: ExpertFiles(name, shapes[name], found[name]) for name in stacks}
