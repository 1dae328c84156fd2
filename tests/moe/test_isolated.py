"""Experts of their own for each modality, against the sum written out."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from zoo.moe import MLP, Experts, IsolatedMoE, MoE, record
from zoo.moe.routers import TopKRouter

D, E = 6, 4


def block(shared: bool = True, losses=None) -> IsolatedMoE:
    parts = [MoE(TopKRouter(D, E, 2, losses=losses), Experts(E, D, hidden)) for hidden in (5, 3)]
    return IsolatedMoE(parts, MLP(D, 7) if shared else None).double()


def written_out(moe: MoE, x: torch.Tensor) -> torch.Tensor:
    """Top-2 of the softmax, one token at a time."""
    out = []
    for token in x:
        probs = (moe.router.weight @ token).softmax(0)
        y = torch.zeros_like(token)
        for e in probs.topk(2).indices:
            gate, up = (moe.experts.gate_up_proj[e] @ token).chunk(2)
            y = y + probs[e] * (moe.experts.down_proj[e] @ (F.silu(gate) * up))
        out.append(y)
    return torch.stack(out) if out else x


@pytest.mark.parametrize("modality", [None, [0, 1, 1, 0, 1], [0] * 5, [1] * 5])
def test_each_token_meets_the_experts_of_its_modality(modality):
    layer, x = block(), torch.randn(1, 5, D, dtype=torch.float64, requires_grad=True)
    kinds = modality or [0] * 5
    tokens = [written_out(layer.parts[kind], x[0, i : i + 1]) for i, kind in enumerate(kinds)]
    expected = torch.cat(tokens) + layer.shared(x[0])
    found = layer(x, modality=None if modality is None else torch.tensor([modality]))[0]
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_a_masked_token_meets_no_part():
    layer, x = block(shared=False), torch.randn(2, 3, D, dtype=torch.float64)
    mask, modality = torch.tensor([[1, 0, 1], [0, 1, 1]]).bool(), torch.tensor([[0, 1, 1], [1, 0, 9]])
    mask[1, 2] = False  # what a masked token says of itself does not matter
    with record(layer) as step:
        y = layer(x, modality=modality, mask=mask)
    assert y[~mask].eq(0).all()
    torch.testing.assert_close(y[mask], layer(x, modality=modality.clamp(max=1))[mask])
    sent = {name: sorted(set(calls[0].token_index.tolist())) for name, calls in step.routings.items()}
    assert sent == {"parts.0": [0, 4], "parts.1": [2]}


def test_the_losses_of_a_part_are_of_its_own_tokens():
    layer = block(shared=False, losses={"switch": 1.0}).train()
    x, modality = torch.randn(1, 8, D, dtype=torch.float64), torch.tensor([[0, 0, 1, 0, 1, 1, 1, 0]])
    with record(layer) as step:
        layer(x, modality=modality)
    expected = 0
    for kind, part in enumerate(layer.parts):
        with record(part) as alone:
            part(x[modality == kind])
        expected = expected + alone.losses()["switch"]
    torch.testing.assert_close(step.losses()["switch"], expected)


def test_no_tokens_and_a_modality_without_a_part():
    layer = block()
    assert layer(torch.zeros(0, D).double(), modality=torch.zeros(0, dtype=torch.long)).shape == (0, D)
    with pytest.raises(ValueError, match=r"IsolatedMoE: modality must lie in 0..1, got 0..2"):
        layer(torch.zeros(1, 2, D).double(), modality=torch.tensor([[0, 2]]))
    with pytest.raises(ValueError, match="IsolatedMoE: modality has shape"):
        layer(torch.zeros(1, 2, D).double(), modality=torch.tensor([[0, 1, 1]]))
