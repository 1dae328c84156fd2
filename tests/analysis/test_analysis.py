"""What a trained model's experts do, on models whose routing is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo import analysis
from zoo.moe import Capacity, Experts, MoE, Routing
from zoo.moe.routers import DenseRouter, HashRouter, SMEARRouter, TopKRouter

VOCAB, EXPERTS, DIM = 12, 4, 6


class Model(nn.Module):
    """Two layers: what the first does depends on the tokens' vectors, what the second does on their ids alone."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.first = MoE(TopKRouter(DIM, EXPERTS, 2, **options), Experts(EXPERTS, DIM, 5))
        self.second = MoE(HashRouter(DIM, EXPERTS, VOCAB), Experts(EXPERTS, DIM, 5))

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        """Hidden states of tokens."""
        x = self.first(self.embedding(input_ids))
        return self.second(x, token_ids=input_ids)


def batches(n: int = 3, length: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(VOCAB, (4, length), generator=generator),
            "domain": torch.arange(4)[:, None].expand(4, length) % 2,
        }
        for _ in range(n)
    ]


KEYS: dict[str, Any] = {
    "token": lambda batch: batch["input_ids"],
    "position": lambda batch: torch.arange(batch["input_ids"].shape[1]).expand(batch["input_ids"].shape),
    "domain": lambda batch: batch["domain"],
}


def test_counts_are_those_of_going_through_the_tokens() -> None:
    model = Model()
    found = analysis.expert_counts(model, batches(), KEYS)
    expected = {layer: {name: torch.zeros(n, EXPERTS) for name, n in zip(KEYS, (VOCAB, 8, 2))} for layer in found}
    for batch in batches():
        ids = batch["input_ids"]
        x = model.embedding(ids)
        for b in range(4):
            for s in range(8):
                scores = (model.first.router.weight @ x[b, s]).tolist()  # type: ignore[operator]
                chosen = {
                    "first": sorted(range(EXPERTS), key=lambda e: -scores[e])[:2],
                    "second": [model.second.router.table[ids[b, s]].item()],  # type: ignore[index]
                }
                for layer, experts in chosen.items():
                    for e in experts:
                        for name, key in KEYS.items():
                            expected[layer][name][key(batch)[b, s], e] += 1
    for layer, tables in expected.items():
        for name, table in tables.items():
            assert torch.equal(found[layer][name], table.double())


def test_the_model_is_left_as_it_was() -> None:
    model = Model().train()
    model.first.eval()
    for _, layers in analysis.decisions(model, batches(1)):
        assert not layers["second"][0].weight.requires_grad
        assert model.training
    assert model.second.training
    assert not model.first.training
    assert model.first._recording == ()


def test_tokens_can_be_left_out_and_keys_must_fit() -> None:
    masked = {"token": lambda batch: batch["input_ids"].masked_fill(batch["input_ids"] > 5, -1)}
    counts = analysis.expert_counts(Model(), batches(), masked)["second"]["token"]
    assert len(counts) == 6
    whole = analysis.expert_counts(Model(), batches(), KEYS)["second"]["token"]
    assert torch.equal(counts, whole[:6])
    with pytest.raises(ValueError, match="key 'short' gives 4 values for the 32 tokens of layer 'first'"):
        analysis.expert_counts(Model(), batches(), {"short": lambda batch: batch["domain"][:, 0]})


def test_token_ids_decide_a_hash_layer_and_positions_do_not() -> None:
    counts = analysis.expert_counts(Model(), batches(60), KEYS)["second"]
    assert analysis.explained(counts["token"]) == pytest.approx(1.0)
    assert analysis.explained(counts["position"]) < 0.02
    assert analysis.explained(counts["domain"]) < 0.02
    one_expert = math.sqrt(EXPERTS - 1) / EXPERTS
    assert analysis.decision_std(counts["token"]).tolist() == pytest.approx([one_expert] * VOCAB)
    load = counts["token"].sum(0) / counts["token"].sum()  # uneven as the table is, and that is all positions see
    assert analysis.decision_std(counts["position"]).mean() == pytest.approx(load.std(correction=0).item(), rel=0.1)
    assert torch.equal(analysis.shares(counts["token"]).max(1).values, torch.ones(VOCAB, dtype=torch.float64))


