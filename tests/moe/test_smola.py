"""Soft mixtures of LoRA experts, against a loop over slots, and one set of them for each modality."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zoo
from zoo.moe import AdaptedLinear, LoRAExperts
from zoo.moe.routers import SoftRouter

D, OUT, E, R = 6, 5, 4, 2


def layer(slots=1, only=None):
    base = nn.Linear(D, OUT).requires_grad_(False)
    made = AdaptedLinear(
        base, SoftRouter(D, E, slots, only=only), LoRAExperts(E, D, R, alpha=3.0, out_dim=OUT)
    ).double()
    nn.init.normal_(made.lora.b)
    nn.init.constant_(made.router.scale, 1.5)
    return made


def unit(v):
    return v / torch.sqrt((v * v).sum() + 1e-6)


def soft(made, sequence, real):
    """Soft MoE's algorithm 1 beside the layer: each slot a mixture of the real tokens, each of these one of slots."""
    out = [made.base(token) for token in sequence]
    places = [at for at in range(len(sequence)) if real[at]]
    slots = [(e, unit(mu)) for e in range(E) for mu in made.router.weight[e]]
    scale, numbers = made.router.scale, range(len(slots))
    powers = {(at, s): torch.exp(scale * unit(sequence[at]) @ slots[s][1]) for at in places for s in numbers}
    results = []
    for s, (e, _) in enumerate(slots):
        total = sum(powers[at, s] for at in places)
        mixed = sum(powers[at, s] / total * sequence[at] for at in places)
        results.append(3.0 / R * made.lora.b[e] @ (made.lora.a[e] @ mixed))
    for at in places:
        total = sum(powers[at, s] for s in numbers)
        out[at] = out[at] + sum(powers[at, s] / total * result for s, result in enumerate(results))
    return torch.stack(out)


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("only", [None, 1])
def test_slots_are_mixtures_of_a_sequences_tokens(slots, only):
    made = layer(slots, only)
    x = torch.randn(3, 7, D, dtype=torch.float64, requires_grad=True)
    mask, modality = torch.rand(3, 7) > 0.3, torch.randint(2, (3, 7))
    mask[:, 0], modality[:, 0] = True, 1
    real = mask if only is None else mask & (modality == only)
    found = made(x, mask=mask, modality=modality)
    expected = torch.stack([soft(made, s, r) for s, r in zip(x, real, strict=True)])
    torch.testing.assert_close(found, expected)
    inputs, scale = [x, *(p for p in made.parameters() if p.requires_grad)], torch.randn_like(expected)
    for ours, theirs in zip(*(torch.autograd.grad((y * scale).sum(), inputs) for y in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_modality_that_is_not_there_changes_nothing():
    made, x = layer(only=1), torch.randn(2, 4, D, dtype=torch.float64)
    torch.testing.assert_close(made(x, modality=torch.zeros(2, 4)), made.base(x))
    torch.testing.assert_close(made(x, modality=0), made.base(x))
    torch.testing.assert_close(made(x, modality=torch.tensor([0, 1]))[0], made.base(x[0]))
    torch.testing.assert_close(made(x, modality=1), layer_of(made, x))
    with pytest.raises(ValueError, match="SoftRouter needs modality in the context"):
        made(x)


def layer_of(made, x):
    """The same, of all tokens."""
    return torch.stack([soft(made, sequence, [True] * len(sequence)) for sequence in x])


def test_three_sets_beside_one_model(tmp_path):
    """All tokens, text and images, in an encoder that is no causal model."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_ff": 24, "num_layers": 2, "num_heads": 2, "d_kv": 8, "pad_token_id": 0}
    base = T5ForConditionalGeneration(T5Config(vocab_size=40, feed_forward_proj="gated-gelu", **sizes)).eval()
    made = base
    for router in (None, {"only": 0}, {"only": 1}):
        made = zoo.adapt(
            made, "Omni-SMoLA", num_experts=3, rank=2, router=router, within="encoder", targets=("query", "up")
        )
    query = made.encoder.block[1].layer[0].SelfAttention.q
    up = made.encoder.block[0].layer[1].DenseReluDense.wi_1
    for layer in (query, up):
        assert {layer.router.only, layer.base.router.only, layer.base.base.router.only} == {None, 0, 1}
    tokens, modality = torch.randint(1, 40, (2, 6)), torch.tensor([[1, 1, 0, 0, 0, 0]] * 2)
    inputs = {"input_ids": tokens, "decoder_input_ids": tokens, "moe_context": {"modality": modality}}
    with torch.no_grad():
        plain = base(input_ids=tokens, decoder_input_ids=tokens).logits
        torch.testing.assert_close(made(**inputs).logits, plain)
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.3)
        out = made(**inputs).logits
    assert not torch.allclose(out, plain)
    zoo.save_pretrained(made, tmp_path / "adapters")
    again = zoo.from_pretrained(tmp_path / "adapters", base=base)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, out)
    with pytest.raises(ValueError, match="a SoftRouter, weighs 3 experts by the token"):
        zoo.merge_adapters(made)
