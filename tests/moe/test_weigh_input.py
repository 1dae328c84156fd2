"""Experts that are weighed at their input: f_e(g_e x) instead of g_e f_e(x), as in Llama 4."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from zoo.moe import Experts, MoE
from zoo.moe.routers import TopKRouter

D, F_, E = 6, 5, 4


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("tokens", [0, 1, 9])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_weight_comes_before_the_expert(k, tokens, backend):
    experts = Experts(E, D, F_, backend=backend, weigh_input=True)
    layer = MoE(TopKRouter(D, E, k, score="sigmoid"), experts).double()
    x = torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
    # Every expert on every token, as transformers computes it: a weight of zero gives zero.
    scores = (x @ layer.router.weight.T).sigmoid()
    best = torch.zeros_like(scores).scatter(1, scores.topk(k, dim=1).indices, 1.0)
    rows = x[None] * (scores * best).T[:, :, None]
    gate, up = (rows @ experts.gate_up_proj.transpose(1, 2)).chunk(2, dim=-1)
    expected = ((F.silu(gate) * up) @ experts.down_proj.transpose(1, 2)).sum(0)
    found = layer(x)
    torch.testing.assert_close(found, expected)
    wanted = (x, layer.router.weight, *experts.parameters())
    weight = torch.randn_like(expected)
    for ours, theirs in zip(*(torch.autograd.grad((y * weight).sum(), wanted) for y in (found, expected))):
        torch.testing.assert_close(ours, theirs)


def test_dropout_and_weighed_inputs_exclude_each_other():
    with pytest.raises(ValueError, match="dropout and weigh_input exclude each other"):
        Experts(E, D, F_, dropout=0.1, weigh_input=True)
