"""LoRA inside the experts of sparse models, a pair for each expert and projection."""

from __future__ import annotations

import copy
import warnings

import pytest
import timm
import torch
from adapted_models import batch, language, stir

import zoo
from zoo.convert.adapting import adapter_state, base_state
from zoo.models import count_parameters
from zoo.moe import Experts, LoRALinear, LoRAOfExperts, QuantisedExperts

SIZES = {"num_hidden_layers": 2, "vocab_size": 64}
TARGETS = ["query", "gate", "up", "down"]
FAMILIES = [f"language/{name}" for name in ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")]
FAMILIES += [f"vision_language/{name}" for name in ("llama4", "qwen3_vl_moe")]


def sparse(name="language/mixtral", **fields):
    torch.manual_seed(0)
    fields = {**SIZES, **fields} if name.startswith("language") else fields
    return zoo.create_model(f"{name}_tiny", **fields).eval()


def logits(model, tokens, mask):
    with torch.no_grad():
        return model(tokens, attention_mask=mask).logits[mask.bool()]


def tuned(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRAOfExperts)}


def by_hand(model):
    """The same without adapters in experts: weights of each are summed one by one, in float64."""
    model = copy.deepcopy(model).double()
    for name, layer in tuned(model).items():
        few, F = layer.base, layer.hidden_dim
        whole = Experts(few.num_experts, few.dim, F, few.activation, few.b_in is not None, weigh_input=few.weigh_input)
        whole.double().requires_grad_(False)
        for part, own in zip(("w_in", "w_out", "b_in", "b_out"), few.held):
            if own is not None:
                getattr(whole, part).copy_(own)
        for part, pair in layer.lora.items():
            for e in range(few.num_experts):
                weight = whole.w_out[e] if part == "down" else whole.w_in[e]
                weight = weight[F:] if part == "up" and few.gated else weight[: pair.out_dim]
                weight += pair.alpha / pair.rank * pair.b[e] @ pair.a[e]
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, whole)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_families_start_as_they_were_and_merge_exactly(name):
    base, (tokens, mask) = sparse(name), batch()
    made = zoo.adapt(base, "LoRA", targets=TARGETS, rank=3)
    torch.testing.assert_close(logits(made, tokens, mask), logits(base, tokens, mask), rtol=1e-4, atol=1e-4)
    layers = tuned(made)
    assert len(layers) == sum(type(m) is Experts for m in base.modules()) > 0
    assert any(isinstance(m, LoRALinear) for m in made.modules())
    assert all(set(layer.lora) == {"gate", "up", "down"} for layer in layers.values())
    assert {n for n, p in made.named_parameters() if p.requires_grad} == set(adapter_state(made))
    assert base_state(made).keys() == base.state_dict().keys()
    stir(made, 0.1).double()
    merged, reference = zoo.merge_adapters(made), by_hand(made)
    assert not tuned(merged)
    assert not hasattr(merged, "adapted")
    expected = logits(reference, tokens, mask)
    assert (expected - logits(base, tokens, mask)).norm() > 0.01 * expected.norm()
    for model in (made, merged):
        torch.testing.assert_close(logits(model, tokens, mask), expected, rtol=1e-6, atol=1e-6)


