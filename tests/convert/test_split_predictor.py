"""On a small trained MLP: neurons that belong together are worth more than random ones, and foretelling than chance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from converted_cases import error
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

import zoo
from zoo.convert import fit_predictor, layerwise_distillation
from zoo.convert.split_groups import spread_within
from zoo.convert.split_predictor import activation_sums, captured, oracle
from zoo.moe import Experts
from zoo.moe.routers import MoEficationRouter


@pytest.mark.parametrize(("activation", "gated"), [("relu", False), ("gelu", False), ("swiglu", True)])
@pytest.mark.parametrize("bias", [True, False])
def test_activation_sums_are_those_of_the_units(activation, gated, bias):
    experts = Experts(3, 5, 7, activation, bias)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(2, 4, 5)
    found = activation_sums(experts, x)
    assert found.shape == (2, 4, 3)
    for e in range(3):
        hidden = x.double() @ experts.w_in[e].double().T + (experts.b_in[e].double() if bias else 0)
        if gated:
            expected = (F.silu(hidden[..., :7]) * hidden[..., 7:]).abs().sum(-1)
        else:
            expected = {"relu": F.relu, "gelu": lambda h: F.gelu(h).relu()}[activation](hidden).sum(-1)
        assert error(found[..., e].double(), expected.detach()) < 1e-5


def test_captured_is_the_share_of_the_chosen():
    logits, sums = torch.randn(20, 6), torch.rand(20, 6)
    sums[3] = 0  # of a token without any activation there is no share
    expected = []
    for row, values in zip(logits.tolist(), sums.double().tolist()):
        best = sorted(range(6), key=lambda e: -row[e])[:2]
        if sum(values):
            expected.append(sum(values[e] for e in best) / sum(values))
    assert captured(logits, sums, 2) == pytest.approx(sum(expected) / 19, rel=1e-5)


class Net(nn.Module):
    """One MLP in a block."""

    def __init__(self, act: type[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Mlp(8, 128, act_layer=act)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x)  # type: ignore[no-any-return]


def tokens(count: int) -> tuple[Tensor, Tensor]:
    """Tokens of eight kinds, and targets: another linear map for each kind."""
    maps = torch.randn(8, 8, 8, generator=torch.Generator().manual_seed(9)) / 8**0.5
    kind, noise = torch.randint(8, (count,)), torch.randn(count, 8)
    return noise + 4 * torch.eye(8)[kind], torch.einsum("td,tde->te", noise, maps[kind])


def trained(act: type[nn.Module]) -> Net:
    """A net whose hidden units are active for few tokens, as those of large models are: a penalty sees to it."""
    net = Net(act)
    mlp: Any = net.blocks[0]
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    x, y = tokens(2048)
    for _ in range(300):
        hidden = mlp.act(mlp.fc1(x))
        loss = (mlp.fc2(hidden) - y).square().mean() + hidden.abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def relative_error(net: nn.Module, sparse: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((sparse(x) - net(x)).square().sum() / net(x).square().sum())


@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU])
def test_neurons_that_belong_together_and_experts_foretold_beat_chance(act):
    torch.manual_seed(3)
    net, (x, y), (unseen, _) = trained(act), tokens(2048), tokens(512)
    calibrate: Callable[..., Any] = lambda model: ((model(part) - y[:256]).square().mean() for part in x.split(256))  # noqa: E731
    errors = {}
    for method in ("random", "cluster", "coactivation"):
        for router in ("EMoERouter", "MoEficationRouter"):
            options = {"num_experts": 8, "k": 2, "method": method, "router": router, "calibrate": calibrate}
            sparse = zoo.split(net, **options)
            errors[method, router] = relative_error(net, sparse, unseen)
        with oracle(sparse):
            errors[method, "oracle"] = relative_error(net, sparse, unseen)
        moe: Any = sparse.blocks[0]
        again = relative_error(net, sparse, unseen)
        assert again == errors[method, "MoEficationRouter"]  # the oracle has left
        sums = activation_sums(moe.experts, unseen)
        chance = [captured(torch.rand(512, 8), sums, 2) for _ in range(5)]
        foretold = captured(moe.router._logits(unseen), sums, 2)
        assert max(chance) < foretold - 0.1
        assert foretold <= captured(sums, sums, 2)
        moe.router._logits = lambda x, **context: torch.rand(x.shape[0], 8)
        errors[method, "chance"] = relative_error(net, sparse, unseen)
    for router in ("EMoERouter", "MoEficationRouter", "oracle"):
        for method in ("cluster", "coactivation"):
            assert errors[method, router] < 0.7 * errors["random", router], (method, router)
            assert errors[method, router] < 0.7 * errors[method, "chance"], (method, router)
    rows = F.normalize(net.blocks[0].fc1.weight.detach(), dim=-1)  # type: ignore[union-attr, arg-type]
    found = {}
    for method in ("random", "cluster"):
        stacked = zoo.split(net, num_experts=8, method=method).blocks[0].experts.up_proj  # type: ignore[union-attr]
        same = (stacked.detach()[None] == net.blocks[0].fc1.weight[:, None, None]).all(-1).any(-1)
        found[method] = spread_within(rows, same.int().argmax(1))
    assert found["cluster"] < 0.7 * found["random"]


def test_a_predictor_learns_most_of_what_there_is_to_know():
    experts = Experts(4, 6, 5, "relu")
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_()
    x = torch.randn(2000, 6)
    router = MoEficationRouter(6, 4, 1)
    sums = activation_sums(experts, x)
    found = fit_predictor(router, experts, x)
    assert captured(router._logits(x), sums, 1) - 0.25 > 0.6 * (captured(sums, sums, 1) - 0.25)
    assert found == pytest.approx(captured(router._logits(x[1800:]), sums[1800:], 1), rel=1e-5)
    assert not router.weight.requires_grad
    routing = router(x)
    assert torch.equal(routing.weight, torch.ones(2000))


@pytest.mark.parametrize("count", [1, 9])
def test_few_tokens_are_enough_to_run_and_none_are_refused(count):
    experts, router = Experts(4, 6, 5, "relu"), MoEficationRouter(6, 4, 2)
    assert 0 <= fit_predictor(router, experts, torch.randn(count, 6), epochs=2) <= 1
    with pytest.raises(ValueError, match="expected tokens to learn from"):
        fit_predictor(router, experts, torch.randn(0, 6))


@pytest.mark.parametrize("classes", [5, 1])
def test_layerwise_distillation_is_the_sum_of_moeberts_terms(classes):
    ours, theirs = [[torch.randn(2, 3, 4, requires_grad=True) for _ in range(3)] for _ in range(2)]
    logits, teacher = torch.randn(2, classes, requires_grad=True), torch.randn(2, classes, requires_grad=True)
    found = layerwise_distillation(ours, theirs, logits, teacher)
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip((*ours, logits), (*theirs, teacher))]
    expected = sum(float((a - b).square().sum()) / 24 for a, b in pairs[:3])
    if classes == 1:
        expected += float((pairs[3][0] - pairs[3][1]).square().sum()) / 2
    else:
        p, q = (values.softmax(-1) for values in pairs[3])
        expected += float(((p * (p / q).log()).sum() + (q * (q / p).log()).sum()) / 2 / 2)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)
    found.backward()
    assert all(state.grad is not None for state in (*ours, logits))
    assert all(state.grad is None for state in (*theirs, teacher))
    with pytest.raises(ValueError, match="2 hidden states, but the teacher's are 3"):
        layerwise_distillation(ours[:2], theirs, logits, teacher)
