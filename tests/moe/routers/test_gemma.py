"""Gemma 4's gate against its code in transformers, and what conversions make of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo.moe import Experts, MoE
from zoo.moe.routers import Gemma4Router


def pair(dim: int = 6, num_experts: int = 5, k: int = 2) -> tuple[nn.Module, Gemma4Router]:
    """transformers' gate and ours with the same parameters, in float64."""
    modeling = pytest.importorskip("transformers.models.gemma4.modeling_gemma4")
    from transformers import Gemma4TextConfig

    config = Gemma4TextConfig(hidden_size=dim, num_experts=num_experts, top_k_experts=k, enable_moe_block=True)
    theirs = modeling.Gemma4TextRouter(config).double()
    ours = Gemma4Router(dim, num_experts, k, eps=config.rms_norm_eps).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        for mine, other in (("weight", theirs.proj.weight), ("scale_in", theirs.scale)):
            ours.get_parameter(mine).copy_(other)
        ours.expert_scale.copy_(theirs.per_expert_scale)
    return theirs, ours


@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_weights_and_gradients_are_those_of_transformers(tokens: int) -> None:
    theirs, ours = pair()
    x = torch.randn(tokens, 6, dtype=torch.float64, requires_grad=True)
    probs, weight, expert = theirs(x)
    expected = torch.zeros(tokens, 5, dtype=torch.float64).scatter(-1, expert, weight.double())
    found = ours(x)
    # transformers computes the softmax in float32.
    torch.testing.assert_close(found.dense(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.probs, probs.double(), rtol=1e-5, atol=1e-6)
    if not tokens:
        return
    target = torch.randn_like(expected)
    names = {"weight": theirs.proj.weight, "scale_in": theirs.scale, "expert_scale": theirs.per_expert_scale}
    mine = torch.autograd.grad((found.dense() * target).sum(), [x, *(ours.get_parameter(n) for n in names)])
    other = torch.autograd.grad((expected * target).sum(), [x, *names.values()])
    for a, b in zip(mine, other):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_layer_may_route_by_other_tokens_than_the_experts_read() -> None:
    _, router = pair()
    layer = MoE(router, Experts(5, 6, 4)).double()
    x, seen = torch.randn(2, 7, 6, dtype=torch.float64), torch.randn(2, 7, 6, dtype=torch.float64)
    weights = router(seen).dense()

    def expert(e: int, token: Tensor) -> Tensor:
        gate, up = (layer.experts.gate_up_proj[e] @ token).chunk(2)
        return layer.experts.down_proj[e] @ (gate * torch.sigmoid(gate) * up)

    expected = torch.stack(
        [sum(w * expert(e, token) for e, w in enumerate(row)) for row, token in zip(weights, x.flatten(0, 1))]
    )
    torch.testing.assert_close(layer(x, seen=seen).flatten(0, 1), expected)
    assert not torch.allclose(layer(x).flatten(0, 1), expected)


def test_pruned_and_grown_gates_keep_what_is_of_tokens() -> None:
    torch.manual_seed(0)
    model = zoo.create_model("vision_language/gemma4_tiny").eval()
    for name, parameter in model.named_parameters():
        if "router" in name:
            nn.init.normal_(parameter)
    tokens = torch.randint(10, 60, (2, 9))
    layers = [m for m in model.modules() if isinstance(m, MoE)]
    kept = [[0, 2, 5, 7], [1, 2, 3, 4]]
    pruned = zoo.prune(model, experts=kept)
    for before, after, numbers in zip(layers, (m for m in pruned.modules() if isinstance(m, MoE)), kept):
        assert torch.equal(after.router.scale_in, before.router.scale_in)
        for name in ("weight", "expert_scale"):
            assert torch.equal(after.router.get_parameter(name), before.router.get_parameter(name)[numbers])

    # As the whole one, with the logits of what is dropped at minus infinity.
    def without(numbers: list[int]):
        gone = torch.tensor([e not in numbers for e in range(8)])
        return lambda logits: logits.masked_fill(gone, float("-inf"))

    for layer, numbers in zip(layers, kept):
        inner, hide = layer.router._logits, without(numbers)
        layer.router._logits = lambda x, inner=inner, hide=hide, **context: hide(inner(x, **context))
    torch.testing.assert_close(pruned(input_ids=tokens).logits, model(input_ids=tokens).logits, rtol=1e-4, atol=1e-5)
    grown = zoo.grow(zoo.create_model("vision_language/gemma4_tiny"), num_new=2)
    assert [m.router.expert_scale.shape for m in grown.modules() if isinstance(m, MoE)] == [(10,), (10,)]
    assert grown(input_ids=tokens).logits.isfinite().all()
