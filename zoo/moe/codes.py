"""Numbers of few bits: codes, and a scale for each block of them; what experts are kept in to save memory.

    float8   E4M3 (2209.05433), a float32 scale for 128 x 128 numbers, as DeepSeek-V3 keeps weights (2412.19437, 3.3)
    mxfp4    E2M1, a power of two for 32 numbers of a row (OCP Microscaling Formats 1.0), as gpt-oss keeps experts
    int8     integers up to 127, a float32 scale for each row (MoQE 2310.02410 rounds experts alone in this way)

Matrices [..., R, C], of which the last dimension is summed over in a product. Scales are the smallest with which the
largest number of a block fits; of MXFP4 they are the standard's, 2^(floor(log2 largest) - 2), where it may be cut.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

BLOCK = 128  # rows and columns that share a float8 scale
GROUP = 32  # numbers of a row that share an MXFP4 scale
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Format:
    """One way to keep matrices: encode(values) -> codes, scales; decode(codes, scales, dtype) -> values, rounded once.

    sizes(rows, columns) are the shapes and dtypes of codes and scales of one matrix.
    """

    name: str
    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    decode: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    sizes: Callable[[int, int], tuple[tuple[tuple[int, int], torch.dtype], tuple[tuple[int, int], torch.dtype]]]


def _largest(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    largest = values.abs().amax(dims)
    if not values.is_meta and not torch.isfinite(largest).all():
        raise ValueError("numbers that are not finite cannot be kept in few bits")
    return largest


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


def _spread(scales: Tensor, rows: int, columns: int) -> Tensor:
    """A scale [..., R / 128, C / 128] for each number [..., R, C]."""
    wide = scales.repeat_interleave(BLOCK, -1)[..., :columns]
    return wide.repeat_interleave(BLOCK, -2)[..., :rows, :]


def _encode_float8(values: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = values.shape[-2:]
    padding = (0, _blocks(columns) * BLOCK - columns, 0, _blocks(rows) * BLOCK - rows)
    tiles = torch.nn.functional.pad(values.float(), padding)
    tiles = tiles.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))  # [..., R / 128, 128, C / 128, 128]
    scales = _largest(tiles, (-3, -1)) / torch.finfo(torch.float8_e4m3fn).max
    scales = torch.where(scales > 0, scales, 1.0)
    codes = values.float() / _spread(scales, rows, columns)
    return codes.to(torch.float8_e4m3fn).view(torch.uint8), scales


def _decode_float8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    if codes.device.type == "cpu" and wide == torch.float32:
        values = looked_up(e4m3(), codes)
    else:
        values = codes.view(torch.float8_e4m3fn).to(wide)
    rows, columns = values.shape[-2:]
    if rows % BLOCK == 0 and rows:
        wide_scales = scales.repeat_interleave(BLOCK, -1)[..., None, :columns]
        values.unflatten(-2, (-1, BLOCK)).mul_(wide_scales)
    else:
        values.mul_(_spread(scales, rows, columns))
    return values.to(dtype)


def _encode_mxfp4(values: Tensor) -> tuple[Tensor, Tensor]:
    groups = values.float().unflatten(-1, (-1, GROUP))
    largest = _largest(groups, (-1,))
    exponent = torch.where(largest > 0, torch.frexp(largest).exponent - 3, 0).clamp(-127, 127)
    # Half at a time: 2^127 twice is no float32.
    scaled = torch.ldexp(torch.ldexp(groups, -(exponent // 2)[..., None]), (exponent // 2 - exponent)[..., None])
    codes = torch.bucketize(scaled.abs(), _bounds().to(values.device)).to(torch.uint8) + 8 * torch.signbit(scaled).to(
        torch.uint8
    )
    pairs = codes.flatten(-2).unflatten(-1, (-1, 2))
    return pairs[..., 0] + 16 * pairs[..., 1], (exponent + 127).to(torch.uint8)


@functools.cache
def _bounds() -> Tensor:
    """Between the numbers of E2M1; a tie has the even code, so every second bound belongs to what lies above it."""
    bounds = torch.tensor([(a + b) / 2 for a, b in pairwise(E2M1)], device="cpu")
    bounds[1::2] = torch.nextafter(bounds[1::2], torch.zeros(3, device="cpu"))
    return bounds


def _decode_mxfp4(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    if codes.device.type == "cpu" and wide == torch.float32:
        values, powers = looked_up(e2m1_pairs(), codes), looked_up(e8m0(), scales)
    else:
        values = e2m1_pairs().to(codes.device, wide)[codes.int()].flatten(-2)
        powers = e8m0().to(codes.device, wide)[scales.int(), 0]
    values.unflatten(-1, (-1, GROUP)).mul_(powers[..., None])
    return values.to(dtype)


def _sizes_mxfp4(rows: int, columns: int):  # type: ignore[no-untyped-def]
    if columns % GROUP:
        raise ValueError(f"mxfp4: rows of {columns} numbers do not divide into groups of {GROUP}; take float8 or int8")
    return ((rows, columns // 2), torch.uint8), ((rows, columns // GROUP), torch.uint8)


def _encode_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    values = values.float()
    scales = _largest(values, (-1,))[..., None] / 127
    scales = torch.where(scales > 0, scales, 1.0)
    return (values / scales).round_().clamp_(-127, 127).to(torch.int8), scales


def _decode_int8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return (codes.to(torch.promote_types(dtype, torch.float32)) * scales).to(dtype)


FORMATS: dict[str, Format] = {
    "float8": Format(
        "float8",
        _encode_float8,
        _decode_float8,
        lambda r, c: (((r, c), torch.uint8), ((_blocks(r), _blocks(c)), torch.float32)),
    ),
    "mxfp4": Format("mxfp4", _encode_mxfp4, _decode_mxfp4, _sizes_mxfp4),
    "int8": Format("int8", _encode_int8, _decode_int8, lambda r, c: (((r, c), torch.int8), ((r, 1), torch.float32))),
}


def looked_up(table: Tensor, codes: Tensor) -> Tensor:
    """What each byte of [..., n] means, a row of float32 [256, m]: [..., n * m]; numpy is four times torch's speed."""
    rows = table.numpy().view(f"u{table[0].nbytes}")[:, 0]
    return torch.from_numpy(rows.take(codes.numpy(), mode="clip").view("float32"))


@functools.cache
def e4m3() -> Tensor:
    """The number of each byte, [256, 1]."""
    codes = torch.arange(256, dtype=torch.uint8, device="cpu")
    return codes.view(torch.float8_e4m3fn).to(torch.float32)[:, None]


@functools.cache
def e2m1_pairs() -> Tensor:
    """The two numbers of each byte, the low half first, [256, 2]."""
    numbers = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float32, device="cpu")
    return torch.stack([numbers.repeat(16), numbers.repeat_interleave(16)], dim=1)


@functools.cache
def e8m0() -> Tensor:
    """2^(byte - 127), at last NaN, [256, 1]; the first is too small for exp2."""
    powers = [2.0 ** (code - 127) for code in range(255)]
    return torch.tensor([*powers, math.nan], dtype=torch.float32, device="cpu")[:, None]
