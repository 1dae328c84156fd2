"""Checkpoints of the compressed-tensors library and of NVIDIA's ModelOpt: numbers worked out while they are read.

    ints    codes of 4 or 8 bits, packed in int32 from the lowest bit on, or one an int8; a scale for each matrix, row,
            or group of a row's columns, and where they are not symmetric the code of zero
    float8  E4M3 with a scale for each matrix, row, or block
    float4  E2M1, two a byte, the low half first, with a scale in E4M3 for 16 columns and one for the matrix (NVFP4), or
            a power of two for 32 (MXFP4)

Scales for activations and caches are left out: what is read computes in ordinary numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ..moe.kernels.codes import e2m1_pairs, e4m3, looked_up
from .quantised import Fp8, Quantised, _bytes, _check_scale, _scales
from .tensorfile import Entry

FORMATS = (
    *("dense", "float-quantized", "int-quantized", "mixed-precision", "mxfp4-pack-quantized", "naive-quantized"),
    *("nvfp4-pack-quantized", "pack-quantized"),
)
ALGORITHMS = ("FP8", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MIXED_PRECISION")
OF_ACTIVATIONS = re.compile(
    r".*\.(input_scale|input_zero_point|input_global_scale|output_scale|[qkv]_scale|k_bmm_scale)"
)
LOW = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class Rows(Quantised):
    """A matrix of codes and scales, or a piece of one that begins at row `first`."""

    first: int = field(default=0, kw_only=True)

    def rows(self, first: int, count: int) -> Self:
        """Some along the first dimension."""
        return replace(super().rows(first, count), first=self.first + first)


@dataclass(frozen=True)
class Ints(Rows):
    """Numbers [R, C] = (code - zero) * scale, one scale for `group` columns.

    Codes of `bits` are offset by half their range where they are `packed`. zero [R, C / group] is packed along its
    rows, index [C] says which column is of which group where they are out of order.
    """

    bits: int
    packed: bool
    group: int
    zero: Entry | None = None
    index: Entry | None = None

    def read_part(self, target: Tensor, box: Sequence[slice]) -> int:
        """As `Entry.read_part`; the scales of the part's rows are read with it, and counted."""
        target, (rows, columns) = target.detach(), self.shape
        width = (self.stop - self.start) // max(rows, 1)
        raw, count = _bytes(self, (rows, width), [box[0], slice(0, width)])
        codes = _unpacked(raw, self.bits)[:, :columns] if self.packed else raw.view(torch.int8)
        there = slice(self.first + box[0].start, self.first + box[0].stop)
        many = self.scale.shape[0] > 1
        scales, more = _scales(self.scale, [there if many else slice(0, 1), slice(0, self.scale.shape[1])])
        kind = torch.promote_types(target.dtype, torch.float32)
        groups = self._groups(columns)
        values = codes.to(kind)
        if self.zero is not None:
            zeros, read = self._zeros(there, many)
            values.sub_(zeros[:, groups] if zeros.shape[1] > 1 else zeros)
            more += read
        values.mul_(scales[:, groups] if scales.shape[1] > 1 else scales)
        target.copy_(values[:, box[1]])
        return count + more

    def _groups(self, columns: int) -> Tensor:
        if self.index is None:
            return torch.arange(columns) // self.group
        index = torch.empty(columns, dtype=torch.int64, device="cpu")
        self.index.read_into(index)
        return index

    def _zeros(self, rows: slice, many: bool) -> tuple[Tensor, int]:
        """The codes of zero of some rows, or of all: [r, G]."""
        assert self.zero is not None
        raw = torch.empty(self.zero.shape, dtype=torch.int32 if self.packed else torch.int8, device="cpu")
        self.zero.read_into(raw)
        codes = _unpacked(raw.T.contiguous().view(torch.uint8), self.bits).T if self.packed else raw
        return codes[rows] if many else codes[:1], raw.nbytes


