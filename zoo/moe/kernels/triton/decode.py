"""Weights in few bits as device functions: blocks of codes to numbers in registers, and what scales multiply.

A block lies as the product reads it, [BLOCK_K, BLOCK_N] numbers, whose rows of memory go along k in a forward
(ALONG_K) and along n in a backward. In bfloat16 every code is exact. Scales of float8 multiply what a block adds, in
float32; those of int8 the sums, or in a backward the other factor; those of MXFP4, powers of two, the codes' numbers.

Four bytes are decoded at a time by instructions of our own, two numbers an instruction: the compiler's take each number
by itself, three times as many, and then integer units limit the product instead of memory. Those below run on every
GPU from Ampere on. The interpreter and other types of tokens take the compiler's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..codes import BLOCK, GROUP
from .numerics import FIX, dot

SQUARE = tl.constexpr(BLOCK)
RUN = tl.constexpr(GROUP)
PAIRS = tl.constexpr(GROUP // 2)
SPARE = tl.constexpr(32)

# E4M3 in the upper byte of a half register: its sign stays, the rest goes right to where bfloat16 has it; the factor
# 2^120 makes up for the exponent's bias (small numbers without an exponent included).
FLOAT8 = tl.constexpr("""{
.reg .b32 a, b, s, t, f, z;
mov.b32 f, 0x7B807B80;
mov.b32 z, 0x80008000;
prmt.b32 a, $2, 0, 0x1404;
prmt.b32 b, $2, 0, 0x3424;
shr.u32 s, a, 4;
shr.u32 t, b, 4;
and.b32 s, s, 0x07F007F0;
and.b32 t, t, 0x07F007F0;
lop3.b32 a, a, 0x80008000, s, 0xEA;
lop3.b32 b, b, 0x80008000, t, 0xEA;
fma.rn.bf16x2 $0, a, f, z;
fma.rn.bf16x2 $1, b, f, z;
}""")

# 128 + the lower seven bits is a bfloat16 with these bits as its mantissa; 128, or 256 for a negative number, is taken
# away again.
INT8 = tl.constexpr("""{
.reg .b32 a, b, s, t, f, g, h;
mov.b32 f, 0x3F803F80;
mov.b32 g, 0x43004300;
mov.b32 h, 0xC300C300;
prmt.b32 a, $2, 0, 0x4140;
prmt.b32 b, $2, 0, 0x4342;
lop3.b32 s, a, 0x00800080, h, 0xEA;
lop3.b32 t, b, 0x00800080, h, 0xEA;
lop3.b32 a, a, 0x007F007F, g, 0xEA;
lop3.b32 b, b, 0x007F007F, g, 0xEA;
fma.rn.bf16x2 $0, a, f, s;
fma.rn.bf16x2 $1, b, f, t;
}""")

# Of bytes 0 2 | 1 3 a half register holds four codes, each of which is taken from both halves at once. Scales of the
# bytes are $5 and $6; 2^126 for the exponent's bias is in them.
MXFP4 = tl.constexpr("""{
.reg .b32 p, a, b, c, d, s, t, u, f, g, z;
mov.b32 f, $5;
mov.b32 g, $6;
mov.b32 z, 0x80008000;
prmt.b32 p, $4, 0, 0x3120;
shl.b32 a, p, 6;
shl.b32 c, p, 2;
shr.u32 b, p, 2;
shr.u32 d, p, 6;
shl.b32 s, p, 12;
shl.b32 u, p, 8;
shl.b32 t, p, 4;
and.b32 a, a, 0x01C001C0;
and.b32 b, b, 0x01C001C0;
and.b32 c, c, 0x01C001C0;
and.b32 d, d, 0x01C001C0;
lop3.b32 a, s, 0x80008000, a, 0xEA;
lop3.b32 b, t, 0x80008000, b, 0xEA;
lop3.b32 c, u, 0x80008000, c, 0xEA;
lop3.b32 d, p, 0x80008000, d, 0xEA;
fma.rn.bf16x2 $0, a, f, z;
fma.rn.bf16x2 $1, b, g, z;
fma.rn.bf16x2 $2, c, f, z;
fma.rn.bf16x2 $3, d, g, z;
}""")


@triton.jit
def bytes_of(codes: tl.tensor, dtype: tl.constexpr, FORMAT: tl.constexpr) -> tl.tensor:
    """What float8 or int8 codes mean without their scales."""
    if FIX or dtype != tl.bfloat16:
        if FORMAT == "float8":
            # Widening repeats the sign.
            bits = (codes.to(tl.int8, bitcast=True).to(tl.int32) << 20) & -0x78100000
            value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
        else:
            value = codes.to(tl.float32)
        if not FIX:
            value = value.to(dtype)
    else:
        if FORMAT == "float8":
            value = tl.inline_asm_elementwise(FLOAT8, "=r,=r,r", [codes], tl.bfloat16, is_pure=True, pack=4)
        else:
            value = tl.inline_asm_elementwise(INT8, "=r,=r,r", [codes], tl.bfloat16, is_pure=True, pack=4)
    return value


@triton.jit
def power(code: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """What `halves_of` multiplies by for scales of E8M0."""
    code = code.to(tl.int32)
    if dtype == tl.bfloat16:
        # 2^(code - 127 + 126 - SPARE): numbers by scales from 2^34 on are infinite, those below 2^-101 vanish.
        value = (tl.minimum(code + (126 - SPARE), 255) << 23).to(tl.float32, bitcast=True)
        if not FIX:
            value = value.to(tl.bfloat16)
    else:
        # 2^(code - 127); the smallest is among those without an exponent.
        value = tl.maximum(code << 23, 0x400000).to(tl.float32, bitcast=True)
    return value


@triton.jit
def halves_of(codes: tl.tensor, power: tl.tensor, dtype: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The first and the second numbers of MXFP4 bytes with what `power` makes of their scales."""
    if FIX or dtype != tl.bfloat16:
        wide = codes.to(tl.int32)
        # The sign repeated, and three bits where float32 has the lower of its exponent and the upper of its mantissa.
        low = (((wide << 28) >> 6) & -0x7E400000).to(tl.float32, bitcast=True)
        high = (((wide << 24) >> 6) & -0x7E400000).to(tl.float32, bitcast=True)
        if dtype != tl.bfloat16:
            # 2^126, not in one step: times the largest power it is no number.
            low, high = low * 8.507059173023462e37, high * 8.507059173023462e37
        low, high = low * power, high * power
        if not FIX:
            low, high = low.to(dtype), high.to(dtype)
    else:
        low, high = tl.inline_asm_elementwise(
            MXFP4, "=r,=r,=r,=r,r,r,r", [codes, power], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    return low, high


@triton.jit
def scale_block(
    scales: tl.tensor,
    first_n: tl.tensor,
    first_k: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    stride_sn: tl.tensor,
    stride_sk: tl.tensor,
    FORMAT: tl.constexpr,
    ALONG_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """The scales that `times` needs of a block, which may lie past the end; `scales` are those of an expert."""
    if FORMAT == "float8":
        # Blocks divide those that have scales of their own.
        at = (first_n // SQUARE) * stride_sn + (first_k // SQUARE) * stride_sk
        scale = tl.load(scales + at, mask=first_k < K, other=0.0)
    elif FORMAT == "int8" and not ALONG_K:
        k = first_k + tl.arange(0, BLOCK_K)
        scale = tl.load(scales + k * stride_sk, mask=k < K, other=0.0)
    elif FORMAT == "mxfp4" and ALONG_K:
        n = first_n + tl.arange(0, BLOCK_N)
        g = first_k // RUN + tl.arange(0, BLOCK_K // RUN)
        inside = (g < K // RUN)[:, None] & (n < N)[None, :]
        scale = tl.load(scales + g[:, None] * stride_sk + n[None, :] * stride_sn, mask=inside, other=0)
    elif FORMAT == "mxfp4":
        k = first_k + tl.arange(0, BLOCK_K)
        g = first_n // RUN + tl.arange(0, BLOCK_N // RUN)
        inside = (k < K)[:, None] & (g < N // RUN)[None, :]
        scale = tl.load(scales + k[:, None] * stride_sk + g[None, :] * stride_sn, mask=inside, other=0)
    else:
        scale = 0
    return scale


@triton.jit
def times(
    u: tl.tensor,
    v: tl.tensor,
    acc: tl.tensor,
    scale: tl.tensor,
    FORMAT: tl.constexpr,
    ALONG_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """acc + u @ what the block v means, but for what `rescaled` makes up for."""
    if FORMAT is None:
        acc = dot(u, v, acc, PRECISION)
    elif FORMAT == "float8":
        acc += dot(u, bytes_of(v, u.dtype, FORMAT), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION) * scale
    elif FORMAT == "int8":
        value = bytes_of(v, u.dtype, FORMAT)
        if not ALONG_K:
            scaled_u = u.to(tl.float32) * scale[None, :]
            u = scaled_u if FIX else scaled_u.to(u.dtype)
        acc = dot(u, value, acc, PRECISION)
    elif ALONG_K:
        scale = tl.broadcast_to(power(scale, u.dtype)[:, None, :], (BLOCK_K // RUN, PAIRS, BLOCK_N)).reshape(
            BLOCK_K // 2, BLOCK_N
        )
        low, high = halves_of(v, scale, u.dtype)
        # Every second number of a row, and the others: to weave the smaller factor's apart costs less.
        even, odd = tl.split(tl.reshape(u, (BLOCK_M, BLOCK_K // 2, 2)))
        acc = dot(even, low, acc, PRECISION)
        acc = dot(odd, high, acc, PRECISION)
    else:
        scale = tl.broadcast_to(power(scale, u.dtype)[:, :, None], (BLOCK_K, BLOCK_N // RUN, PAIRS)).reshape(
            BLOCK_K, BLOCK_N // 2
        )
        low, high = halves_of(v, scale, u.dtype)
        acc = dot(u, tl.interleave(low, high), acc, PRECISION)
    return acc


@triton.jit
def rescaled(
    acc: tl.tensor,
    scales: tl.tensor,
    n: tl.tensor,
    N: tl.tensor,
    stride_sn: tl.tensor,
    dtype: tl.constexpr,
    FORMAT: tl.constexpr,
    ALONG_K: tl.constexpr,
) -> tl.tensor:
    """The sums of columns n times what their weights were left without; dtype is that of the other factor."""
    if FORMAT == "int8" and ALONG_K:
        acc *= tl.load(scales + n * stride_sn, mask=n < N, other=0.0)[None, :]
    elif FORMAT == "mxfp4" and dtype == tl.bfloat16:
        acc *= 4294967296.0  # 2^SPARE
    return acc


@triton.jit
def scale_rows(rows: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """How many rows of scales so many rows of codes have."""
    if FORMAT == "float8":
        rows = tl.cdiv(rows, SQUARE)
    return rows
