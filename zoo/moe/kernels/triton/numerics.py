"""Products and stores as a GPU does them, on the Triton interpreter too, and accumulators in slices.

With TRITON_INTERPRET=1 triton's own `dot` multiplies the bit patterns of bfloat16 operands, and its casts to
bfloat16 cut off where hardware rounds to nearest.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# Triton itself reads the variable once, when kernels are defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
FIX = tl.constexpr(INTERPRETED)


@triton.jit
def dot(u: tl.tensor, v: tl.tensor, acc: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """acc + u @ v in float32."""
    if FIX:
        u = u.to(tl.float32)
        v = v.to(tl.float32)
    return tl.dot(u, v, acc, input_precision=PRECISION)


@triton.jit
def store(pointer: tl.tensor, value: tl.tensor, mask: tl.tensor) -> None:
    """Store float32 values, rounded to nearest even in the pointer's dtype."""
    if FIX and pointer.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        value = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    tl.store(pointer, value, mask=mask)


@triton.jit
def halves(acc: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Left and right half of the columns of acc; moves nothing between threads."""
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def quarters(acc: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr) -> tuple[tl.tensor, ...]:
    """The columns of acc in four slices, so that an epilogue needs registers for one slice at a time."""
    left, right = halves(acc, BLOCK_M, BLOCK_N)
    a, b = halves(left, BLOCK_M, BLOCK_N // 2)
    c, d = halves(right, BLOCK_M, BLOCK_N // 2)
    return a, b, c, d
