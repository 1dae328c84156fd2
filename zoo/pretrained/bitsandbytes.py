"""Checkpoints of bitsandbytes, read as numbers: NF4 and FP4 (QLoRA, 2305.14314), LLM.int8() (2208.07339).

NF4 and FP4: two codes a byte, the high half first, over the whole matrix row after row; a code stands for one of 16
numbers in [-1, 1], times the largest magnitude of its block. These may be codes themselves, of 256 numbers, times the
largest of their block, plus a constant (double quantisation, section 3). What is where a tensor of JSON says, beside
each matrix. LLM.int8(): a byte a number, times the largest magnitude of its row, over 127.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from .compressed import Rows
from .quantised import _bytes, _check_scale, _scales
from .tensorfile import Entry

STATE = ".quant_state.bitsandbytes__"
ENDS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


@dataclass(frozen=True)
class Magnitudes:
    """Largest magnitudes of blocks [B]: themselves in `stored`, or codes of table[256] for blocks of them, + offset."""

    stored: Entry
    table: Entry | None = None
    blocks: Entry | None = None
    size: int = 1
    offset: float = 0.0

    def read(self, first: int, last: int) -> tuple[Tensor, int]:
        """Those of some blocks in float32, and how many bytes that took."""
        if self.table is None or self.blocks is None:
            return _flat(self.stored, first, last, torch.float32)
        codes, count = _flat(self.stored, first, last, torch.uint8)
        table, more = _flat(self.table, 0, 256, torch.float32)
        start = first // self.size
        largest, rest = _flat(self.blocks, start, -(-last // self.size), torch.float32)
        values = table[codes.long()] * largest[torch.arange(first, last) // self.size - start] + self.offset
        return values, count + more + rest


@dataclass(frozen=True)
class Blockwise(Rows):
    """Numbers [R, C] of 16 that codes stand for, `scale`, and magnitudes of `size` numbers; rows begin at `first`.

    The bytes are always those of the whole matrix: a row may begin in the middle of one.
    """

    magnitudes: Magnitudes
    size: int
    whole: tuple[int, int]

    def rows(self, first: int, count: int) -> Self:
        """Some along the first dimension."""
        return replace(self, shape=(count, *self.shape[1:]), first=self.first + first)

    def read_part(self, target: Tensor, box: Sequence[slice]) -> int:
        """As `Entry.read_part`; whole blocks are read, their magnitudes, and the table, and counted."""
        target, (rows, columns) = target.detach(), self.whole
        begin, end = ((self.first + row) * columns for row in (box[0].start, box[0].stop))
        first, last = begin // self.size, -(-end // self.size)
        stop = min(last * self.size, rows * columns)
        raw, count = _bytes(self, (self.stop - self.start,), [slice(first * self.size // 2, -(-stop // 2))])
        table, more = _flat(self.scale, 0, 16, torch.float32)
        largest, rest = self.magnitudes.read(first, last)
        values = table[torch.stack((raw >> 4, raw & 15), 1).flatten().long()]
        values = F.pad(values, (0, (last - first) * self.size - len(values))).view(-1, self.size)
        values = values.to(torch.promote_types(target.dtype, torch.float32)).mul_(largest[:, None]).flatten()
        values = values[begin - first * self.size : end - first * self.size].view(-1, columns)
        target.copy_(values[:, box[1]])
        return count + more + rest


@dataclass(frozen=True)
class Int8(Rows):
    """Numbers [R, C] of bytes and a scale [R] that is the largest magnitude of a row."""

    def read_part(self, target: Tensor, box: Sequence[slice]) -> int:
        """As `Entry.read_part`; the scales of the part's rows are read with it, and counted."""
        codes, count = _bytes(self, self.shape, box)
        largest, more = _flat(self.scale, self.first + box[0].start, self.first + box[0].stop, torch.float32)
        values = codes.view(torch.int8).to(torch.promote_types(target.dtype, torch.float32))
        target.detach().copy_(values.mul_(largest[:, None] / 127))
        return count + more


def check(method: str, settings: Mapping[str, Any], where: Path) -> None:
    """Nothing: each matrix says how it is quantised."""


