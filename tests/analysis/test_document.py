"""All figures of a model together, on layers whose routing is known."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo import analysis
from zoo.moe import PEER, Capacity, Experts, MoE
from zoo.moe.routers import HashRouter, SoftRouter, TopKRouter

VOCAB, EXPERTS, DIM, LENGTH = 8, 4, 6, 10


class Model(nn.Module):
    """A hash layer, one with few places, in which experts 0 and 1 are the same, and on request a soft one."""

    def __init__(self, soft: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.hashed = MoE(HashRouter(DIM, EXPERTS, table=torch.arange(VOCAB) % EXPERTS), Experts(EXPERTS, DIM, 5))
        router = TopKRouter(DIM, EXPERTS, 2, capacity=Capacity(1.0, drop="position"), group_size="sequence")
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


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def batches(n: int = 3) -> Iterator[Tensor]:
    for _ in range(n):
        yield torch.randint(VOCAB, (20, LENGTH))


def found(model: nn.Module, **options: Any) -> dict[str, Any]:
    document = analysis.analyse(model, batches(), KEYS, LENGTH, model, **options)
    assert json.loads(json.dumps(document)) == document  # nothing but plain numbers
    return document


def test_a_hash_layer_is_decided_by_the_token_alone() -> None:
    layer = found(Model())["layers"]["hashed"]
    assert layer["keys"]["token"]["explained"] == pytest.approx(1)
    assert layer["keys"]["token"]["values"] == VOCAB
    assert layer["keys"]["token"]["std"] == pytest.approx((EXPERTS - 1) ** 0.5 / EXPERTS)
    assert layer["keys"]["position"]["explained"] < 0.1
    assert "drops" not in layer
    assert "co_activation" not in layer  # a token meets one expert


def test_the_end_of_a_sequence_finds_no_place_and_two_experts_work_together() -> None:
    """All ten tokens of a sequence want the same two of four experts, each with 1.0 * 10 * 2 / 4 places."""
    layer = found(Model())["layers"]["crowded"]
    assert layer["drops"] == [0.0] * 5 + [1.0] * 5
    together = torch.tensor(layer["co_activation"])
    wanted = together.diag()
    assert wanted.sum() == 2
    assert torch.equal(together, wanted[:, None] * wanted)
    alike = torch.tensor(layer["similarity"])
    assert alike[0, 1] == pytest.approx(1)
    assert alike.diag().tolist() == pytest.approx([1] * EXPERTS)
    assert alike[2:, :2].abs().max() < 0.9


def test_figures_are_those_of_the_functions_one_by_one() -> None:
    model, data = Model(soft=True), list(batches())
    document = analysis.analyse(model, data, KEYS, LENGTH, model)["layers"]
    drops = analysis.drop_by_position(model, data, LENGTH, model)
    for layer, tables in analysis.expert_counts(model, data, KEYS, model).items():
        for name, table in tables.items():
            figures = document[layer]["keys"][name]
            assert figures["explained"] == pytest.approx(analysis.explained(table))
            assert figures["std"] == pytest.approx(float(analysis.decision_std(table, 20).mean()))
            assert figures["chance"] == pytest.approx(float(analysis.chance_std(table, 20).mean()))
        assert document[layer].get("drops", [0.0] * LENGTH) == drops[layer].tolist()


def test_keys_are_counted_wherever_they_lie_and_left_out_where_negative() -> None:
    """Values of a huge vocabulary, of which one token in two is left out."""
    model = Model()
    keys: dict[str, Any] = {
        "far": lambda ids: torch.where(ids < 4, ids + 10**12, -1),
        "near": lambda ids: torch.where(ids < 4, ids, -1),
    }
    layers = analysis.analyse(model, batches(), keys, LENGTH, model)["layers"]
    for layer in layers.values():
        assert layer["keys"]["far"] == pytest.approx(layer["keys"]["near"])
        assert layer["keys"]["far"]["values"] == 4


def test_a_soft_layer_has_no_co_activation_and_the_others_have() -> None:
    layers = found(Model(soft=True), earlier=[Model(soft=True).state_dict()])
    assert layers["layers"]["soft"]["keys"]["token"]["explained"] < 0.2
    assert "co_activation" not in layers["layers"]["soft"]
    assert "co_activation" in layers["layers"]["crowded"]
    assert set(layers["agreement"]) == {"hashed", "crowded"}


def test_earlier_checkpoints_agree_as_far_as_they_route_alike() -> None:
    """Where the other two experts are wanted nothing is the same; the hash table is part of the checkpoint."""
    model, moved = Model(), Model()
    with torch.no_grad():
        model.crowded.router.weight[:2, 0] = 1.0  # type: ignore[index]
        moved.crowded.router.weight[2:, 0] = 1.0  # type: ignore[index]
        moved.hashed.router.table.copy_(torch.arange(1, VOCAB + 1) % EXPERTS)  # type: ignore[operator]
        for each in (model, moved):
            each.embedding.weight[:, 0] = 100.0
            each.hashed.experts.requires_grad_(False)
            for parameter in each.hashed.experts.parameters():
                parameter.zero_()
            each.hashed.shared = nn.Identity()  # the second layer sees the embedding
    before = {name: value.clone() for name, value in model.state_dict().items()}
    document = found(model, earlier=iter([moved.state_dict(), before]))
    assert document["agreement"] == {
        "hashed": [[1, 0.0], [2, 1.0], [3, 1.0]],
        "crowded": [[1, 0.0], [2, 1.0], [3, 1.0]],
    }
    assert document["agreement_over"] == "checkpoint"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_last_checkpoint_is_not_the_one_before_it() -> None:
    """state_dict gives the weights themselves: loading an earlier one must not change what it is compared with."""
    model, other = Model(), Model()
    other.hashed.router.table.add_(1).remainder_(EXPERTS)  # type: ignore[operator]
    document = found(model, earlier=[other.state_dict()])
    assert document["agreement"]["hashed"] == [[1, 0.0], [2, 1.0]]
    states = {"other": other.state_dict(), "now": model.state_dict()}
    by_name = analysis.routing_over_training(model, states, batches(), model)
    assert by_name["hashed"] == {"other": 0.0, "now": 1.0}


def test_of_very_many_experts_no_pairs_are_told() -> None:
    """A square of PEER's million would fit nowhere."""
    peer = PEER(DIM, 45**2, k=2, heads=2)
    x = [torch.randn(2, LENGTH, DIM)]
    [layer] = analysis.analyse(peer, x, {"row": lambda _: torch.arange(2)[:, None].expand(2, LENGTH)}, LENGTH, peer)[
        "layers"
    ].values()
    assert layer["keys"]["row"]["values"] == 2
    assert set(layer) == {"keys"}


def test_a_model_without_experts_is_an_error() -> None:
    with pytest.raises(ValueError, match="no layer with experts"):
        analysis.analyse(nn.Embedding(VOCAB, DIM), batches(), KEYS, LENGTH, nn.Embedding(VOCAB, DIM))


def test_experts_without_weights_have_no_similarity() -> None:
    with pytest.raises(ValueError, match="Identity has no parameters"):
        analysis.expert_similarity(nn.Identity())
