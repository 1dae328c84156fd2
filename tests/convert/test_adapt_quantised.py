"""Adapters beside models whose experts are in few bits (QLoRA, 2305.14314, for mixtures of experts)."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from adapted_models import batch, stir

import zoo
from zoo.convert.adapting import adapter_state, base_of
from zoo.moe import Experts, MoE, QuantisedExperts
from zoo.moe.kernels.codes import FORMATS

SIZES = {"num_hidden_layers": 2, "vocab_size": 64}
KINDS = ["LoRA", "MoELoRA", "MoLoRA", "LLaVA-MoLE", "AdaMix"]


@pytest.fixture
def folder(tmp_path):
    """A sparse checkpoint."""
    torch.manual_seed(0)
    model = zoo.create_model("language/mixtral_tiny", **SIZES).eval()
    with torch.no_grad():  # large enough that experts matter
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    zoo.save_pretrained(model, tmp_path / "base")
    return tmp_path / "base"


def logits(model, tokens, mask):
    with torch.no_grad():
        return model(tokens, attention_mask=mask).logits[mask.bool()]


def exact(model):
    """The same in float64, its experts with the numbers that the few bits mean."""
    model = copy.deepcopy(model).double()
    for name, few in [(n, m) for n, m in model.named_modules() if isinstance(m, QuantisedExperts)]:
        whole = Experts(few.num_experts, few.dim, few.hidden_dim, few.activation).double()
        with torch.no_grad():
            whole.w_in.copy_(few.w_in)
            whole.w_out.copy_(few.w_out)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, whole.requires_grad_(False))
    return model


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_they_learn_what_the_numbers_held_say(kind, format, folder):
    base, (tokens, mask) = zoo.from_pretrained(folder, quantise=format), batch()
    made = zoo.adapt(base, kind, share=True)
    torch.testing.assert_close(logits(made, tokens, mask), logits(base, tokens, mask), rtol=1e-4, atol=1e-4)
    stir(made, 0.05)
    reference = exact(made)
    for model in (made, reference):
        model(tokens, attention_mask=mask, labels=tokens.where(mask.bool(), -100)).loss.backward()
    learnt = dict(reference.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in learnt.values() if p.grad is not None)
    assert {n for n, p in made.named_parameters() if p.grad is not None} == set(adapter_state(made))
    for name, parameter in made.named_parameters():
        if parameter.requires_grad:
            scale = float(learnt[name].grad.abs().max())
            # LLaVA-MoLE's gate, whose weight is one, has none but rounding.
            bound = 1e-4 * scale + 1e-6 * largest
            torch.testing.assert_close(parameter.grad.double(), learnt[name].grad, rtol=1e-3, atol=bound)


@pytest.mark.parametrize("kind", ["MoELoRA", "LLaVA-MoLE"])
def test_they_are_read_onto_few_bits_and_onto_many(kind, folder, tmp_path):
    base, (tokens, mask) = zoo.from_pretrained(folder, quantise="mxfp4"), batch()
    made = stir(zoo.adapt(base, kind, share=True), 0.1)
    zoo.save_pretrained(made, tmp_path / "adapters")
    plain = zoo.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh = zoo.from_pretrained(tmp_path / "adapters", base=zoo.from_pretrained(folder, quantise="mxfp4"))
        found = zoo.from_pretrained(tmp_path / "adapters")
        whole = zoo.from_pretrained(tmp_path / "adapters", quantise=None)
        other = zoo.from_pretrained(tmp_path / "adapters", quantise="int8")
        beside = zoo.from_pretrained(tmp_path / "adapters", base=plain)
    for again in (fresh, found):
        assert torch.equal(logits(again, tokens, mask), logits(made, tokens, mask))
    for again in (whole, beside):
        assert not any(isinstance(m, QuantisedExperts) for m in again.modules())
        assert torch.equal(logits(again, tokens, mask), logits(beside, tokens, mask))
    assert {m.format for m in other.modules() if isinstance(m, QuantisedExperts)} == {"int8"}
    for again in (whole, other):
        assert all(torch.equal(t, adapter_state(again)[n]) for n, t in adapter_state(made).items())
    # And what was trained beside whole numbers, onto few bits.
    zoo.save_pretrained(whole, tmp_path / "whole")
    again = zoo.from_pretrained(tmp_path / "whole", quantise="mxfp4")
    assert torch.equal(logits(again, tokens, mask), logits(made, tokens, mask))
    with torch.no_grad():
        plain.model.layers[0].self_attn.q_proj.weight.add_(1)
    with pytest.warns(UserWarning, match="beside other weights"):
        zoo.from_pretrained(tmp_path / "adapters", base=plain)


def test_another_size_of_experts_is_named(folder, tmp_path):
    zoo.save_pretrained(zoo.adapt(zoo.from_pretrained(folder, quantise="int8"), "LoRA"), tmp_path / "adapters")
    other = zoo.create_model("language/mixtral_tiny", **SIZES, intermediate_size=96)
    with pytest.raises(
        ValueError, match=r"experts.down_proj has shape \[8, 128, \d+\], the model's has \[8, 128, 96\]"
    ):
        zoo.from_pretrained(tmp_path / "adapters", base=other)


def test_attention_beside_few_bits_merges(folder):
    base, (tokens, mask) = zoo.from_pretrained(folder, quantise="int8"), batch()
    made = stir(zoo.adapt(base, "LoRA"), 0.1)
    merged = zoo.merge_adapters(made)
    torch.testing.assert_close(logits(merged, tokens, mask), logits(made, tokens, mask), rtol=1e-3, atol=1e-3)
    assert not any(base_of(m) for m in merged.modules())
    assert torch.equal(
        logits(zoo.quantise(zoo.from_pretrained(folder), "int8"), tokens, mask), logits(base, tokens, mask)
    )


@pytest.mark.parametrize("kind", ["LLaVA-MoLE", "AdaMix"])
def test_adapters_stand_beside_whole_mixtures(kind, folder):
    """Held against the definition: what the mixture gives, and what the adapter adds to it."""
    base = zoo.from_pretrained(folder).double()
    made = stir(zoo.adapt(base, kind, layers=[1], num_experts=3), 0.3)
    layer, mixture = made.model.layers[1].mlp, base.model.layers[1].mlp
    x = torch.randn(2, 5, 128, dtype=torch.float64)
    y = mixture(x)
    if kind == "AdaMix":
        hidden = torch.nn.functional.gelu(y @ layer.down.mean(0).T + layer.down_bias.mean(0))
        expected = y + hidden @ layer.up.mean(0).T + layer.up_bias.mean(0)
    else:
        best = (x @ layer.router.weight.T).argmax(-1)
        delta = 2 * torch.einsum("bsod,bsd->bso", (layer.experts.b @ layer.experts.a)[best], x)
        expected = y + delta
    torch.testing.assert_close(layer(x), expected)
    assert isinstance(made.model.layers[0].mlp.experts, Experts)
    assert isinstance(layer.shared if kind == "LLaVA-MoLE" else layer.base, MoE)


def test_frozen_gates_keep_their_selection_biases(tmp_path):
    base = zoo.create_model("language/deepseek_v3_tiny", **SIZES)
    made = zoo.adapt(base, "MoELoRA", router={"selection_bias": True}).train()
    tokens, _ = batch()
    made(tokens, labels=tokens).loss.backward()
    zoo.moe.balance.update_biases(made)
    for name, module in made.named_modules():
        bias = getattr(module, "selection_bias", None)
        if bias is not None:  # those of adapters' own gates move
            assert (name in dict(base.named_modules())) == (not bias.any()), name
    zoo.moe.balance.update_biases(base.train())
    assert base.model.layers[1].mlp.router.bias_update_rate > 0


def test_what_frozen_gates_count_is_in_the_folder(tmp_path):
    gate = {"name": "DenseToSparseRouter"}
    model = zoo.create_model("language/mixtral_tiny", **SIZES, router=gate)
    made, (tokens, mask) = zoo.adapt(model, "LoRA").train(), batch()
    for _ in range(3):
        made(tokens)
        zoo.moe.schedule.advance(made)
    made.eval()
    zoo.save_pretrained(made, tmp_path / "adapters")
    again = zoo.from_pretrained(tmp_path / "adapters", base=model)
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in made.state_dict().items())
    assert torch.equal(logits(again, tokens, mask), logits(made, tokens, mask))


@pytest.mark.parametrize("kind", ["LLaVA-MoLE", "AdaMix"])
def test_adapters_stand_beside_mixtures_that_answer_in_pairs(kind):
    base, (tokens, mask) = zoo.create_model("language/gpt_oss_tiny", vocab_size=64).eval(), batch()
    made = zoo.adapt(base, kind)
    torch.testing.assert_close(logits(made, tokens, mask), logits(base, tokens, mask), rtol=1e-4, atol=1e-4)
    again = zoo.adapt(made, kind)
    torch.testing.assert_close(logits(again, tokens, mask), logits(base, tokens, mask), rtol=1e-4, atol=1e-4)
