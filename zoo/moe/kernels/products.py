"""Matrix products on the CPU: which of torch's libraries multiplies, and how its operands should lie.

In bfloat16 and float16 torch calls oneDNN, in float32 MKL. On AMD's processors MKL leaves AVX-512 unused, and oneDNN
is 1.7 to 2.4 times as fast (Zen 5, 2 cores), though it gives its result in memory of its own and compiles a product
for each new shape, in 0.3 to 4 ms: see `blocks`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

LOW_PRECISION = (torch.bfloat16, torch.float16)
# Rows of an expert up to which W @ x.T and a transposition beat x @ W.T.
FEW_ROWS = 32
# Elements of one weight up to which x @ w.T reads it fast enough for twice as many rows.
SMALL_WEIGHT = 1 << 20
# The same from which oneDNN reads a weight faster than MKL.
LARGE_WEIGHT = 1 << 17
# The same for one row, and from which MKL reads it faster when it turns a product of two rows or a few.
LARGER_WEIGHT = 1 << 19
# Rows up to which MKL, turning the product, reads it faster yet, if there are two.
TURNED = 4
# Multiplications of a product from which oneDNN's speed in float32 outweighs what a call of it costs.
LARGE = 1 << 23
# Elements of a result of oneDNN, to be copied into place: so many stay in cache, and in malloc's hands.
RESULT = 1 << 22
# Longest sum left to oneDNN, whose error grows with it: 1.6 times MKL's, 2.3 times at twice the length. One row's not.
LONGEST = 1 << 10


@cache
def _processor() -> tuple[str, frozenset[str]]:
    """Vendor and instruction sets as Linux names them; nothing elsewhere."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return "", frozenset()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    return fields.get("vendor_id", ""), frozenset(fields.get("flags", "").split())


@cache
def has_amx() -> bool:
    """Whether products in low precision go to AMX."""
    return "amx_tile" in _processor()[1]


@cache
def onednn_float32() -> bool:
    """Whether large products in float32 go to oneDNN."""
    return (
        _processor()[0] == "AuthenticAMD"
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def compiles(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies in this dtype, if products are large, and compiles a product for each new shape."""
    return dtype in LOW_PRECISION or (dtype == torch.float32 and onednn_float32())


def is_compiled(dtype: torch.dtype, multiplications: float) -> bool:
    """Whether it does so for a product of this size."""
    return compiles(dtype) and (dtype != torch.float32 or multiplications >= LARGE)


def cast(w: Tensor, dtype: torch.dtype) -> Tensor:
    """w in this dtype."""
    return w if w.dtype == dtype else w.to(dtype)  # the check is cheaper than a call that does nothing


def bmm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out [G, M, N] = a [G, M, K] @ b [G, K, N]; out lies by rows or by columns."""
    result = out
    if out.stride(2) != 1:
        a, b, out = b.mT, a.mT, out.mT
    if a.dtype != out.dtype:
        out.copy_(a @ b)
    elif a.dtype == torch.float32 and is_compiled(a.dtype, a.shape[1] * b[:1].numel()):
        for each in zip(a, b, out):
            _by_onednn(*each)
    elif a.shape[0] == 1:
        torch.mm(a[0], b[0], out=out[0])
    else:
        torch.bmm(a, b, out=out)
    return result


def _by_onednn(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out [M, N] = a [M, K] @ b [K, N] in float32."""
    rows = max(1, RESULT // out.shape[1])
    longest = LONGEST if len(a) > 1 else len(b)
    if len(a) <= rows and len(b) <= longest:  # to cut into one piece takes longer than a small product
        out.copy_(torch.ops.mkldnn._linear_pointwise(_dense(a), _dense(b).mT, None, "none", [], ""))
        return
    for left, part in zip(a.split(rows), out.split(rows)):
        total = None
        for u, v in zip(left.split(longest, 1), b.split(longest)):
            product = torch.ops.mkldnn._linear_pointwise(_dense(u), _dense(v).mT, None, "none", [], "")
            total = product if total is None else total.add_(product)
        part.copy_(total)


def _dense(matrix: Tensor) -> Tensor:
    """A matrix without gaps, by rows or by columns: others oneDNN multiplies a thousand times as slowly."""
    return matrix.mT.contiguous().mT if matrix.stride(0) == 1 else matrix.contiguous()


def linear(x: Tensor, w: Tensor, out: Tensor) -> None:
    """out [G, M, N] = x [G, M, K] @ w [G, N, K] transposed."""
    rows, low = x.shape[1], x.dtype in LOW_PRECISION
    turns = rows <= FEW_ROWS if low else 4 <= rows <= FEW_ROWS and not is_compiled(x.dtype, rows * w[:1].numel())
    if not turns or out.stride(2) != 1:
        bmm(x, w.mT, out)
    elif len(x) == 1:
        out[0].copy_(torch.mm(w[0], x[0].T).T)
    else:
        out.copy_((w @ x.mT).mT)


def linear_of_few(x: Tensor, w: Tensor, b: Tensor | None, out: Tensor) -> None:
    """out [M, N] = x [M, K] @ w [N, K] transposed + b, for few rows: the time goes into reading w, once if possible."""
    rows, w = len(x), cast(w, x.dtype)
    if (rows > TURNED and reads_by_onednn(w)) or (rows == 1 and reads_by_onednn(w, LARGER_WEIGHT)):
        _by_onednn(x, w.T, out)
    elif rows == 1 and (has_amx() or x.dtype not in LOW_PRECISION):
        torch.mv(w, x[0], out=out[0])
    elif rows <= FEW_ROWS and _turns(rows, w):
        out.copy_(torch.mm(w, x.T).T)
    else:
        torch.mm(x, w.T, out=out)
    if b is not None:
        out += b


def _turns(rows: int, w: Tensor) -> bool:
    """Whether W @ x.T and a transposition beat x @ W.T, for a few rows."""
    if w.dtype in LOW_PRECISION:
        return has_amx() or rows > 16 or (rows > 4 and w.shape[1] >= 1024)
    return reads_by_onednn(w, LARGER_WEIGHT) or rows > very_few(w)


def reads_by_onednn(w: Tensor, least: int = LARGE_WEIGHT) -> bool:
    """Whether oneDNN reads weights of this size in float32 quicker than MKL."""
    return w.dtype == torch.float32 and w.numel() >= least and onednn_float32()


def very_few(w: Tensor) -> int:
    """Rows up to which MKL's x @ w.T beats w @ x.T and a transposition."""
    return 8 if w.numel() <= SMALL_WEIGHT else 4


def mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out [M, N] = a [M, K] @ b [K, N]; out lies by rows or by columns."""
    return bmm(a[None], b[None], out[None])[0]
