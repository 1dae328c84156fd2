"""Tensor descriptors: blocks of weights and of contiguous rows that Hopper's copy engine (TMA) loads by itself."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .plans import Tile


@triton.jit
def weight_block(
    w: tl.tensor_descriptor,
    e: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    ALONG_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """The block [BLOCK_K, BLOCK_N] of w[e, n:, k:], transposed; zero outside the expert."""
    if ALONG_K:
        block = w.load([e, n, k]).reshape(BLOCK_N, BLOCK_K).T
    else:
        block = w.load([e, k, n]).reshape(BLOCK_K, BLOCK_N)
    return block


def described_weight(w: Tensor, tile: Tile) -> tuple[Any, bool]:
    """For w [E, N, K]: what a kernel takes for it, and whether K is what lies along memory."""
    along_k = w.stride(2) == 1
    if not tile.described:
        return w, along_k
    from triton.tools.tensor_descriptor import TensorDescriptor

    if along_k:
        return TensorDescriptor.from_tensor(w, [1, tile.n, tile.k]), True
    return TensorDescriptor.from_tensor(w.transpose(1, 2), [1, tile.k, tile.n]), False


def described_rows(rows: Tensor, tile: Tile) -> Any:
    """The same for contiguous rows [A, K]."""
    if not tile.described:
        return rows
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(rows, [tile.m, tile.k])