@dataclass(frozen=True)
class Fp4(Rows):
    """Numbers [R, C] of codes [R, C / 2] and a scale for `group` columns, over one number for all, or times it."""

    group: int
    over: Entry | None = None
    times: Entry | None = None

    def read_part(self, target: Tensor, box: Sequence[slice]) -> int:
        """As `Entry.read_part`; the scales of the part's rows are read with it, and counted."""
        target, (rows, columns) = target.detach(), self.shape
        raw, count = _bytes(self, (rows, columns // 2), [box[0], slice(0, columns // 2)])
        there = [slice(self.first + box[0].start, self.first + box[0].stop), slice(0, self.scale.shape[1])]
        if self.scale.dtype == "F8_E4M3":
            codes, more = _bytes(self.scale, self.scale.shape, there)
            scales = looked_up(e4m3(), codes)
        else:
            scales, more = _scales(self.scale, there)
        for entry in (self.over, self.times):
            if entry is not None:
                whole = torch.empty(entry.shape, dtype=torch.float32, device="cpu")
                entry.read_into(whole)
                scales = scales / whole if entry is self.over else scales * whole
        values = looked_up(e2m1_pairs(), raw).to(torch.promote_types(target.dtype, torch.float32)).flatten(1)
        target.copy_(values.mul_(scales.repeat_interleave(self.group, 1))[:, box[1]])
        return count + more


def _unpacked(raw: Tensor, bits: int) -> Tensor:
    """Codes of 4 or 8 bits in bytes [R, W], as signed numbers around the middle of their range."""
    if bits == 8:
        return raw.to(torch.int16) - 128
    return torch.stack([raw & 15, raw >> 4], dim=-1).flatten(1).to(torch.int16) - 8


def check(method: str, settings: Mapping[str, Any], where: Path) -> None:
    """Raise ValueError for a way of these libraries that is not read."""
    known, named = (FORMATS, "format") if method == "compressed-tensors" else (ALGORITHMS, "quant_algo")
    said = settings.get(named)
    if said is not None and said not in known:
        raise ValueError(f"{where}: quantization_config.{named}={said!r} is not read; expected {', '.join(known)}")
    sparsity = settings.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise ValueError(f"{where}: quantization_config.sparsity_config: {sparsity['format']!r} weights are not read")
    if (settings.get("transform_config") or {}).get("config_groups"):
        raise ValueError(f"{where}: quantization_config.transform_config: a model with transforms is another one")


def dequantised(
    method: str, entries: Mapping[str, Entry], settings: Mapping[str, Any], where: Path
) -> dict[str, Entry]:
    """A checkpoint's tensors by name, each quantised one with its scales in one entry that reads its numbers.

    settings: its quantization_config, of the file `where`. Nothing is read, but all shapes are checked.
    Raises ValueError naming file and tensor, for scales that are missing or wrong in shape or type.
    """
    weights = [group.get("weights") or {} for group in (settings.get("config_groups") or {}).values()]
    found: dict[str, Entry] = {}
    used: set[str] = set()
    for key, entry in entries.items():
        name = key.removesuffix("_packed")
        if OF_ACTIVATIONS.fullmatch(key) or not name.endswith("weight"):
            used |= {key} if OF_ACTIVATIONS.fullmatch(key) else set()
            continue
        part = {
            end: entries.get(f"{name}_{end}") for end in ("scale", "global_scale", "scale_2", "zero_point", "g_idx")
        }
        if entry.dtype == "U8" or (key != name and entry.dtype == "I32") or entry.dtype in ("I8", "F8_E4M3"):
            if len(entry.shape) != 2:
                raise ValueError(
                    f"{entry.path}: tensor {key} is quantised, of shape {list(entry.shape)}; expected a matrix"
                )
            if part["scale"] is None:
                raise ValueError(f"{entry.path}: tensor {key} is quantised, but its scales {name}_scale are missing")
            if entry.dtype == "U8":
                found[name] = _fp4(entry, name, part)
            elif entry.dtype == "F8_E4M3":
                found[name] = _fp8(entry, name, part, weights)
            else:
                found[name] = _ints(entry, name, part, weights, where)
            used |= {key, f"{name}_shape", *(f"{name}_{end}" for end in part)}
    return {key: entry for key, entry in entries.items() if key not in used} | found


Parts = Mapping[str, Entry | None]


def _spread(
    scale: Entry, rows: int, columns: int, codes: Entry, block: Sequence[int] | None = None
) -> tuple[Entry, int, int]:
    """Scales as a matrix, and how many rows and columns share one; only the last of blocks of a known size are cut."""
    shape = scale.shape if len(scale.shape) == 2 else (1, 1) if math.prod(scale.shape) == 1 else (*scale.shape, 1)
    scale = replace(scale, shape=shape)
    if block is not None and shape == (-(-rows // block[0]), -(-columns // block[1])):
        return scale, block[0], block[1]
    if len(shape) != 2 or not shape[0] or not shape[1] or rows % shape[0] or columns % shape[1]:
        raise ValueError(
            f"{scale.path}: tensor {scale.key} has shape {list(scale.shape)}, which does not divide {codes.key}, "
            f"{rows} x {columns}"
        )
    return scale, rows // shape[0], columns // shape[1]


def _fp8(codes: Entry, name: str, part: Parts, weights: Sequence[Mapping[str, Any]]) -> Fp8:
    assert part["scale"] is not None
    rows, columns = codes.shape
    block = next((w["block_structure"] for w in weights if w.get("block_structure")), None)
    scale, height, width = _spread(part["scale"], rows, columns, codes, block)
    _check_scale(scale, scale.shape, LOW, codes)
    return Fp8(codes.path, name, "BF16", codes.shape, codes.start, codes.stop, scale, (max(height, 1), max(width, 1)))


def _fp4(codes: Entry, name: str, part: Parts) -> Fp4:
    scale = part["scale"]
    assert scale is not None
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    group = 32 if scale.dtype == "U8" else 16
    _check_scale(scale, (rows, columns // group), ("U8", "F8_E4M3"), codes)
    for other in (part["global_scale"], part["scale_2"]):
        if other is not None and other.stop - other.start != 4:
            raise ValueError(f"{other.path}: tensor {other.key} has shape {list(other.shape)}; expected one number")
    if scale.dtype == "F8_E4M3" and part["global_scale"] is None and part["scale_2"] is None:
        raise ValueError(f"{codes.path}: tensor {codes.key} is NVFP4, but {name}_global_scale is missing")
    whole = codes.path, name, "BF16", (rows, columns), codes.start, codes.stop
    return Fp4(*whole, scale, group, part["global_scale"], part["scale_2"])


def _ints(codes: Entry, name: str, part: Parts, weights: Sequence[Mapping[str, Any]], where: Path) -> Ints:
    scale, zero, index = part["scale"], part["zero_point"], part["g_idx"]
    assert scale is not None
    packed = codes.dtype == "I32"
    said = {int(w.get("num_bits") or 0) for w in weights if w.get("type", "int") == "int"} if packed else {8}
    bit = said.pop() if len(said) == 1 else 0
    if bit not in (4, 8):
        raise ValueError(f"{where}: tensor {codes.key}: expected one num_bits for all integers, 4 or 8")
    rows, columns = codes.shape[0], codes.shape[1] * (32 // bit if packed else 1)
    scale, height, group = _spread(scale, rows, columns, codes)
    _check_scale(scale, scale.shape, LOW, codes)
    if height not in (1, rows):
        raise ValueError(f"{scale.path}: tensor {scale.key}: {height} rows share a scale; expected one or all")
    if zero is not None:
        packs = 32 // bit if packed else 1
        zero = replace(zero, shape=zero.shape if len(zero.shape) == 2 else (*scale.shape,))
        _check_scale(zero, (-(-scale.shape[0] // packs), scale.shape[1]), ("I32" if packed else "I8",), codes)
    whole = codes.path, name, "BF16", (rows, columns), codes.start, codes.stop
    return Ints(*whole, scale, bit, packed, group, zero, index)
