"""Experts by token id with learnt weights, against DeepSeek-V4's router in transformers and a loop."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.moe import Capacity, Experts, MoE
from zoo.moe.routers import ScoredHashRouter


def by_loop(router: ScoredHashRouter, x: Tensor, ids: Tensor) -> Tensor:
    """Weights [T, E], one token at a time."""
    out = torch.zeros(x.shape[0], router.num_experts, dtype=torch.float64)
    for t, token in enumerate(ids.tolist()):
        chosen = router.table[token].tolist()
        logits = {e: (router.weight[e].double() @ x[t].double()).item() for e in chosen}
        scores = {e: math.sqrt(math.log1p(math.exp(z))) for e, z in logits.items()}
        for e in chosen:
            out[t, e] = router.scale * scores[e] / sum(scores.values())
    return out


@pytest.mark.parametrize("tokens", [0, 1, 37])
def test_weights_are_those_of_a_loop(tokens: int) -> None:
    router = ScoredHashRouter(5, 6, vocab_size=11, k=3, scale=1.5).double()
    x, ids = torch.randn(tokens, 5, dtype=torch.float64), torch.randint(0, 11, (tokens,))
    torch.testing.assert_close(router(x, token_ids=ids).dense(), by_loop(router, x, ids), rtol=1e-12, atol=1e-12)


def test_weights_and_gradients_are_those_of_transformers() -> None:
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    from transformers import DeepseekV4Config

    config = DeepseekV4Config(hidden_size=8, n_routed_experts=6, num_experts_per_tok=3, vocab_size=13)
    theirs = modeling.DeepseekV4HashRouter(config)
    ours = ScoredHashRouter(8, 6, vocab_size=13, k=3, scale=config.routed_scaling_factor)
    torch.nn.init.normal_(theirs.weight)
    with torch.no_grad():
        ours.weight.copy_(theirs.weight)
    theirs.tid2eid.copy_(ours.table)
    x, ids = torch.randn(2, 7, 8), torch.randint(0, 13, (2, 7))
    _, weight, expert = theirs(x, ids)
    expected = torch.zeros(14, 6).scatter(-1, expert, weight)
    found = ours(x, token_ids=ids).dense()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    target = torch.randn_like(found)
    pairs = ((found, ours.weight), (expected, theirs.weight))
    torch.testing.assert_close(
        *(torch.autograd.grad((out * target).sum(), parameter)[0] for out, parameter in pairs), rtol=1e-4, atol=1e-6
    )


def test_every_id_has_different_experts_and_a_seed_its_own_table() -> None:
    tables = [ScoredHashRouter(4, 8, vocab_size=500, k=3, seed=seed).table for seed in (0, 0, 1)]
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])
    assert all(len(set(row)) == 3 for row in tables[0].tolist())
    # 1500 draws of 8 experts: five deviations of a binomial.
    assert (tables[0].flatten().bincount(minlength=8) - 187.5).abs().max() < 5 * math.sqrt(1500 / 8 * 7 / 8)


def test_padding_capacity_and_balance_count_as_with_any_gate() -> None:
    capacity = Capacity(1.0, drop="position")
    router = ScoredHashRouter(4, 4, table=[[0, 1], [2, 3], [0, 1]], capacity=capacity, losses={"switch": 0.1})
    ids, mask = torch.tensor([0, 0, 2, 1, 7, 0]), torch.tensor([1, 1, 1, 1, 0, 1]).bool()
    routing = router(torch.randn(6, 4), token_ids=ids, mask=mask)
    # Places: 6 tokens, two experts each, four experts: three an expert.
    assert routing.counts.tolist() == [3, 3, 1, 1]
    assert set(routing.losses) == {"switch"}
    assert not (routing.dense()[4] != 0).any()


def test_a_layer_learns_the_weights_alone() -> None:
    router = ScoredHashRouter(6, 4, vocab_size=9)
    layer, x, ids = MoE(router, Experts(4, 6, 5)), torch.randn(3, 5, 6), torch.randint(0, 9, (3, 5))
    before = router(x, token_ids=ids).token_index
    layer(x, token_ids=ids).square().sum().backward()
    assert router.weight.grad is not None
    assert router.weight.grad.abs().max() > 0
    with torch.no_grad():
        router.weight.add_(torch.randn_like(router.weight))
    assert torch.equal(router(x, token_ids=ids).token_index, before)


def test_a_table_survives_the_state_and_the_meta_device() -> None:
    first = ScoredHashRouter(4, 6, vocab_size=9, seed=3)
    second = ScoredHashRouter(4, 6, vocab_size=9, seed=4)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.table, second.table)
    with torch.device("meta"):
        third = ScoredHashRouter(4, 6, vocab_size=9, seed=3)
    third.to_empty(device="cpu")
    third.reset_parameters()
    assert torch.equal(first.table, third.table)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give vocab_size, or a table"),
        ({"table": [[0, 0]]}, "table must be [V, k], in each row different experts 0..3"),
        ({"table": [[0, 4]]}, "table must be [V, k], in each row different experts 0..3"),
        ({"table": [0, 1]}, "table must be [V, k], in each row different experts 0..3"),
        ({"vocab_size": 3, "num_groups": 2}, "num_groups has no meaning where a table chooses"),
        ({"vocab_size": 3, "selection_bias": True}, "selection_bias has no meaning where a table chooses"),
        ({"vocab_size": 3, "k": 5}, "k must be between 1 and num_experts=4, got 5"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ScoredHashRouter(4, 4, **options)


def test_ids_are_needed_and_must_be_in_the_table() -> None:
    router = ScoredHashRouter(4, 4, vocab_size=3)
    with pytest.raises(ValueError, match="ScoredHashRouter needs token_ids in the context"):
        router(torch.randn(2, 4))
    with pytest.raises(ValueError, match="ScoredHashRouter: token_ids"):
        router(torch.randn(2, 4), token_ids=torch.tensor([0, 3]))
