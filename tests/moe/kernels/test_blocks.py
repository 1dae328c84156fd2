"""The rows that the CPU backend computes: every assignment once, padding that counts for nothing, bounded room."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.moe.kernels import blocks, products
from zoo.moe.kernels.blocks import BLOCK, kept_rows

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
LOADS = st.lists(st.one_of(st.integers(0, 12), st.integers(0, 700), st.integers(250, 280)), min_size=1, max_size=20)


@pytest.fixture(autouse=True, params=[False, True], ids=["", "amx"])
def machine(request, monkeypatch):
    """A processor with AMX, or one where oneDNN multiplies in float32 too."""
    monkeypatch.setattr(products, "has_amx", lambda: request.param)
    monkeypatch.setattr(products, "onednn_float32", lambda: not request.param)
    monkeypatch.setattr(products, "LARGE", 1)


def plan(token_index, offsets, wide, dtype):
    """Blocks for gated experts of width 64, whose weights are only looked at."""
    experts = len(offsets) - 1
    weights = torch.empty(experts, wide, 64, device="meta"), torch.empty(experts, 64, wide // 2, device="meta")
    return blocks.plan(token_index, offsets, *weights, dtype)


def offsets_of(loads):
    return torch.tensor([0, *loads]).cumsum(0).to(torch.int32)


def expert_of_row(steps, rows):
    out = torch.full((rows,), -1)
    for block in steps.blocks:
        for i, e in enumerate(range(block.experts.start, block.experts.stop)):
            out[block.start + i * block.rows : block.start + (i + 1) * block.rows] = e
    return out


@given(loads=LOADS, dtype=DTYPES, wide=st.sampled_from([8, 1024, 7168]))
@settings(max_examples=80, deadline=None)
def test_every_assignment_is_computed_once_by_its_expert(loads, dtype, wide):
    count = sum(loads)
    token_index = torch.randperm(count)
    steps = plan(token_index, offsets_of(loads), wide, dtype)
    experts = torch.repeat_interleave(torch.arange(len(loads)), torch.tensor(loads))
    assert torch.equal(steps.collect(steps.token), token_index)
    assert torch.equal(steps.collect(expert_of_row(steps, len(steps.token))), experts)
    spread = steps.spread(torch.ones(count))
    assert spread.sum() == count  # a padding row weighs nothing
    assert torch.equal(steps.collect(spread), torch.ones(count))


@given(loads=LOADS, dtype=DTYPES)
@settings(max_examples=80, deadline=None)
def test_padding_repeats_a_token_of_the_same_expert(loads, dtype):
    token_index = torch.repeat_interleave(torch.arange(len(loads)), torch.tensor(loads))  # the token names its expert
    steps = plan(token_index, offsets_of(loads), 1024, dtype)
    assert torch.equal(steps.token, expert_of_row(steps, len(steps.token)))


@given(loads=LOADS, dtype=DTYPES, wide=st.sampled_from([8, 7168]))
@settings(max_examples=150, deadline=None)
def test_the_rows_kept_for_the_backward_hold_any_padding(loads, dtype, wide):
    steps = plan(torch.zeros(sum(loads), dtype=torch.int64), offsets_of(loads), wide, dtype)
    assert len(steps.token) <= kept_rows(sum(loads), len(loads), dtype)


@pytest.mark.parametrize("load", [9, 33, 65, 129, 193, 257, 513, 1025, 4097])
def test_the_least_lucky_loads_fit_too(load):
    for other in range(max(1, load * 3 // 4), load + 1, max(1, load // 50)):
        loads = [load, *[other] * 7]
        steps = plan(torch.zeros(sum(loads), dtype=torch.int64), offsets_of(loads), 8, torch.bfloat16)
        assert len(steps.token) <= kept_rows(sum(loads), len(loads), torch.bfloat16)


def test_alike_neighbours_share_a_block_that_stays_in_cache():
    wide, loads = 1024, [256] * 64
    steps = plan(torch.zeros(sum(loads), dtype=torch.int64), offsets_of(loads), wide, torch.bfloat16)
    assert [block.size for block in steps.blocks] == [10, 10, 10, 10, 10, 10, 4]
    assert all(block.size * block.rows * wide <= BLOCK for block in steps.blocks)
    huge = plan(torch.zeros(sum(loads), dtype=torch.int64), offsets_of(loads), 1 << 20, torch.bfloat16)
    assert {block.size for block in huge.blocks} == {2 if products.has_amx() else 1}


def test_without_amx_large_experts_are_not_padded_for_each_others_sake():
    loads = [223, 277] * 4
    token_index = torch.zeros(sum(loads), dtype=torch.int64)
    large, small = (plan(token_index, offsets_of(loads), wide, torch.bfloat16) for wide in (1 << 15, 16))
    assert len(large.token) == (2304 if products.has_amx() else 4 * (224 + 288))
    assert len(small.token) == 8 * 288


def test_experts_of_unlike_loads_do_not_wait_for_each_other():
    loads = [400, 100, 0, 100, 400]
    steps = plan(torch.zeros(sum(loads), dtype=torch.int64), offsets_of(loads), 64, torch.bfloat16)
    assert [block.size for block in steps.blocks] == [1, 1, 1, 1]
