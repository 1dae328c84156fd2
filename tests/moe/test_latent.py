"""Experts of latent tokens, against a loop over tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo.models import count_parameters, dense_twin
from zoo.moe import LatentExperts, MoE
from zoo.moe.routers import TopKRouter


def by_loop(layer: MoE, x: Tensor) -> Tensor:
    """sum_e g_e f_e(W_down x), its norm, and W_up, one token and one expert at a time."""
    experts, weights = layer.experts, layer.router(x).dense()
    out = []
    for token, row in zip(x, weights):
        latent = experts.to_latent.weight @ token
        mixed = torch.zeros_like(latent)
        for e, weight in enumerate(row):
            gate, up = (experts.mlp.gate_up_proj[e] @ latent).chunk(2)
            mixed = mixed + weight * (experts.mlp.down_proj[e] @ (gate * torch.sigmoid(gate) * up))
        if experts.norm is not None:
            mixed = experts.norm.weight * mixed / (mixed.square().mean() + torch.finfo(mixed.dtype).eps).sqrt()
        out.append(experts.from_latent.weight @ mixed)
    return torch.stack(out) if out else x


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 13])
def test_outputs_and_gradients_are_those_of_a_loop(tokens: int, norm: bool) -> None:
    layer = MoE(TopKRouter(7, 5, k=2), LatentExperts(5, 7, 6, latent_dim=3, norm=norm)).double()
    if norm:
        nn.init.normal_(layer.experts.norm.weight)
    x = torch.randn(tokens, 7, dtype=torch.float64, requires_grad=True)
    found, expected = layer(x), by_loop(layer, x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    if tokens:
        target, leaves = torch.randn_like(found), (x, *layer.parameters())
        grads = [torch.autograd.grad((out * target).sum(), leaves) for out in (found, expected)]
        for ours, theirs in zip(*grads):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_models_take_them_by_name_and_know_what_a_token_meets() -> None:
    spec = {"name": "LatentExperts", "latent_dim": 32}
    sizes = {"num_hidden_layers": 2, "vocab_size": 64}
    model = zoo.create_model("language/olmoe_tiny", experts=spec, **sizes)
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    assert [type(layer.experts) for layer in layers] == [LatentExperts] * 2
    tokens = torch.randint(0, 64, (2, 9))
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    total, active = count_parameters(model)
    one = 3 * 32 * layers[0].experts.mlp.hidden_dim
    assert total - active == 2 * (16 - 4) * one
    vision = zoo.create_model("vision/vmoe_tiny_test", experts=spec, num_classes=3)
    assert vision(torch.randn(2, 3, *vision.patch_embed.img_size)).shape == (2, 3)
    with pytest.raises(TypeError, match=r"no published layout has a place for .*LatentExperts"):
        zoo.save_pretrained(model, "unused")


def test_the_dense_twin_of_published_latent_experts_has_as_many_active_numbers() -> None:
    sizes = {"moe_latent_size": 32, "moe_intermediate_size": 256, "moe_shared_expert_intermediate_size": 256}
    model, twin = zoo.create_model("language/nemotron_h_tiny", **sizes), dense_twin("nemotron_h_tiny", **sizes)
    gates = sum(m.router.weight.numel() for m in model.modules() if isinstance(m, MoE))
    assert count_parameters(twin)[0] == count_parameters(model)[1] - gates


def test_a_width_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="LatentExperts: latent_dim must be at least 1, got 0"):
        LatentExperts(4, 8, 8, latent_dim=0)
