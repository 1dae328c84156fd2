"""Published FP8 and MXFP4 checkpoints: tensors whose numbers are worked out while they are read.

FP8 as DeepSeek-V3 publishes it (arXiv 2412.19437, section 3.3): a matrix of float8_e4m3fn and, under its name and
`_scale_inv`, one factor for each block of rows and columns; the last blocks may be cut. MXFP4 as gpt-oss publishes it
(OCP Microscaling Formats 1.0): 32 numbers of a row share a power of two, two E2M1 numbers a byte, the low half first.
Which tensors are quantised the files say themselves: what `modules_to_not_convert` names is stored plainly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..moe.kernels.codes import GROUP, e2m1_pairs, e4m3, e8m0, looked_up
from .tensorfile import DTYPES, Entry

METHODS = ("fp8", "mxfp4", "compressed-tensors", "modelopt", "gptq", "awq", "bitsandbytes")
BLOCK = (128, 128)  # where a configuration does not say


@dataclass(frozen=True)
class Quantised(Entry):
    """A tensor that is stored as codes and their scales; its shape and dtype are those of its numbers."""

    scale: Entry

    def read_into(self, target: Tensor) -> None:
        """Fill `target` with the numbers, rounded once, to its dtype; raises as `check`, and at an early end."""
        self.check(target)
        self.read_part(target, [slice(0, size) for size in self.shape])

    def at(self, n: int) -> Quantised:
        """The n-th matrix of a stack, or stack of a stack."""
        return replace(super().at(n), scale=self.scale.at(n))


@dataclass(frozen=True)
class Fp8(Quantised):
    """Numbers [..., R, C] of scales [..., ceil(R / block[0]), ceil(C / block[1])]; a piece begins at row `first`."""

    block: tuple[int, int]
    first: int = 0

    def rows(self, first: int, count: int) -> Fp8:
        """Some along the first dimension."""
        part = super().rows(first, count)
        if len(self.shape) > 2:
            return replace(part, scale=self.scale.rows(first, count))
        return replace(part, first=self.first + first)

    def read_part(self, target: Tensor, box: Sequence[slice]) -> int:
        """As `Entry.read_part`; the scales of the part's rows are read with it, and counted."""
        target = target.detach()
        if len(self.shape) > 2:
            numbers = range(box[0].start, box[0].stop)
            return sum(self.at(n).read_part(part, box[1:]) for n, part in zip(numbers, target))
        start, stop = self.first + box[0].start, self.first + box[0].stop
        codes, count = _bytes(self, self.shape, box)
        values = looked_up(e4m3(), codes).to(torch.promote_types(target.dtype, torch.float32))
        height, width = self.block
        blocks = range(start // height, -(-stop // height))
        scales, more = _scales(self.scale, [slice(blocks.start, blocks.stop), slice(0, self.scale.shape[1])])
        for block, scale in zip(blocks, scales.repeat_interleave(width, 1)[:, box[1]]):
            values[max(block * height - start, 0) : (block + 1) * height - start].mul_(scale)
        target.copy_(values)
        return count + more

    def read_codes(self, codes: Tensor, scales: Tensor) -> None:
        """Fill codes [R, C], as bytes, and float32 scales with a matrix's own; ValueError where some are not finite."""
        own, _ = _bytes(self, self.shape, [slice(0, size) for size in self.shape])
        factors, _ = _scales(self.scale, [slice(0, size) for size in self.scale.shape])
        if not factors.isfinite().all() or (own & 127 == 127).any():
            raise ValueError("numbers that are not finite cannot be kept in few bits")
        codes.copy_(own)
        scales.copy_(factors)


@dataclass(frozen=True)
class Mxfp4(Quantised):
    """Numbers [E, C, R] of codes [E, R, C / 32, 16]: transformers' gpt-oss holds experts the other way round."""

    def rows(self, first: int, count: int) -> Mxfp4:
        """Some along the first dimension."""
        return replace(super().rows(first, count), scale=self.scale.rows(first, count))

    def read_part(self, target: Tensor, box: Sequence[slice]) -> int:
        """As `Entry.read_part`, where a row is one of the codes, along the last dimension of the numbers."""
        if len(self.shape) > 2:
            numbers = range(box[0].start, box[0].stop)
            return sum(self.at(n).read_part(part, box[1:]) for n, part in zip(numbers, target.detach()))
        groups = self.shape[0] // GROUP
        codes, count = _bytes(self, (self.shape[1], groups, GROUP // 2), [box[1], slice(0, groups), slice(0, 16)])
        scales, more = _scales(self.scale, [box[1], slice(0, groups)])
        scales = scales.to(torch.promote_types(target.dtype, torch.float32))
        values = looked_up(e2m1_pairs(), codes) * scales[..., None]
        target.copy_(values.flatten(1).T[box[0]])
        return count + more


def settings_of(raw: Mapping[str, Any]) -> Any:
    """What a configuration says of its quantisation, nothing where it has none."""
    text = raw.get("text_config")
    return raw.get("quantization_config") or (isinstance(text, Mapping) and text.get("quantization_config"))


def method_of(raw: Mapping[str, Any], where: Path) -> str | None:
    """A checkpoint's quant_method, None where it has none; raises ValueError for one that is not of METHODS."""
    settings = settings_of(raw)
    if not settings:
        return None
    method = settings.get("quant_method", "unknown") if isinstance(settings, Mapping) else settings
    if method not in METHODS or not isinstance(settings, Mapping):
        raise ValueError(
            f"{where}: the checkpoint is quantised (quantization_config.quant_method={method!r}); expected float32, "
            f"bfloat16 or float16 weights, or {', '.join(METHODS)}. Take or make an unquantised copy of it"
        )
    if (reader := _reader(method)) is not None:
        reader.check(method, settings, where)
    return method


def _reader(method: str | None) -> Any:
    """The module that reads checkpoints of a method, None for those that this one reads."""
    from . import bitsandbytes, compressed, gptq

    readers = {"compressed-tensors": compressed, "modelopt": compressed, "gptq": gptq, "awq": gptq}
    return {**readers, "bitsandbytes": bitsandbytes}.get(str(method))


def dequantised(entries: Mapping[str, Entry], raw: Mapping[str, Any], where: Path) -> dict[str, Entry]:
    """A checkpoint's tensors by name, each quantised one with its scales in one entry that reads its numbers.

    raw: the configuration, of the file `where`. Nothing is read, but all shapes are checked.
    Raises ValueError as `method_of`, and naming file and tensor, for scales that are missing or wrong in shape or type.
    """
    settings, method = settings_of(raw), method_of(raw, where)
    if (reader := _reader(method)) is not None:
        return reader.dequantised(method, entries, settings, where)
    found: dict[str, Entry] = {}
    used: set[str] = set()
    for key, entry in entries.items():
        if method == "fp8" and entry.dtype == "F8_E4M3":
            found[key] = _fp8(entry, entries.get(f"{key}_scale_inv"), _block_of(settings, where))
            # Activations are not quantised here.
            used |= {f"{key}_scale_inv", f"{key.removesuffix('weight')}activation_scale", f"{key}_activation_scale"}
        elif method == "mxfp4" and key.endswith("_blocks"):
            name = key.removesuffix("_blocks")
            found[name] = _mxfp4(entry, name, entries.get(f"{name}_scales"))
            used |= {key, f"{name}_scales"}
    return {key: entry for key, entry in entries.items() if key not in used} | found


def plain(config: Any) -> Any:
    """A transformers configuration, changed to that of the dequantised model: bfloat16 where it names no such type."""
    parts = [part for part in (config, config.get_text_config()) if getattr(part, "quantization_config", None)]
    for part in parts:
        if getattr(part, "quantization_config", None):  # both may be one
            del part.quantization_config
    if parts and (config.dtype is None or config.dtype.itemsize < 2):
        config.dtype = torch.bfloat16
    return config


class Unread:
    """A tensor of the files in the place of one of a state dict, which transformers reads by `[...]` and then drops."""

    def __init__(self, entry: Entry, dtype: torch.dtype) -> None:
        entry.check(torch.empty(entry.shape, device="meta"))
        self.entry = entry
        self.dtype = dtype if isinstance(entry, Quantised) else DTYPES[entry.dtype]

    def __getitem__(self, index: Any) -> Tensor:
        """The tensor, of dtype where it was quantised and as it is stored elsewhere, indexed."""
        tensor = torch.empty(self.entry.shape, dtype=self.dtype, device="cpu")
        self.entry.read_into(tensor)
        return tensor[index]


def _block_of(settings: Mapping[str, Any], where: Path) -> tuple[int, int] | None:
    """Rows and columns of a block, None where a matrix has one scale."""
    block = settings.get("weight_block_size", BLOCK)
    if block is None:
        return None
    if not (isinstance(block, Sequence) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
        raise ValueError(f"{where}: weight_block_size: expected rows and columns of a block, or null, got {block!r}")
    return block[0], block[1]


def _fp8(codes: Entry, scale: Entry | None, block: tuple[int, int] | None) -> Fp8:
    if len(codes.shape) < 2:
        raise ValueError(f"{codes.path}: tensor {codes.key} is FP8 of shape {list(codes.shape)}; expected a matrix")
    *stack, rows, columns = codes.shape
    name = f"{codes.key}_scale_inv"
    if scale is None:
        raise ValueError(f"{codes.path}: tensor {codes.key} is FP8, but its scales {name} are missing")
    if math.prod(scale.shape) == math.prod(stack) and (block is None or len(scale.shape) < 2):
        block, scale = (max(rows, 1), max(columns, 1)), replace(scale, shape=(*stack, 1, 1))
    grid = (1, 1) if block is None else (-(-rows // block[0]), -(-columns // block[1]))
    _check_scale(scale, (*stack, *grid), ("F32", "BF16", "F16", "F8_E8M0", "U8"), codes)
    assert block is not None  # one scale a matrix has been found, or refused
    return Fp8(codes.path, codes.key, "BF16", codes.shape, codes.start, codes.stop, scale, block)


def _mxfp4(codes: Entry, name: str, scale: Entry | None) -> Mxfp4:
    if codes.dtype != "U8" or len(codes.shape) != 4 or codes.shape[-1] != GROUP // 2:
        raise ValueError(
            f"{codes.path}: tensor {codes.key} is {codes.dtype} of shape {list(codes.shape)}; expected U8 of "
            "[experts, rows, columns / 32, 16]"
        )
    if scale is None:
        raise ValueError(f"{codes.path}: tensor {codes.key} is MXFP4, but its scales {name}_scales are missing")
    experts, rows, groups, _ = codes.shape
    _check_scale(scale, (experts, rows, groups), ("U8", "F8_E8M0"), codes)
    return Mxfp4(codes.path, name, "BF16", (experts, groups * GROUP, rows), codes.start, codes.stop, scale)


def _check_scale(scale: Entry, shape: tuple[int, ...], dtypes: tuple[str, ...], codes: Entry) -> None:
    if scale.shape != shape:
        raise ValueError(
            f"{scale.path}: tensor {scale.key} has shape {list(scale.shape)}, expected {list(shape)}: {codes.key} has "
            f"{list(codes.shape)}"
        )
    if scale.dtype not in dtypes:
        raise ValueError(f"{scale.path}: tensor {scale.key} is stored as {scale.dtype}; expected {', '.join(dtypes)}")


def _bytes(entry: Entry, shape: tuple[int, ...], box: Sequence[slice]) -> tuple[Tensor, int]:
    """A part of the codes, of this shape, as bytes; and how many were read for it."""
    codes = Entry(entry.path, entry.key, "U8", shape, entry.start, entry.stop)
    part = torch.empty(
        [len(range(*side.indices(size))) for side, size in zip(box, shape)], dtype=torch.uint8, device="cpu"
    )
    return part, codes.read_part(part, box)


def _scales(scale: Entry, box: Sequence[slice]) -> tuple[Tensor, int]:
    """A part of the scales, [r, c] in float32, and how many bytes that took."""
    shape = [part.stop - part.start for part in box]
    if scale.dtype in ("U8", "F8_E8M0"):
        codes = torch.empty(shape, dtype=torch.uint8, device="cpu")
        count = replace(scale, dtype="U8").read_part(codes, box)
        return looked_up(e8m0(), codes), count
    values = torch.empty(shape, dtype=torch.float32, device="cpu")
    return values, scale.read_part(values, box)
