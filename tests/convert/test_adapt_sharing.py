"""Adapted models that hold the frozen weights of the model they were made of, not copies."""

from __future__ import annotations

import pytest
import torch
from adapted_models import GATES, batch, language, stir, vision
from safetensors.torch import load_file
from torch import nn

import zoo
from zoo.convert.adapter_kinds import KINDS
from zoo.convert.adapting import adapter_state, base_state
from zoo.moe import QuantisedExperts

OWN = [kind for kind, row in KINDS.items() if not row.frozen]


def memory(*models):
    """Bytes that models hold together, each piece of memory once."""
    stores = [t.untyped_storage() for m in models for t in (*m.parameters(), *m.buffers())]
    return sum({store.data_ptr(): store.nbytes() for store in stores}.values())


def own(model):
    """Bytes of adapters."""
    return sum(t.numel() * t.element_size() for t in adapter_state(model).values())


@pytest.mark.parametrize("kind", OWN)
def test_frozen_weights_are_held_once(kind):
    base, (tokens, mask) = language(), batch()
    before = {n: (t.clone(), t.data_ptr()) for n, t in base.state_dict().items()}
    made = stir(zoo.adapt(base, kind, router=GATES.get(kind), share=True))
    other = stir(zoo.adapt(base, "MoLoRA", share=True))
    buffers = sum(b.numel() * b.element_size() for b in base.buffers())  # copied: training may change them
    assert memory(base, made, other) == memory(base) + own(made) + own(other) + 2 * buffers
    assert all(t.data_ptr() == before[n][1] for n, t in base_state(made).items())
    # Nothing of the given model changes: it learns, runs and moves as if it were alone.
    assert all(p.requires_grad for p in base.parameters())
    assert not any(p.requires_grad for n, p in made.named_parameters() if n not in adapter_state(made))
    stir(made, 0.2)
    made.double()
    assert {t.dtype for t in base.state_dict().values()} == {torch.float32}
    assert all(torch.equal(t, before[n][0]) for n, t in base.state_dict().items())
    assert base(tokens, attention_mask=mask).logits.requires_grad
    apart = zoo.adapt(base, kind, router=GATES.get(kind))
    assert memory(base, apart) > 1.9 * memory(base)


def test_tied_weights_stay_tied_and_adapters_before_are_copied():
    base = language(tie_word_embeddings=True)
    first = zoo.adapt(base, "MoELoRA", share=True)
    both = zoo.adapt(first, "MixLoRA", share=True)
    assert both.lm_head.weight is both.model.embed_tokens.weight
    assert both.lm_head.weight.data_ptr() == base.lm_head.weight.data_ptr()
    before = {n: t.clone() for n, t in adapter_state(first).items()}
    stir(both)
    assert all(torch.equal(t, before[n]) for n, t in adapter_state(first).items())


def test_running_statistics_are_each_models_own():
    base = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    made = zoo.adapt(base, "LoRA", targets="0", share=True).train()
    made(torch.randn(8, 4))
    assert torch.equal(base[0][1].running_mean, torch.zeros(4))
    assert not torch.equal(made[0][1].running_mean, torch.zeros(4))


def test_reading_shares_and_a_trained_head_is_the_readers_own(tmp_path):
    base, (tokens, mask) = language(), batch()
    made = zoo.adapt(base, "MoELoRA", share=False)
    made = stir(zoo.adapt(made, "AdaMix"))
    made.lm_head.weight.requires_grad_(True)
    stir(made)
    zoo.save_pretrained(made, tmp_path / "adapters")
    before = {n: t.clone() for n, t in base.state_dict().items()}
    for again in (
        zoo.from_pretrained(tmp_path / "adapters", base=base, share=True),
        zoo.adapt(base, source=tmp_path / "adapters", share=True),
    ):
        head = load_file(tmp_path / "adapters" / "adapters.safetensors")["lm_head.weight"]
        assert torch.equal(again.lm_head.weight, head)
        assert again.lm_head.weight.data_ptr() != base.lm_head.weight.data_ptr()
        shared = {n: t for n, t in base_state(again).items() if n != "lm_head.weight"}
        assert all(t.data_ptr() == base.state_dict()[n].data_ptr() for n, t in shared.items())
        found, expected = (m(tokens, attention_mask=mask).logits for m in (again, made))
        assert torch.equal(found, expected)
        assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items())


def test_quantised_experts_are_shared():
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 64}
    base = zoo.quantise(zoo.create_model("language/mixtral_tiny", **sizes), "mxfp4")
    made = zoo.adapt(base, "LoRA", share=True)
    [one], [other] = ([m for m in x.modules() if isinstance(m, QuantisedExperts)] for x in (base, made))
    assert one is not other
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(one.buffers(), other.buffers(), strict=True))
    assert all(a is not b for a, b in zip(one.buffers(), other.buffers(), strict=True))


def test_composed_adapters_share(tmp_path):
    base = language()
    for name in ("a", "b"):
        zoo.save_pretrained(stir(zoo.adapt(base, "LoRA")), tmp_path / name)
    made = zoo.convert.compose_adapters(base, [tmp_path / "a", tmp_path / "b"], share=True)
    assert all(t.data_ptr() == base.state_dict()[n].data_ptr() for n, t in base_state(made).items())


@pytest.mark.parametrize("share", [True, False])
def test_a_head_may_be_trained_too(share, tmp_path):
    base, images = vision(), torch.randn(2, 3, 32, 32)
    before = {n: t.clone() for n, t in base.state_dict().items()}
    made = zoo.adapt(base, "MoELoRA", unfreeze=("head", "blocks.1.norm1.bias"), share=share)
    made = zoo.adapt(made, "MixLoRA", share=share)  # and still is
    learns = {n for n, p in made.named_parameters() if p.requires_grad} - adapter_state(made).keys()
    assert learns == {"head.weight", "head.bias", "blocks.1.norm1.bias"}
    stir(made)
    assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items())
    zoo.save_pretrained(made, tmp_path / "adapters")
    again = zoo.from_pretrained(tmp_path / "adapters", base=base, share=share)
    with torch.no_grad():
        assert torch.equal(again(images), made(images))
    assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items())
    assert {n for n, p in again.named_parameters() if p.requires_grad} - adapter_state(again).keys() == learns
    with pytest.raises(ValueError, match="has no parameters in 'heads'; it has patch_embed"):
        zoo.adapt(base, "LoRA", unfreeze="heads")
    tied = zoo.adapt(language(tie_word_embeddings=True), "LoRA", unfreeze="lm_head", share=share)
    assert tied.lm_head.weight.requires_grad
