"""Checkpoints of GPTQ (2210.17323) and AWQ (2306.00978): codes in int32 and scales, worked out while they are read.

Both hold a linear layer's matrix the other way round, [in, out], as (code - zero) * scale, with a scale and a zero for
each output and group of inputs. GPTQ packs codes along the inputs and zeros along the outputs, from the lowest bits on;
zeros are one too small but in the format "gptq_v2", and `g_idx` says which input is of which group. AWQ packs both
along the outputs, eight in the order 0 2 4 6 1 3 5 7.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .quantised import Quantised, _check_scale, _scales
from .tensorfile import Entry

IN_TURN = (0, 4, 1, 5, 2, 6, 3, 7)  # where AWQ keeps the codes of eight outputs, from the lowest bits on


@dataclass(frozen=True)
class Grouped(Quantised):
    """Numbers [O, I] of codes packed in int32; a piece begins at row `first`, and has the whole matrix's bytes.

    groups [I] is GPTQ's g_idx; without one there are `size` inputs in a group. one is added to GPTQ's zeros.
    """

    zero: Entry
    codes: Entry
    bits: int
    size: int
    one: int = 0
    woven: bool = False
    groups: Entry | None = None
    first: int = 0

    def rows(self, first: int, count: int) -> Grouped:
        """Some along the first dimension."""
        return replace(self, shape=(count, *self.shape[1:]), first=self.first + first)

    def read_part(self, target: Tensor, box: Sequence[slice]) -> int:
        """As `Entry.read_part`; all of the matrix and its scales is read, and counted."""
        target, inputs = target.detach(), self.shape[1]
        outputs = slice(self.first + box[0].start, self.first + box[0].stop)
        codes = self._unpacked(self.codes, down=not self.woven)[:, outputs]
        zeros = (self._unpacked(self.zero)[:, outputs] + self.one) & (1 << self.bits) - 1
        scales, count = _scales(self.scale, [slice(0, size) for size in self.scale.shape])
        group = torch.arange(inputs) // self.size
        if self.groups is not None:
            group = torch.empty(inputs, dtype=torch.int64, device="cpu")
            self.groups.read_into(group)
        kind = torch.promote_types(target.dtype, torch.float32)
        values = (codes - zeros[group]).to(kind).mul_(scales[:, outputs][group])
        target.copy_(values.T[:, box[1]])
        return count + sum(entry.stop - entry.start for entry in (self.codes, self.zero))

    def _unpacked(self, entry: Entry, down: bool = False) -> Tensor:
        """Codes [R, C] of int32 that pack them along columns, or down rows."""
        raw = torch.empty(entry.shape, dtype=torch.int32, device="cpu")
        entry.read_into(raw)
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32)
        if down:
            return (raw[:, None] >> shifts[:, None] & (1 << self.bits) - 1).flatten(0, 1)
        codes = raw[..., None] >> shifts & (1 << self.bits) - 1
        return (codes[..., IN_TURN] if self.woven else codes).flatten(1)


def check(method: str, settings: Mapping[str, Any], where: Path) -> None:
    """Raise ValueError for a way of these methods that is not read."""
    bits, known = settings.get("bits"), (4,) if method == "awq" else (2, 4, 8)
    if bits not in known:
        raise ValueError(f"{where}: quantization_config.bits={bits!r} is not read; expected {known}")
    name, ways = ("version", ("gemm",)) if method == "awq" else ("checkpoint_format", ("gptq", "gptq_v2"))
    if str(settings.get(name, ways[0])).lower() not in ways:
        raise ValueError(f"{where}: quantization_config.{name}={settings[name]!r} is not read; expected {ways}")


def dequantised(
    method: str, entries: Mapping[str, Entry], settings: Mapping[str, Any], where: Path
) -> dict[str, Entry]:
    """A checkpoint's tensors by name, each quantised one in one entry that reads its numbers.

    settings: its quantization_config. Nothing is read, but all shapes are checked. Raises ValueError naming file and
    tensor, for scales and zeros that are missing or wrong in shape or type.
    """
    awq, bits = method == "awq", int(settings["bits"])
    packs, one = 32 // bits, 0 if awq or settings.get("checkpoint_format") == "gptq_v2" else 1
    found: dict[str, Entry] = {}
    used: set[str] = set()
    for key, codes in entries.items():
        if not key.endswith(".qweight"):
            continue
        name = key.removesuffix("qweight")
        scale, zero, groups = (entries.get(f"{name}{end}") for end in ("scales", "qzeros", "g_idx"))
        for entry, end in ((scale, "scales"), (zero, "qzeros")):
            if entry is None:
                raise ValueError(f"{codes.path}: tensor {key} is quantised, but {name}{end} is missing")
        assert scale is not None
        assert zero is not None
        if codes.dtype != "I32" or len(codes.shape) != 2 or len(scale.shape) != 2:
            raise ValueError(f"{codes.path}: tensor {key} is {codes.dtype} of shape {list(codes.shape)}; expected I32")
        inputs, outputs = (codes.shape[0] * (1 if awq else packs), codes.shape[1] * (packs if awq else 1))
        size = int(settings.get("group_size", -1))
        size = inputs if size < 1 else size
        _check_scale(scale, (-(-inputs // size), outputs), ("F16", "BF16", "F32"), codes)
        _check_scale(zero, (scale.shape[0], -(-outputs // packs)), ("I32",), codes)
        if groups is not None:
            _check_scale(groups, (inputs,), ("I32", "I64"), codes)
        whole = codes.path, f"{name}weight", "BF16", (outputs, inputs), codes.start, codes.stop
        found[f"{name}weight"] = Grouped(*whole, scale, zero, codes, bits, size, one, awq, groups)
        used |= {key, *(f"{name}{end}" for end in ("scales", "qzeros", "g_idx"))}
    return {key: entry for key, entry in entries.items() if key not in used} | found
