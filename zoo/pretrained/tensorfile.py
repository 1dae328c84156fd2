"""Reading and writing safetensors files one tensor at a time, straight into and out of the tensors' own memory.

The format: 8 bytes, little endian, the header's length; a JSON header {name: {dtype, shape, data_offsets}}; the bytes.
The library maps whole files into memory, where they count against a process; here a file is read where it is needed,
so that loading a checkpoint takes the model's memory and no more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.float8_e4m3fn: "F8_E4M3"}
FLOAT8 = ("F8_E4M3", "F8_E8M0")  # a byte each; `quantised` reads them
MAX_HEADER = 100_000_000  # the library's own limit


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its format's dtype name, shape, and where its bytes lie."""

    path: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def check(self, target: Tensor) -> None:
        """Raise ValueError, naming file and key, unless this tensor can fill `target`: its shape, an ordinary dtype."""
        if self.shape != tuple(target.shape):
            raise ValueError(
                f"{self.path}: tensor {self.key} has shape {list(self.shape)}, expected {list(target.shape)}"
            )
        if self.dtype not in DTYPES:
            raise ValueError(
                f"{self.path}: tensor {self.key} is stored as {self.dtype}; quantised weights are not read"
            )

    def rows(self, first: int, count: int) -> Self:
        """Some of the tensor along its first dimension, as one."""
        size = (self.stop - self.start) // max(self.shape[0], 1)
        start = self.start + first * size
        return replace(self, shape=(count, *self.shape[1:]), start=start, stop=start + count * size)

    def at(self, n: int) -> Self:
        """The n-th along the first dimension, which it does not have."""
        return replace(Entry.rows(self, n, 1), shape=self.shape[1:])

    def read_into(self, target: Tensor) -> None:
        """Fill `target`, converting dtype and device where they differ; raises as `check`, and at an early end."""
        self.check(target)
        dtype, target = DTYPES[self.dtype], target.detach()
        direct = _direct(target, dtype)
        buffer = target if direct else torch.empty(self.shape, dtype=dtype, device="cpu")
        if buffer.numel():
            # Unbuffered: Python's own buffer would copy every byte once more.
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.start)
                self._fill(file, buffer.reshape(-1).view(torch.uint8).numpy().data)
        if not direct:
            target.copy_(buffer)

    def read_part(self, target: Tensor, box: Sequence[slice]) -> int:
        """Fill `target` with a part of this tensor; returns the bytes read: those of the rows that the part is in.

        A row is along the first dimension, or of stacked matrices along the second.
        """
        dtype, target = DTYPES[self.dtype], target.detach()
        if not box:
            self.read_into(target)
            return self.stop - self.start
        if len(box) > 2 and box[1] != slice(0, self.shape[1]):
            numbers = range(box[0].start, box[0].stop)
            return sum(self.at(n).read_part(part, box[1:]) for n, part in zip(numbers, target))
        rows, row = box[0], math.prod(self.shape[1:]) * dtype.itemsize
        shape = (rows.stop - rows.start, *self.shape[1:])
        direct = _direct(target, dtype) and target.shape == shape
        buffer = target if direct else torch.empty(shape, dtype=dtype, device="cpu")
        if buffer.numel():
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.start + rows.start * row)
                self._fill(file, buffer.reshape(-1).view(torch.uint8).numpy().data)
        if not direct:
            target.copy_(buffer[(slice(None), *box[1:])])
        return buffer.numel() * dtype.itemsize

    def _fill(self, file: Any, view: memoryview) -> None:
        done = 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise ValueError(f"{self.path}: truncated: tensor {self.key} ends after {done} of {len(view)} bytes")
            done += count


def _direct(target: Tensor, dtype: torch.dtype) -> bool:
    """Whether a file's bytes can be read into a tensor's memory as they are."""
    return target.dtype == dtype and target.device.type == "cpu" and target.is_contiguous()


@dataclass(frozen=True)
class Strand(Entry):
    """Every second number along the last dimension of another tensor, beginning with its first (0) or second (1)."""

    woven: Entry
    number: int

    @classmethod
    def of(cls, woven: Entry, number: int) -> Self:
        """One of the two."""
        shape = (*woven.shape[:-1], woven.shape[-1] // 2)
        return cls(woven.path, woven.key, woven.dtype, shape, woven.start, woven.stop, woven, number)

    def read_part(self, target: Tensor, box: Sequence[slice]) -> int:
        """As `Entry.read_part`; both strands are read."""
        sides = [*box[:-1], slice(2 * box[-1].start, 2 * box[-1].stop)]
        both = torch.empty([side.stop - side.start for side in sides], dtype=target.dtype, device="cpu")
        count = self.woven.read_part(both, sides)
        target.detach().copy_(both[..., self.number :: 2])
        return count


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of a safetensors file by name.

    Raises ValueError naming the file, and the tensor where one is at fault, when the file is truncated, is of another
    kind, or contradicts itself.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= MAX_HEADER:
            raise ValueError(f"{path}: not a safetensors file (is it a pickle, or a pointer that Git LFS left?)")
        if 8 + length > size:
            raise ValueError(f"{path}: truncated: its header alone has {length} bytes, the file {size}")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {key: _entry(path, key, value, 8 + length) for key, value in header.items()}
        except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a safetensors file: its header cannot be read ({error})") from None
    for entry in entries.values():
        if entry.stop > size:
            raise ValueError(f"{path}: truncated: tensor {entry.key} ends at byte {entry.stop}, the file at {size}")
    return entries


def _entry(path: Path, key: str, value: Mapping[str, Any], data: int) -> Entry:
    start, stop = value["data_offsets"]
    entry = Entry(path, key, str(value["dtype"]), tuple(value["shape"]), data + start, data + stop)
    if entry.dtype in DTYPES or entry.dtype in FLOAT8:
        expected = math.prod(entry.shape) * (DTYPES[entry.dtype].itemsize if entry.dtype in DTYPES else 1)
        if start < 0 or stop - start != expected:
            raise ValueError(
                f"{path}: tensor {key} of shape {list(entry.shape)} and type {entry.dtype} needs {expected} bytes, "
                f"the header gives it {stop - start}"
            )
    return entry


def read_all(state: Mapping[str, Tensor], stored: Mapping[str, Entry], where: Path) -> None:
    """Read every tensor of `state` from a file's, once all are known to be there, to fit, and to be all.

    Raises ValueError naming file and tensor.
    """
    for name in sorted(state.keys() ^ stored.keys()):
        problem = "is missing" if name in state else "is unknown to a model with these arguments"
        raise ValueError(f"{where}: tensor {name} {problem}")
    for name, entry in stored.items():
        entry.check(state[name])
    for name, entry in stored.items():
        entry.read_into(state[name])


def write_file(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write tensors to a safetensors file; each is copied to the CPU by itself, when it has to be.

    Raises ValueError for a dtype that the format does not have.
    """
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, tensor in tensors:
        if tensor.dtype not in NAMES:
            raise ValueError(f"{path}: tensor {key} has dtype {tensor.dtype}, which cannot be stored")
        stop = offset + tensor.numel() * tensor.itemsize
        shape = list(tensor.shape)
        header[key] = {"dtype": NAMES[tensor.dtype], "shape": shape, "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in tensors:
            if tensor.numel():
                flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
                file.write(flat.numpy().data)
