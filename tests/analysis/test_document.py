"""All figures of a model together, on layers whose routing is known."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo import analysis
from zoo.moe import Capacity, Experts, MoE
from zoo.moe.routers import HashRouter, SoftRouter, TopKRouter

VOCAB, EXPERTS, DIM, LENGTH = 8, 4, 6, 10


class Model(nn.Module):
    """A hash layer, one with few places, in which experts 0 and 1 are the same, and on request a soft one."""

    def __init__(self, soft: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.hashed = MoE(HashRouter(DIM, EXPERTS, table=torch.arange(VOCAB) % EXPERTS), Experts(EXPERTS, DIM, 5))
        router = TopKRouter(DIM, EXPERTS, 2, capacity=Capacity(1.0, drop="position"))
        self.crowded = MoE(router, Experts(EXPERTS, DIM, 5))
        self.soft = MoE(SoftRouter(DIM, 2, slots=2), Experts(2, DIM, 5)) if soft else None
        with torch.no_grad():
            router.weight.zero_()  # all tokens want the same two experts
            for parameter in self.crowded.experts.parameters():
                parameter[1] = parameter[0]

    def forward(self, ids: Tensor) -> Tensor:
        x = self.hashed(self.embedding(ids), token_ids=ids)
        x = self.crowded(x)
        return x if self.soft is None else self.soft(x)


KEYS: dict[str, Any] = {
    "token": lambda ids: ids,
    "position": lambda ids: torch.arange(LENGTH).expand_as(ids),
}


def batches() -> list[Tensor]:
    return [torch.randint(VOCAB, (20, LENGTH)) for _ in range(3)]


def found(model: nn.Module) -> dict[str, Any]:
    document = analysis.analyse(model, batches(), KEYS, LENGTH, model)
    assert json.loads(json.dumps(document)) == document  # nothing but plain numbers
    return document["layers"]


def test_a_hash_layer_is_decided_by_the_token_alone() -> None:
    layer = found(Model())["hashed"]
    assert layer["keys"]["token"]["explained"] == pytest.approx(1)
    assert layer["keys"]["token"]["values"] == VOCAB
    assert layer["keys"]["token"]["std"] == pytest.approx((EXPERTS - 1) ** 0.5 / EXPERTS)
    assert layer["keys"]["position"]["explained"] < 0.1
    assert "drops" not in layer
    assert "co_activation" not in layer  # a token meets one expert


def test_what_finds_no_place_and_who_works_together() -> None:
    """All 200 tokens of a batch want the same two experts, with 100 places each: the first ten sequences get them."""
    layer = found(Model())["crowded"]
    assert layer["drops"] == pytest.approx([0.5] * LENGTH)
    together = torch.tensor(layer["co_activation"])
    wanted = together.diag()
    assert wanted.sum() == 2
    assert torch.equal(together, wanted[:, None] * wanted)
    alike = torch.tensor(layer["similarity"])
    assert alike[0, 1] == pytest.approx(1)
    assert alike.diag().tolist() == pytest.approx([1] * EXPERTS)
    assert alike[2:, :2].abs().max() < 0.9


def test_a_model_with_a_soft_layer_has_no_co_activation() -> None:
    layers = found(Model(soft=True))
    assert layers["soft"]["keys"]["token"]["explained"] < 0.2
    assert not any("co_activation" in figures for figures in layers.values())


def test_a_model_without_experts_is_an_error() -> None:
    with pytest.raises(ValueError, match="no layer with experts"):
        analysis.analyse(nn.Embedding(VOCAB, DIM), batches(), KEYS, LENGTH, nn.Embedding(VOCAB, DIM))
