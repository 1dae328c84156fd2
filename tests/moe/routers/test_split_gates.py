"""Gates for the pieces of dense MLPs, each against its definition in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from zoo.moe import Experts, MoE
from zoo.moe.routers import EMoERouter, HashRouter, LLaMAMoERouter, MoEBERTRouter, MoEficationRouter, RandomRouter
from zoo.moe.schedule import advance


def best(logits: Tensor, k: int) -> Tensor:
    """Which experts a token meets, [T, E] bool."""
    rows = [sorted(range(len(row)), key=lambda e, row=row: -row[e])[:k] for row in logits.tolist()]
    return torch.tensor([[e in row for e in range(logits.shape[1])] for row in rows])


def test_emoe_chooses_by_the_mean_keys_of_experts_with_weight_one():
    x = torch.randn(40, 6)
    for activation, rows in (("gelu", 7), ("swiglu", 7)):
        experts, router = Experts(5, 6, 7, activation), EMoERouter(6, 5, 2)
        router.follow(experts)
        keys = experts.w_in.detach().double()[:, :rows].sum(1) / rows
        chosen = best(x.double() @ keys.T, 2)
        assert torch.equal(router(x).dense(), chosen.float())
        assert torch.equal(router(x[:0]).dense(), torch.zeros(0, 5))
        unit = EMoERouter(6, 5, 2, normalize_keys=True)
        unit.follow(experts)
        lengths = keys.square().sum(1).sqrt()
        assert torch.equal(unit(x).dense(), best(x.double() @ (keys / lengths[:, None]).T, 2).float())


def test_emoe_follows_the_experts_of_every_layer_and_refuses_others():
    layers = nn.ModuleList(MoE(EMoERouter(6, 4), Experts(4, 6, 5, "relu")) for _ in range(2))
    advance(layers)
    for moe in layers:
        expected = moe.experts.up_proj.detach().double().mean(1)
        torch.testing.assert_close(moe.router.weight.double(), expected, rtol=1e-5, atol=1e-6, check_dtype=False)
    with pytest.raises(ValueError, match=r"expected keys of 4 experts, found \[3, 6\]"):
        layers[0].router.follow(Experts(3, 6, 5, "relu"))


def test_moefication_foretells_by_a_network_of_the_tokens_direction():
    router, x = MoEficationRouter(6, 10), torch.randn(40, 6)
    assert router.k == 2
    with torch.no_grad():
        router.out.normal_()
        router.weight.normal_(std=2)
    direction = x.double() / x.double().square().sum(1, keepdim=True).sqrt()
    logits = torch.tanh(direction @ router.weight.double().T) @ router.out.double().T
    assert torch.equal(router(x).dense(), best(logits, 2).float())
    assert torch.equal(router(100 * x).dense(), router(x).dense())
    assert router(torch.zeros(3, 6)).weight.eq(1).all()
    assert not any(p.requires_grad for p in router.parameters())
    assert MoEficationRouter(6, 3).k == 1


@pytest.mark.parametrize("network", ["mlp", "linear"])
def test_llama_moe_is_the_softmax_over_the_chosen_logits(network):
    router, x = LLaMAMoERouter(6, 8, 3, network=network).eval(), torch.randn(40, 6)
    if network == "linear":
        assert not router.weight.any()
        nn.init.normal_(router.weight)
    logits = x.double() @ router.weight.double().T
    if network == "mlp":
        logits = torch.tanh(logits) @ router.out.double().T
    kept = best(logits, 3)
    expected = logits.masked_fill(~kept, -math.inf).softmax(-1)
    torch.testing.assert_close(router(x).dense().double(), expected, rtol=1e-5, atol=1e-6)


def test_llama_moes_losses_are_the_unbiased_squares_of_the_coefficients_of_variation():
    router, x = LLaMAMoERouter(6, 4, 4).train(), torch.randn(40, 6)  # with k = E noise decides nothing of the load
    assert not router.noise_weight.any()
    routing = router(x)
    summed = [float(routing.dense()[:, e].detach().double().sum()) for e in range(4)]
    mean = sum(summed) / 4
    variance = sum((value - mean) ** 2 for value in summed) / 3
    assert float(routing.losses["importance"].detach()) == pytest.approx(1e-2 * variance / mean**2, rel=1e-4)
    assert float(routing.losses["load"].detach()) == pytest.approx(0, abs=1e-9)
    assert not router.eval()(x).losses


def test_moebert_takes_one_expert_times_its_probability():
    router, x = MoEBERTRouter(6, 4, losses={"switch": 0.5}), torch.randn(40, 6)
    probs = (x.double() @ router.weight.detach().double().T).softmax(-1)
    kept = best(probs, 1)
    routing = router(x)
    torch.testing.assert_close(routing.dense().double(), probs * kept, rtol=1e-5, atol=1e-7)
    loss = 4 * sum(float(kept[:, e].double().mean() * probs[:, e].mean()) for e in range(4))
    assert float(routing.losses["switch"].detach()) == pytest.approx(0.5 * loss, rel=1e-5)


def test_moebert_by_sentence_decides_by_the_mean_of_its_real_tokens():
    router, x = MoEBERTRouter(6, 4, level="sentence"), torch.randn(3, 5, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()
    dense = router(x, mask=mask).dense().view(3, 5, 4)
    for b, (row, real) in enumerate(zip(x.double(), mask)):
        if not real.any():
            assert not dense[b].any()
            continue
        probs = (router.weight.double() @ row[real].mean(0)).softmax(-1)
        expected = (probs * (probs == probs.max())).expand(5, 4) * real[:, None]
        torch.testing.assert_close(dense[b].double(), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(router(x[0]).dense(), router(x[:1]).dense())


def test_gates_whose_experts_count_with_weight_one_say_so():
    x = torch.randn(20, 6)
    gates = [EMoERouter(6, 4), MoEficationRouter(6, 4), HashRouter(6, 4, 9, hashes=2), RandomRouter(6, 4)]
    for router in gates:
        assert router.unit_weights
        routing = router(x, token_ids=torch.randint(9, (20,)))
        assert torch.equal(routing.dense().sum(-1), torch.full((20,), float(router.k)))
    assert not LLaMAMoERouter(6, 4).unit_weights


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EMoERouter(6, 4, normalize=True), "EMoERouter: normalize changes weights, and these are one"),
        (lambda: MoEficationRouter(6, 4, scale=2.0), "MoEficationRouter: scale changes weights"),
        (lambda: MoEficationRouter(6, 4, bias=True), "its logits have no bias"),
        (lambda: LLaMAMoERouter(6, 4, network="conv"), "network must be 'mlp' or 'linear', got 'conv'"),
        (lambda: LLaMAMoERouter(6, 4, bias=True), "its logits have no bias"),
        (lambda: MoEBERTRouter(6, 4, level="word"), "level must be 'token' or 'sentence', got 'word'"),
        (lambda: MoEBERTRouter(6, 4, level="sentence", jitter=0.1), "jitter and noise differ between the tokens"),
        (lambda: EMoERouter(6, 4, 5), "k must be between 1 and num_experts=4, got 5"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