def test_one_step_leaves_the_base_as_it_was():
    base, (tokens, mask) = sparse(), batch()
    before = {n: t.clone() for n, t in base.state_dict().items()}
    made = zoo.adapt(base, "LoRA", targets=TARGETS, share=True, dtype="float64").train()
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(base.parameters(), base_state(made).values()))
    stir(made, 0.05)
    own = {n: t.clone() for n, t in adapter_state(made).items()}
    optimizer = torch.optim.AdamW((p for p in made.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(2):
        loss = made(tokens, attention_mask=mask, labels=tokens.where(mask.bool(), -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items())
    assert all(torch.equal(t, before[n]) for n, t in base_state(made).items())
    assert not any(torch.equal(t, own[n]) for n, t in adapter_state(made).items())


@pytest.mark.parametrize("format", ["int8", "mxfp4"])
def test_experts_in_few_bits(format, tmp_path):
    whole, (tokens, mask) = sparse(), batch()
    base = zoo.quantise(whole, format)
    made = stir(zoo.adapt(base, "LoRA", targets=TARGETS, share=True), 0.1)
    reference = by_hand(made)
    torch.testing.assert_close(
        logits(made, tokens, mask).double(), logits(reference, tokens, mask), rtol=1e-3, atol=1e-4
    )
    with pytest.raises(ValueError, match=rf"merge_adapters: model.layers.1.mlp.experts: .*few bits \({format}\)"):
        zoo.merge_adapters(made)
    zoo.save_pretrained(made, tmp_path / "few")
    again = zoo.from_pretrained(tmp_path / "few", base=base)
    assert torch.equal(logits(again, tokens, mask), logits(made, tokens, mask))
    # Onto whole experts, and back.
    onto = zoo.from_pretrained(tmp_path / "few", base=whole)
    assert all(type(layer.base) is Experts for layer in tuned(onto).values())
    zoo.save_pretrained(onto, tmp_path / "whole")
    back = zoo.from_pretrained(tmp_path / "whole", base=base)
    assert torch.equal(logits(back, tokens, mask), logits(made, tokens, mask))
    # Adapters first, and then few bits.
    later = zoo.quantise(onto, format)
    assert all(type(layer.base) is QuantisedExperts for layer in tuned(later).values())
    assert torch.equal(logits(later, tokens, mask), logits(made, tokens, mask))


def test_a_folder_has_the_pairs_alone(tmp_path):
    base, (tokens, mask) = sparse("language/deepseek_v3"), batch()
    made = stir(zoo.adapt(base, "LoRA", targets=["experts.down_proj", "up"], rank=2, alpha=3, dtype="bfloat16"), 0.1)
    assert {key for layer in tuned(made).values() for key in layer.lora} == {"gate", "up", "down"} - {"gate"}
    zoo.save_pretrained(made, tmp_path / "adapters")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = zoo.from_pretrained(tmp_path / "adapters", base=base)
    assert torch.equal(logits(again, tokens, mask), logits(made, tokens, mask))
    held = zoo.pretrained.tensorfile.read_header(tmp_path / "adapters" / "adapters.safetensors")
    assert {name for name in held if ".router." not in name} == set(adapter_state(made))
    with pytest.raises(ValueError, match="has LoRAs inside experts"):
        zoo.convert.compose_adapters(base, [tmp_path / "adapters"])


def test_vision_and_upcycled_models_convert_in_steps():
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=4, num_heads=3, num_classes=7
    ).eval()
    images = torch.randn(2, 3, 32, 32)
    upcycled = zoo.upcycle(vit, num_experts=3, router="TopKRouter", layers=[1, 3])
    made = zoo.adapt(upcycled, "LoRA", targets=["up", "down"], layers=[0, 3], rank=2)
    assert list(tuned(made)) == ["blocks.3.mlp.experts"]  # and a dense MLP in the first
    assert sum(isinstance(m, LoRALinear) for m in made.modules()) == 2
    stir(made, 0.2).double()
    with torch.no_grad():
        expected = by_hand(zoo.merge_adapters(made))(images.double())
        torch.testing.assert_close(made(images.double()), expected, rtol=1e-6, atol=1e-6)
    # An upcycled language model, through the configuration's list of conversions.
    steps = [
        {"upcycle": {"num_experts": 2, "router": "TopKRouter"}},
        {"quantise": {"format": "float8"}},
        {"adapt": {"kind": "LoRA", "targets": ["query", "gate"], "rank": 2}},
    ]
    model = language()
    for step in steps:
        ((name, options),) = step.items()
        model = getattr(zoo, name)(model, **options)
    assert [list(layer.lora) for layer in tuned(model).values()] == [["gate"]] * 2  # every other MLP


def test_pairs_are_counted_with_their_experts():
    base = sparse(num_experts_per_tok=2)
    total, active = count_parameters(base)
    made = zoo.adapt(base, "LoRA", targets=["gate", "down"], rank=4)
    own = sum(p.numel() for p in made.parameters() if p.requires_grad)
    layer = next(iter(tuned(made).values()))
    for model in (made, zoo.quantise(made, "int8")):
        assert count_parameters(model) == (total + own, active + own * 2 // layer.num_experts)
    assert own == 2 * layer.num_experts * 2 * 4 * (layer.dim + layer.hidden_dim)
    shared = zoo.share_depth(base)  # weights are one, pairs are not
    total, active = count_parameters(shared)
    made = stir(zoo.adapt(shared, "LoRA", targets=["gate", "down"], rank=4), 0.1).double()
    assert count_parameters(made) == (total + own, active + own * 2 // layer.num_experts)
    tokens, mask = batch()
    torch.testing.assert_close(
        logits(zoo.merge_adapters(made), tokens, mask), logits(made, tokens, mask), rtol=1e-6, atol=1e-6
    )


def test_what_has_no_pairs_is_named():
    base = sparse()
    with pytest.raises(
        ValueError, match=r"experts: expected Experts, QuantisedExperts or OffloadedExperts, got LoRAOfExperts; choose"
    ):
        zoo.adapt(zoo.adapt(base, "LoRA", targets="up"), "LoRA", targets="down")
    with pytest.raises(ValueError, match=r"mlp.experts: expected .*, got ResidualExperts"):
        zoo.adapt(zoo.upcycle(language(), num_experts=2, residual=True), "LoRA", targets="down")
    with pytest.raises(ValueError, match=r"no linear layer .* have: mlp.experts.gate_up_proj, mlp.experts.down_proj, "):
        zoo.adapt(base, "LoRA", targets="w1")
    # As before, unless asked for, and for other kinds.
    assert not tuned(zoo.adapt(base, "LoRA"))
    assert not tuned(zoo.adapt(base, "MoLA"))
    merging = zoo.upcycle(language(), num_experts=2, router="SMEARRouter")
    with pytest.raises(ValueError, match="SMEARRouter merges experts"):
        zoo.adapt(merging, "LoRA", targets="up")
