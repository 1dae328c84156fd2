"""Experts of low rank, against the products written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.moe import LoRAExperts, MoE
from zoo.moe.routers import TopKRouter

D, E, R = 6, 4, 3


def layer(k: int = 1, shared: nn.Module | None = None) -> MoE:
    made = MoE(TopKRouter(D, E, k, normalize=True), LoRAExperts(E, D, R, alpha=5.0), shared=shared)
    nn.init.normal_(made.experts.b)
    return made.double()


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_a_token_gets_its_experts_products(k, tokens):
    moe, x = layer(k), torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
    logits = x @ moe.router.weight.T
    weight = torch.zeros_like(logits).scatter(1, logits.topk(k).indices, 1.0) * logits.softmax(-1)
    weight = weight / weight.sum(-1, keepdim=True)
    each = torch.einsum("edr,erc,tc->ted", moe.experts.b, moe.experts.a, x) * 5.0 / R
    expected = (weight[..., None] * each).sum(1)
    found = moe(x)
    torch.testing.assert_close(found, expected)
    wanted, scale = (x, moe.experts.a, moe.experts.b), torch.randn_like(expected)
    for ours, theirs in zip(
        *(torch.autograd.grad((y * scale).sum(), wanted, retain_graph=True) for y in (found, expected))
    ):
        torch.testing.assert_close(ours, theirs)


def test_one_of_a_frozen_mlps_neighbours_is_added_whole():
    mlp = nn.Linear(D, D).double().requires_grad_(False)
    moe, x = layer(1, mlp), torch.randn(2, 5, D, dtype=torch.float64)
    chosen = (x @ moe.router.weight.T).argmax(-1)
    expected = mlp(x) + torch.einsum("bsdr,bsrc,bsc->bsd", moe.experts.b[chosen], moe.experts.a[chosen], x) * 5.0 / R
    torch.testing.assert_close(moe(x), expected)


def test_fresh_experts_change_nothing():
    x = torch.randn(7, D)
    made = LoRAExperts(E, D, R)
    assert MoE(TopKRouter(D, E, 2), made)(x).eq(0).all()
    assert made.a.abs().max() <= D**-0.5
    with pytest.raises(ValueError, match="LoRAExperts: rank must be at least 1, got 0"):
        LoRAExperts(E, D, 0)
