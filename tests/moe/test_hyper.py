"""HyperMoE: an expert made from the embeddings of those that a token does not meet."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import zoo
from zoo.moe import HyperExperts, HyperNetwork, MoE, Routing
from zoo.moe.routers import TopKRouter

SMALL = {"adapter_dim": 3, "embedding_dim": 5, "process_dim": 7, "input_dim": 4, "layer_dim": 2}


def filled(num_experts: int = 4, bias: bool = False) -> HyperExperts:
    experts = HyperExperts(num_experts, 6, 8, "gelu", bias=bias, **SMALL).double()
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_()
    return experts


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("tokens", [0, 1, 11])
def test_it_is_the_authors_definition_token_by_token(k, tokens):
    experts, router = filled(bias=True), TopKRouter(6, 4, k=k, dtype=None).double()
    x = torch.randn(tokens, 6, dtype=torch.float64)
    net = experts.hypernetwork
    with torch.no_grad():
        matrix = router(x).dense()
        expected = experts.mlp(x, router(x))
        for t in range(tokens):
            unmet = [e for e in range(4) if matrix[t, e] == 0]
            total = sum((experts.embedding[e] for e in unmet), torch.zeros(5, dtype=torch.float64))
            hidden = torch.relu(experts.first.weight @ total + experts.first.bias)
            described = torch.cat([experts.second.weight @ hidden + experts.second.bias, experts.layer])
            h = torch.relu(net.hidden.weight @ described + net.hidden.bias)
            down = (net.weight_down.weight @ h + net.weight_down.bias).view(3, 6)
            up = (net.weight_up.weight @ h + net.weight_up.bias).view(6, 3)
            inner = torch.relu(down @ x[t] + net.bias_down.weight @ h + net.bias_down.bias)
            expected[t] += up @ inner + net.bias_up.weight @ h + net.bias_up.bias
        found = MoE(router, experts)(x)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_a_token_that_was_dropped_is_described_by_all_experts():
    experts, x = filled(), torch.randn(3, 6, dtype=torch.float64)
    none = torch.zeros(3, 4, dtype=torch.bool)
    routing = Routing.from_matrix(torch.ones(3, 4, dtype=torch.float64), none)
    others = experts.second(experts.first(experts.embedding.sum(0, keepdim=True)).relu())
    down, b_down, up, b_up = experts.hypernetwork(torch.cat([others, experts.layer[None]], -1))
    expected = (x @ down[0].T + b_down[0]).relu() @ up[0].T + b_up[0]
    assert torch.allclose(experts(x, routing), expected, rtol=1e-9)


def test_it_starts_near_the_experts_alone_and_everything_learns():
    experts, router = HyperExperts(4, 32, 48), TopKRouter(32, 4)
    x = torch.randn(20, 32)
    y, alone = MoE(router, experts)(x), experts.mlp(x, router(x))
    assert float((y - alone).detach().abs().max() / alone.detach().abs().max()) < 1e-2
    y.square().sum().backward()
    assert all(p.grad is not None for p in experts.parameters())
    assert experts.hypernetwork.hidden.in_features == 138


@pytest.mark.parametrize("network", ["language/mixtral_tiny", "vision/vmoe_tiny_test"])
def test_layers_of_a_model_share_the_hypernetwork(network):
    options = {"num_hidden_layers": 2} if "language" in network else {"moe_layers": [1, 3], "num_classes": 3}
    model = zoo.create_model(network, experts={"name": "HyperExperts", "adapter_dim": 8}, **options)
    first, second = [module.experts for module in model.modules() if isinstance(module, MoE)]
    assert first.hypernetwork is second.hypernetwork
    assert first.layer is not second.layer
    assert float(first.hypernetwork.weight_up.weight.detach().abs().max()) < 1e-3
    x = torch.randint(0, 200, (2, 7)) if "language" in network else torch.randn(2, 3, 32, 32)
    out = copy.deepcopy(model).train()(x)
    getattr(out, "logits", out).square().sum().backward()


def test_it_is_saved_with_a_timm_model_and_not_as_a_published_family(tmp_path):
    model = zoo.create_model("vision/vmoe_tiny_test", experts={"name": "HyperExperts", "adapter_dim": 8}, num_classes=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    x = torch.randn(2, 3, 32, 32)
    zoo.save_pretrained(model, tmp_path / "vit")
    with torch.no_grad():
        assert torch.allclose(zoo.from_pretrained(tmp_path / "vit")(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match=r"no published layout has a place for .*HyperExperts"):
        zoo.save_pretrained(zoo.create_model("language/mixtral_tiny", experts="HyperExperts"), tmp_path / "language")


def test_a_hypernetwork_of_other_sizes_is_refused():
    with pytest.raises(ValueError, match=r"hypernetwork has sizes \(6, 9\), expected \(6, 138\)"):
        HyperExperts(4, 6, 8, hypernetwork=HyperNetwork(6, input_dim=9))
    assert isinstance(HyperExperts(4, 6, 8, hypernetwork=HyperNetwork(6)), nn.Module)