def test_std_of_known_shares_and_of_chance() -> None:
    counts = torch.tensor([[150.0, 50, 0, 0], [100, 0, 0, 0], [100, 100, 100, 100]], dtype=torch.float64)
    row = [0.75, 0.25, 0, 0]
    expected = math.sqrt(sum((p - 0.25) ** 2 for p in row) / 4)
    assert analysis.decision_std(counts).tolist() == pytest.approx([expected, 0.0])  # the second is too rare
    drawn = torch.distributions.Multinomial(400, torch.ones(4)).sample((20000,)).double()
    found = analysis.decision_std(drawn).square().mean().sqrt().item()
    assert analysis.chance_std(drawn)[0].item() == pytest.approx(found, rel=0.03)
    assert analysis.decision_std(counts, minimum=1000).numel() == 0


def test_explained_is_mutual_information_over_entropy() -> None:
    counts = torch.randint(20, 90, (5, 3)).double()
    joint = counts / counts.sum()
    information = sum(
        joint[v, e] * math.log(joint[v, e] / (joint[v].sum() * joint[:, e].sum())) for v in range(5) for e in range(3)
    )
    entropy = -sum(p * math.log(p) for p in joint.sum(0).tolist())
    assert analysis.explained(counts) == pytest.approx(float(information) / entropy)
    assert analysis.explained(counts[:0]) == 0


def test_top_keys_of_an_expert() -> None:
    counts = torch.tensor([[3.0, 1], [0, 5], [9, 0]], dtype=torch.float64)
    assert analysis.top_keys(counts, 0) == [(2, 0.75), (0, 0.25)]
    assert analysis.top_keys(counts, 1, n=1) == [(1, pytest.approx(5 / 6))]


def test_a_soft_gates_weights_are_its_shares() -> None:
    torch.manual_seed(0)
    moe = MoE(SMEARRouter(DIM, EXPERTS), Experts(EXPERTS, DIM, 5))
    x = torch.randn(2, 5, DIM)
    key = torch.tensor([[0] * 5, [1] * 5])
    counts = analysis.expert_counts(moe, [x], {"row": lambda _: key}, run=moe)[""]["row"]
    torch.testing.assert_close(analysis.shares(counts).float(), moe.router(x).weight.detach())  # type: ignore[union-attr]


def test_dense_gates_that_route_everywhere_are_told_apart_by_their_weights() -> None:
    """MMoE's: one assignment each would say that all experts are used alike."""
    torch.manual_seed(0)
    moe = MoE(DenseRouter(DIM, EXPERTS), Experts(EXPERTS, DIM, 5))
    x = torch.randn(2, 5, DIM)
    mask = torch.rand(2, 5) < 0.7
    mask[:, 0] = True
    weights = (x.double() @ moe.router.weight.double().T).softmax(-1)  # type: ignore[union-attr, operator]
    for real in (None, mask):
        run = lambda batch, real=real: moe(batch, mask=real)  # noqa: E731
        counted = torch.ones(2, 5, dtype=torch.bool) if real is None else real
        expected = torch.stack([sum(w for w, kept in zip(weights[b], counted[b]) if kept) for b in range(2)])
        counts = analysis.expert_counts(moe, [x, x], {"row": lambda _: torch.tensor([[0] * 5, [1] * 5])}, run)
        torch.testing.assert_close(counts[""]["row"], 2 * expected, rtol=1e-5, atol=1e-7)
        with pytest.raises(ValueError, match="Routing of layer '' sends every token to all experts"):
            analysis.co_activation(moe, [x], run)
        states = {"start": {name: -value for name, value in moe.state_dict().items()}, "end": moe.state_dict()}
        assert analysis.routing_over_training(moe, states, [x], run) == {}
        figures = analysis.analyse(moe, [x], {"row": lambda _: torch.zeros(2, 5).long()}, 5, run)["layers"][""]
        assert "co_activation" not in figures
    single = MoE(TopKRouter(DIM, 1, 1), Experts(1, DIM, 5))  # one expert has no choice to make, and counts tokens
    assert analysis.expert_counts(single, [x], {"all": lambda _: torch.zeros(10).long()}, single)[""]["all"] == 10
    assert analysis.co_activation(single, [x], single)[""].tolist() == [[1.0]]


def test_dropped_share_by_position() -> None:
    model = Model(capacity=Capacity(0.5, drop="position"), group_size="sequence")
    found = analysis.drop_by_position(model, batches(), 8)
    assert found["second"].tolist() == [0.0] * 8
    asked, kept = 0, torch.zeros(8)
    for batch in batches():
        for row in model.embedding(batch["input_ids"]):
            used = [0] * EXPERTS
            for s in range(8):
                scores = (model.first.router.weight @ row[s]).tolist()  # type: ignore[operator]
                for e in sorted(range(EXPERTS), key=lambda e: -scores[e])[:2]:
                    kept[s] += used[e] < 2  # ceil(0.5 * 8 * 2 / 4)
                    used[e] += 1
            asked += 2
    assert found["first"].tolist() == pytest.approx((1 - kept / asked).tolist())
    assert found["first"][-1] > found["first"][0] == 0
    with pytest.raises(ValueError, match="32 tokens are no whole number of sequences of 5"):
        analysis.drop_by_position(model, batches(), 5)


