"""A token's best experts, and all choices sorted by expert: what stands between a router's scores and the experts.

T tokens, E experts, K choices a token, A = T * K assignments. Experts are few and known in number, so that counting
replaces sorting: each block of tokens counts its choices, a scan over blocks says where each expert's part begins, and
every choice finds its row. No atomics, so results repeat bit for bit; no host synchronisation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .schedule import on_device

# Elements of a block of tokens by experts that a program keeps in registers.
BLOCK = 4096
LEAST = tl.constexpr(-(2**63))
GREATEST = tl.constexpr(2**31 - 1)


@triton.jit
def top_k_kernel(
    scores: tl.tensor,
    index: tl.tensor,
    T: tl.tensor,
    E: tl.tensor,
    stride_t: tl.tensor,
    stride_e: tl.tensor,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """index[t, j] = the expert of the j-th highest score of token t; of equal scores the first, of NaN before all."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    inside = (t < T)[:, None] & (e < E)[None, :]
    at = t.to(tl.int64)[:, None] * stride_t + e.to(tl.int64)[None, :] * stride_e
    x = tl.load(scores + at, mask=inside, other=0.0)
    x = x.to(tl.float32)
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # minus zero equals zero
    bits = tl.where(bits < 0, bits ^ GREATEST, bits)  # integers in the order of the numbers
    bits = tl.where(x != x, GREATEST, bits)
    # The expert's number in the lower half makes every key different.
    key = (bits.to(tl.int64) << 32) | (BLOCK_E - 1 - e)[None, :].to(tl.int64)
    key = tl.where(inside, key, LEAST)
    for j in range(K):
        best = BLOCK_E - 1 - (tl.max(key, 1) & 0xFFFFFFFF)
        tl.store(index + t.to(tl.int64) * K + j, best, mask=t < T)
        key = tl.where(e[None, :] == best[:, None], LEAST, key)


@triton.jit
def count_kernel(
    expert: tl.tensor,
    counts: tl.tensor,
    T: tl.tensor,
    E: tl.tensor,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """counts[b, e] = choices of expert e by the tokens of block b."""
    block = tl.program_id(0).to(tl.int64)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    count = tl.zeros([BLOCK_E], tl.int32)
    for j in range(K):
        chosen = tl.load(expert + t * K + j, mask=t < T, other=BLOCK_E)
        count += tl.sum((chosen[:, None] == e[None, :]).to(tl.int32), 0)
    tl.store(counts + block * E + e, count, mask=e < E)


@triton.jit
def scan_kernel(
    counts: tl.tensor,
    totals: tl.tensor,
    blocks: tl.tensor,
    E: tl.tensor,
    BLOCK_B: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """Replace counts[b, e] by the sum of those of the blocks before b, for BLOCK_E experts; totals[e], of all."""
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_E], tl.int32)
    for first in range(0, blocks, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        at = counts + b.to(tl.int64)[:, None] * E + e[None, :]
        inside = (b < blocks)[:, None] & (e < E)[None, :]
        count = tl.load(at, mask=inside, other=0)
        tl.store(at, total[None, :] + tl.cumsum(count, 0) - count, mask=inside)
        total += tl.sum(count, 0)
    tl.store(totals + e, total, mask=e < E)


@triton.jit
def place_kernel(
    expert: tl.tensor,
    weight: tl.tensor,
    before: tl.tensor,
    totals: tl.tensor,
    token_index: tl.tensor,
    offsets: tl.tensor,
    sorted_weight: tl.tensor,
    place: tl.tensor,
    T: tl.tensor,
    E: tl.tensor,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """Give every choice of a block of tokens its row; without `before` there is one block."""
    block = tl.program_id(0).to(tl.int64)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    count = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
    for j in range(K):
        chosen = tl.load(expert + t * K + j, mask=t < T, other=BLOCK_E)
        count += (chosen[:, None] == e[None, :]).to(tl.int32)
    if before is None:
        total = tl.sum(count, 0)
    else:
        total = tl.load(totals + e, mask=e < E, other=0)
    end = tl.cumsum(total, 0)
    if block == 0:
        tl.store(offsets, 0)
        tl.store(offsets + 1 + e, end, mask=e < E)
    start = end - total
    if before is not None:
        start += tl.load(before + block * E + e, mask=e < E, other=0)
    row = start[None, :] + tl.cumsum(count, 0) - count
    for j in range(K):
        chosen = tl.load(expert + t * K + j, mask=t < T, other=BLOCK_E)
        here = chosen[:, None] == e[None, :]
        mine = tl.sum(tl.where(here, row, 0), 1)
        tl.store(token_index + mine, t, mask=t < T)
        tl.store(place + t * K + j, mine, mask=t < T)
        tl.store(sorted_weight + mine, tl.load(weight + t * K + j, mask=t < T, other=0.0), mask=t < T)
        row += here.to(tl.int32)  # a token may choose an expert twice


def _block(experts: int) -> tuple[int, int]:
    """Tokens and experts of a block."""
    block_e = triton.next_power_of_2(experts)
    return min(256, max(1, BLOCK // block_e)), block_e


def top_k(scores: Tensor, k: int) -> Tensor:
    """The k best experts by scores [T, E], best first: [T, k] int64."""
    tokens, experts = scores.shape
    index = torch.empty(tokens, k, dtype=torch.int64, device=scores.device)
    block_t, block_e = _block(experts)
    if tokens:
        with on_device(scores):
            top_k_kernel[(triton.cdiv(tokens, block_t),)](
                scores, index, tokens, experts, *scores.stride(), K=k, BLOCK_T=block_t, BLOCK_E=block_e
            )
    return index


def sort_choices(expert: Tensor, weight: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sort the choices expert [T, K] and their weights [T, K] by expert and, within an expert, by token.

    Gives token_index [A] int64, offsets [E+1] int32, the sorted weights [A], and the row of each choice [T, K] int32.
    """
    tokens, k = expert.shape
    device, rows = expert.device, expert.numel()
    token_index = torch.empty(rows, dtype=torch.int64, device=device)
    offsets = torch.zeros(num_experts + 1, dtype=torch.int32, device=device)
    place = torch.empty(tokens, k, dtype=torch.int32, device=device)
    sorted_weight = weight.new_empty(rows)
    if not rows:
        return token_index, offsets, sorted_weight, place
    expert, weight = expert.contiguous(), weight.contiguous()
    block_t, block_e = _block(num_experts)
    blocks, counts, totals = triton.cdiv(tokens, block_t), None, None
    sizes = {"T": tokens, "E": num_experts, "K": k, "BLOCK_T": block_t, "BLOCK_E": block_e}
    with on_device(expert):
        if blocks > 1:
            counts = torch.empty(blocks, num_experts, dtype=torch.int32, device=device)
            totals = torch.empty(num_experts, dtype=torch.int32, device=device)
            count_kernel[(blocks,)](expert, counts, **sizes)
            scan_kernel[(triton.cdiv(num_experts, 16),)](counts, totals, blocks, num_experts, BLOCK_B=128, BLOCK_E=16)
        results = token_index, offsets, sorted_weight, place
        place_kernel[(blocks,)](expert, weight, counts, totals, *results, **sizes)
    return results
