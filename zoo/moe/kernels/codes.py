"""Numbers of few bits: codes, and a scale for each block of them; what experts are kept in to save memory.

    float8   E4M3 (2209.05433), a float32 scale for 128 x 128 numbers, as DeepSeek-V3 keeps weights (2412.19437, 3.3)
    mxfp4    E2M1, a power of two for 32 numbers of a row (OCP Microscaling Formats 1.0), as gpt-oss keeps experts
    int8     integers up to 127, a float32 scale for each row (MoQE 2310.02410 rounds experts alone in this way)

Matrices [..., R, C], of which the last dimension is summed over in a product. Scales are the smallest with which the
largest number of a block fits; of MXFP4 they are the standard's, 2^(floor(log2 largest) - 2), where it may be cut.

Decoding moves bits: a code's sign, exponent and mantissa go where another type has them, and a power of two makes up
for the exponent's other bias. On the CPU that is done in cache, some rows at a time, by way of float16: the processor
widens that by itself, small numbers without an exponent too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from . import memory

BLOCK = 128  # rows and columns that share a float8 scale
GROUP = 32  # numbers of a row that share an MXFP4 scale
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
IN_CACHE = 1 << 18  # numbers that are decoded at a time on the CPU
SHORT = 512  # columns up to which more than one row of float8 scales is among them
PACKED = 32  # what torch's product with int8 weights reads of a row at a time, past its end if need be

Size = tuple[tuple[int, int], torch.dtype]


@dataclass(frozen=True)
class Format:
    """One way to keep matrices.

    encode(values) -> codes, scales; sizes(R, C) -> shapes and dtypes of codes and scales of one matrix. Rows of codes,
    of which every `height` have a row of scales, mean numbers(codes, scales, kind), kind being bfloat16 or float32; on
    the CPU fill(codes, wide, out) * factors(scales, R, C) * unit: fill gives float32 by way of `wide`, in int16, and
    factors are [R, C], or [R, C / 2] for each half, or one dimension is 1. Where numbers are `woven` every second one
    of a row comes first, then the others.
    """

    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    numbers: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    fill: Callable[[Tensor, Tensor, Tensor], Tensor]
    factors: Callable[[Tensor, int, int], Tensor]
    sizes: Callable[[int, int], tuple[Size, Size]]
    unit: float = 1.0
    height: int = 1
    woven: bool = False

    def decode(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """The values [..., R, C] of codes that `encode` gave, rounded to dtype."""
        if codes.device.type != "cpu":
            kind = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
            values = self.numbers(codes, scales, kind).to(dtype)
            return values.unflatten(-1, (2, -1)).mT.flatten(-2) if self.woven else values
        codes_of, scales_of = codes.view(-1, *codes.shape[-2:]), scales.view(-1, *scales.shape[-2:])
        columns = codes.shape[-1] * (2 if self.woven else 1)
        out = memory.empty((len(codes_of), codes.shape[-2], columns), dtype)
        for target, matrix in zip(out, zip(codes_of, scales_of)):
            for rows, values, factors in self._in_cache(*matrix):
                if self.unit != 1.0:
                    values.mul_(self.unit)  # by itself: its product with the largest factor may be no number
                _scale(values, factors)
                if self.woven:  # the one kernel of torch that weaves quickly
                    values = torch.complex(*values.chunk(2, 1)).view(torch.float32)
                target[rows] = values
        return out.view(*codes.shape[:-1], columns)

    def linear(self, x: Tensor, codes: Tensor, scales: Tensor, out: Tensor) -> None:
        """out [M, R] = x [M, C] @ values [R, C] transposed, for few rows on the CPU: the time goes into decoding."""
        if codes.dtype == torch.int8 and x.dtype == torch.bfloat16 and not codes.shape[1] % PACKED:
            out.copy_(torch._weight_int8pack_mm(x, codes, scales[:, 0].to(x.dtype)))
            return
        x = x.float() * self.unit
        if self.woven:
            x = x.unflatten(-1, (-1, 2)).mT.flatten(-2)
        product = x.new_empty(len(x), len(codes))
        for rows, values, factors in self._in_cache(codes, scales):
            # What columns or rows have in common costs less when x or the product has it.
            of_columns = factors.shape == (1, x.shape[1])
            of_rows = not of_columns and factors.shape == (len(values), 1)
            if not (of_columns or of_rows):
                _scale(values, factors)
            torch.mm(x * factors if of_columns else x, values.T, out=product[:, rows])
            if of_rows:
                product[:, rows].mul_(factors.T)
        out.copy_(product)

    def _in_cache(self, codes: Tensor, scales: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Some rows at a time of what codes mean, and by what they are to be multiplied."""
        columns = codes.shape[1] * (2 if self.woven else 1)
        # One row of scales at a time where that is no small part: columns have them in common then.
        height = IN_CACHE // max(columns, 1) if self.height == 1 or columns < SHORT else 1
        step = min(max(1, height // self.height) * self.height, len(codes))
        values = memory.empty((step, columns), torch.float32)  # fresh pages cost as much as decoding
        wide = torch.empty((step, columns), dtype=torch.int16)
        for start in range(0, len(codes), step):
            rows = slice(start, min(start + step, len(codes)))
            count = rows.stop - start
            factors = self.factors(scales[start // self.height : -(-rows.stop // self.height)], count, columns)
            yield rows, self.fill(codes[rows], wide[:count], values[:count]), factors


def _scale(values: Tensor, factors: Tensor) -> None:
    values.unflatten(1, (-1, factors.shape[1])).mul_(factors[:, None])


def _largest(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    largest = values.abs().amax(dims)
    if not values.is_meta and not torch.isfinite(largest).all():
        raise ValueError("numbers that are not finite cannot be kept in few bits")
    return largest


def _moved(codes: Tensor, kind: torch.dtype, exponent: int, mantissa: int) -> Tensor:
    """Bytes of a sign and so many bits, from the top, as the numbers they mean but for a power of two.

    Widening repeats the sign, which stays at the top; what lies below it moves left to where `kind` has it.
    """
    integer, bits = (torch.int16, 7) if kind == torch.bfloat16 else (torch.int32, 23)
    kept = ((1 << (exponent + mantissa)) - 1) << (bits - mantissa)
    sign = -(1 << (8 * kind.itemsize - 1))
    left = bits + exponent - 7
    return codes.view(torch.int8).to(integer).bitwise_left_shift_(left).bitwise_and_(sign | kept).view(kind)


def _through_half(wide: Tensor, out: Tensor, exponent: int, mantissa: int) -> Tensor:
    """The same on the CPU: bytes in int16 to float32, by way of float16, which is left in the bytes' place."""
    kept = ((1 << (exponent + mantissa)) - 1) << (10 - mantissa)
    wide.mul_(1 << (exponent + 3)).bitwise_and_(-(1 << 15) | kept)
    return out.copy_(wide.view(torch.float16))


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


def _spread(scales: Tensor, rows: int, columns: int) -> Tensor:
    """A scale [..., R / 128, C / 128] for each number [..., R, C]."""
    wide = scales.repeat_interleave(BLOCK, -1)[..., :columns]
    return wide.repeat_interleave(BLOCK, -2)[..., :rows, :]


def _encode_float8(values: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = values.shape[-2:]
    padding = (0, _blocks(columns) * BLOCK - columns, 0, _blocks(rows) * BLOCK - rows)
    tiles = torch.nn.functional.pad(values.float(), padding) if any(padding) else values.float()
    tiles = tiles.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))  # [..., R / 128, 128, C / 128, 128]
    scales = _largest(tiles, (-3, -1)) / torch.finfo(torch.float8_e4m3fn).max
    scales = torch.where(scales > 0, scales, 1.0)
    codes = (tiles / scales[..., :, None, :, None]).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes.flatten(-4, -3).flatten(-2)[..., :rows, :columns], scales


def _float8(codes: Tensor, scales: Tensor, kind: torch.dtype) -> Tensor:
    values = _moved(codes, kind, exponent=4, mantissa=3).mul_(2.0**120)
    rows, columns = values.shape[-2:]
    if rows == BLOCK:
        return values.mul_(scales.repeat_interleave(BLOCK, -1)[..., :columns])
    return values.mul_(_spread(scales, rows, columns))


def _fill_float8(codes: Tensor, wide: Tensor, out: Tensor) -> Tensor:
    return _through_half(wide.copy_(codes.view(torch.int8)), out, exponent=4, mantissa=3)


def _factors_float8(scales: Tensor, rows: int, columns: int) -> Tensor:
    wide = (scales * 2.0**8)[..., None].expand(-1, -1, BLOCK).flatten(1)[:, :columns]  # of float16's bias
    return wide if len(scales) == 1 else wide.repeat_interleave(BLOCK, 0)[:rows]


def _encode_mxfp4(values: Tensor) -> tuple[Tensor, Tensor]:
    groups = values.float().unflatten(-1, (-1, GROUP))
    largest = _largest(groups, (-1,))
    exponent = torch.where(largest > 0, torch.frexp(largest).exponent - 3, 0).clamp(-127, 127)
    # Half at a time: 2^127 twice is no float32.
    scaled = torch.ldexp(torch.ldexp(groups, -(exponent // 2)[..., None]), (exponent // 2 - exponent)[..., None])
    codes = torch.bucketize(scaled.abs(), _bounds().to(values.device))
    codes = codes.to(torch.uint8) + 8 * torch.signbit(scaled).to(torch.uint8)
    pairs = codes.flatten(-2).unflatten(-1, (-1, 2))
    return pairs[..., 0] + 16 * pairs[..., 1], (exponent + 127).to(torch.uint8)


@functools.cache
def _bounds() -> Tensor:
    """Between the numbers of E2M1; a tie has the even code, so every second bound belongs to what lies above it."""
    bounds = torch.tensor([(a + b) / 2 for a, b in pairwise(E2M1)], device="cpu")
    bounds[1::2] = torch.nextafter(bounds[1::2], torch.zeros(3, device="cpu"))
    return bounds


def _mxfp4(codes: Tensor, scales: Tensor, kind: torch.dtype) -> Tensor:
    signed = codes.view(torch.int8)
    values = torch.cat([_moved(half, kind, exponent=2, mantissa=1) for half in (signed << 4, signed & -16)], -1)
    powers = _powers(scales).to(kind).repeat_interleave(GROUP // 2, -1)
    # In two steps: 2^126, which makes up for the bias, by the largest power is no number of either kind.
    values.mul_(2.0**126).unflatten(-1, (2, -1)).mul_(powers[..., None, :])
    return values


def _fill_mxfp4(codes: Tensor, wide: Tensor, out: Tensor) -> Tensor:
    signed, columns = codes.view(torch.int8), codes.shape[1]
    wide[:, :columns] = signed << 4
    wide[:, columns:] = signed
    return _through_half(wide, out, exponent=2, mantissa=1)


def _factors_mxfp4(scales: Tensor, rows: int, columns: int) -> Tensor:
    return _powers(scales)[..., None].expand(-1, -1, GROUP // 2).flatten(1)


def _powers(scales: Tensor) -> Tensor:
    """2^(byte - 127) of scales up to 254: a float32 with the exponent, 2^-127 among those without one."""
    return (scales.int() << 23).clamp_(min=1 << 22).view(torch.float32)


def _sizes_mxfp4(rows: int, columns: int) -> tuple[Size, Size]:
    if columns % GROUP:
        raise ValueError(f"mxfp4: rows of {columns} numbers do not divide into groups of {GROUP}; take float8 or int8")
    return ((rows, columns // 2), torch.uint8), ((rows, columns // GROUP), torch.uint8)


def _encode_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    values = values.float()
    scales = _largest(values, (-1,))[..., None] / 127
    scales = torch.where(scales > 0, scales, 1.0)
    return (values / scales).round_().clamp_(-127, 127).to(torch.int8), scales


FORMATS: dict[str, Format] = {
    "float8": Format(
        _encode_float8,
        _float8,
        _fill_float8,
        _factors_float8,
        lambda r, c: (((r, c), torch.uint8), ((_blocks(r), _blocks(c)), torch.float32)),
        height=BLOCK,
    ),
    "mxfp4": Format(_encode_mxfp4, _mxfp4, _fill_mxfp4, _factors_mxfp4, _sizes_mxfp4, 2.0**14, woven=True),
    "int8": Format(
        _encode_int8,
        lambda codes, scales, kind: codes.to(kind).mul_(scales),
        lambda codes, wide, out: out.copy_(codes),
        lambda scales, rows, columns: scales,
        lambda r, c: (((r, c), torch.int8), ((r, 1), torch.float32)),
    ),
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