def routing(chosen: list[list[int]]) -> Routing:
    expert = torch.tensor(chosen)
    return Routing.from_choices(expert, torch.ones(expert.shape), EXPERTS)


def test_overlap_of_two_decisions() -> None:
    a, b = routing([[0, 1], [2, 3], [0, 2]]), routing([[1, 0], [2, 1], [3, 1]])
    assert analysis.overlap(a, b) == pytest.approx((2 + 1 + 0) / 6)
    assert analysis.overlap(a, a) == 1
    assert analysis.overlap(routing([[0], [1], [2]]), a) == pytest.approx((1 + 0 + 1) / 6)
    with pytest.raises(ValueError, match="decisions on"):
        analysis.overlap(a, routing([[0]]))
    with pytest.raises(ValueError, match="Blend sends every token to all experts"):
        analysis.overlap(SMEARRouter(DIM, EXPERTS)(torch.randn(1, 3, DIM)), a)


def test_agreement_of_shares() -> None:
    a = torch.tensor([[30.0, 10], [0, 20], [5, 5]], dtype=torch.float64)
    b = torch.tensor([[10.0, 30], [0, 60], [90, 0]], dtype=torch.float64)
    distances = [(0.5, 80), (0.0, 80)]  # the third key is too rare in a
    expected = 1 - sum(d * w for d, w in distances) / sum(w for _, w in distances)
    assert analysis.share_agreement(a, b) == pytest.approx(expected)
    assert analysis.share_agreement(a, a) == 1


def test_routing_over_training_compares_with_the_last_checkpoint() -> None:
    model = Model()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    moved = {**start, "first.router.weight": start["first.router.weight"] + 0.1 * torch.randn(EXPERTS, DIM)}
    other = {**start, "first.router.weight": -start["first.router.weight"]}
    found = analysis.routing_over_training(model, {"a": other, "b": moved, "c": start}, batches())
    assert found["second"] == {"a": 1.0, "b": 1.0, "c": 1.0}
    assert found["first"]["a"] == 0.0  # the worst two of four are the best two of the opposite
    assert 0.5 < found["first"]["b"] <= 1 == found["first"]["c"]
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())


def test_similarity_is_the_cosine_of_all_weights() -> None:
    experts = Experts(3, DIM, 5, bias=True)
    for parameter in experts.parameters():
        parameter.data.normal_()
    rows = [torch.cat([p[e].flatten() for p in experts.parameters()]).double() for e in range(3)]
    found = analysis.expert_similarity(experts)
    for i in range(3):
        for j in range(3):
            expected = float(rows[i] @ rows[j] / rows[i].norm() / rows[j].norm())
            assert found[i, j].item() == pytest.approx(expected, abs=1e-9)
    for parameter in experts.parameters():  # as after upcycling
        parameter.data[:] = parameter.data[0].clone()
    torch.testing.assert_close(analysis.expert_similarity(experts), torch.ones(3, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="expected"):
        analysis.expert_similarity(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)))


def test_co_activation_is_the_share_of_tokens_in_common() -> None:
    model = Model()
    found = analysis.co_activation(model, batches())
    counts = torch.zeros(EXPERTS, EXPERTS)
    for batch in batches():
        for x in model.embedding(batch["input_ids"]).flatten(0, 1):
            scores = (model.first.router.weight @ x).tolist()  # type: ignore[operator]
            pair = sorted(range(EXPERTS), key=lambda e: -scores[e])[:2]
            for i in pair:
                for j in pair:
                    counts[i, j] += 1
    expected = counts / counts.diag().clamp(min=1)[:, None]
    torch.testing.assert_close(found["first"].float(), expected)
    torch.testing.assert_close(found["second"], torch.eye(EXPERTS, dtype=torch.float64))  # one expert a token
    moe = MoE(SMEARRouter(DIM, EXPERTS), Experts(EXPERTS, DIM, 5))
    with pytest.raises(ValueError, match="Blend of layer '' sends every token to all experts"):
        analysis.co_activation(moe, [torch.randn(1, 3, DIM)], run=moe)