def dequantised(
    method: str, entries: Mapping[str, Entry], settings: Mapping[str, Any], where: Path
) -> dict[str, Entry]:
    """A checkpoint's tensors by name, each quantised one in one entry that reads its numbers.

    Of the files only what says how matrices are quantised is read, and all shapes are checked. Raises ValueError naming
    file and tensor, for parts of a matrix that are missing or wrong in shape or type.
    """
    found: dict[str, Entry] = {}
    used: set[str] = set()
    for key, entry in entries.items():
        name, state, _ = key.partition(STATE)
        if state:
            found[name] = _blockwise(name, entries, _said(entry))
            used |= {name, key, *(name + end for end in ENDS)}
        elif key.endswith(".SCB"):
            stem = key.removesuffix("SCB")
            found[f"{stem}weight"] = _int8(f"{stem}weight", entries, entry)
            used |= {f"{stem}weight", key, f"{stem}weight_format"}
    if left := next((key for key, entry in entries.items() if key not in used and entry.dtype in ("U8", "I8")), None):
        raise ValueError(f"{entries[left].path}: tensor {left} is {entries[left].dtype}; nothing says what it means")
    return {key: entry for key, entry in entries.items() if key not in used} | found


def _said(entry: Entry) -> dict[str, Any]:
    """What the JSON beside a matrix says."""
    text, _ = _bytes(entry, (entry.stop - entry.start,), [slice(0, entry.stop - entry.start)])
    try:
        said = json.loads(bytes(text.tolist()))
        rows, columns = said["shape"]
        nested = said.get("nested_blocksize") or 0
        said |= {"shape": (int(rows), int(columns)), "blocksize": int(said["blocksize"]), "nested": int(nested)}
        said["nested_offset"] = float(said.get("nested_offset") or 0)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{entry.path}: tensor {entry.key} does not say how a matrix is quantised: {error!r}"
        ) from None
    if said["blocksize"] < 2 or said["blocksize"] % 2 or said["nested"] < 0:
        raise ValueError(f"{entry.path}: tensor {entry.key} has blocks of {said['blocksize']}; expected an even number")
    return said


def _blockwise(name: str, entries: Mapping[str, Entry], said: Mapping[str, Any]) -> Blockwise:
    codes, table, largest = (_part(name, entries, end) for end in ("", ".quant_map", ".absmax"))
    numbers, size, nested = math.prod(said["shape"]), said["blocksize"], said["nested"]
    if codes.stop - codes.start != -(-numbers // 2):
        raise ValueError(
            f"{codes.path}: tensor {name} has {codes.stop - codes.start} bytes, expected {-(-numbers // 2)} for "
            f"{list(said['shape'])} numbers of 4 bits"
        )
    blocks = -(-numbers // size)
    _check_scale(table, (16,), ("F32",), codes)
    _check_scale(largest, (blocks,), ("U8",) if nested else ("F32", "BF16", "F16"), codes)
    magnitudes = Magnitudes(largest)
    if nested:
        of_table, of_blocks = (_part(name, entries, end) for end in (".nested_quant_map", ".nested_absmax"))
        _check_scale(of_table, (256,), ("F32",), codes)
        _check_scale(of_blocks, (-(-blocks // nested),), ("F32",), codes)
        magnitudes = Magnitudes(largest, of_table, of_blocks, nested, said["nested_offset"])
    shape = said["shape"]
    return Blockwise(codes.path, name, "BF16", shape, codes.start, codes.stop, table, magnitudes, size, shape)


def _int8(name: str, entries: Mapping[str, Entry], largest: Entry) -> Int8:
    codes = _part(name, entries, "")
    if codes.dtype != "I8" or len(codes.shape) != 2:
        raise ValueError(f"{codes.path}: tensor {name} is {codes.dtype} of shape {list(codes.shape)}; expected I8")
    _check_scale(largest, (codes.shape[0],), ("F32", "BF16", "F16"), codes)
    order = entries.get(f"{name}_format")
    if order is not None and order.stop > order.start and int(_bytes(order, (1,), [slice(0, 1)])[0]):
        raise ValueError(f"{order.path}: tensor {order.key}: expected 0, rows one after another")
    return Int8(codes.path, name, "BF16", codes.shape, codes.start, codes.stop, largest)


def _part(name: str, entries: Mapping[str, Entry], end: str) -> Entry:
    if (found := entries.get(f"{name}{end}")) is None:
        where = next(entry.path for key, entry in entries.items() if key.startswith(name.removesuffix("weight")))
        raise ValueError(f"{where}: {name} is quantised, but tensor {name}{end} is missing")
    return found


def _flat(entry: Entry, first: int, last: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Some numbers [n] of a list, and how many bytes they take."""
    if dtype == torch.float32:
        values, count = _scales(replace(entry, shape=(*entry.shape, 1)), [slice(first, last), slice(0, 1)])
        return values[:, 0], count
    part = torch.empty(last - first, dtype=dtype, device="cpu")
    return part, entry.read_part(part, [slice(first, last)])
