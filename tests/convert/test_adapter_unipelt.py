"""UniPELT: each of its parts against loops, and prefixes in attention as transformers computes it."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from adapted_models import LANGUAGE, batch, language, stir, vision
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import zoo
from zoo.moe import AdaptedLinear, FollowedLinear, GatedPrefix
from zoo.moe.routers import UniPELTRouter

FAMILIES = [name for name in LANGUAGE if not name.startswith("opt")]


def gate_of(router, sequence, real):
    """The mean of sigmoid(w . x + b) over real tokens."""
    gates = [1 / (1 + torch.exp(-(router.weight[0] @ x + router.bias[0]))) for x, r in zip(sequence, real) if r]
    return sum(gates) / len(gates)


def bert(**fields):
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 3, "num_hidden_layers": 2}
    return BertModel(BertConfig(vocab_size=40, **sizes, **fields), add_pooling_layer=False).double().eval()


def both(found, expected, inputs):
    torch.testing.assert_close(found, expected)
    scale = torch.randn_like(expected)
    for ours, theirs in zip(*(torch.autograd.grad((y * scale).sum(), inputs) for y in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("length", [1, 5])
def test_an_adapter_behind_a_layer_counts_as_its_gate_says(length):
    layer = FollowedLinear(nn.Linear(4, 6), UniPELTRouter(6), 3).double()
    nn.init.normal_(layer.up)
    nn.init.normal_(layer.up_bias)
    x, mask = torch.randn(3, length, 4, dtype=torch.float64), torch.rand(3, length) > 0.4
    mask[:2, 0], mask[2] = True, False  # of the last sequence nothing is real
    rows = []
    for sequence, real in zip(x, mask, strict=True):
        h = [layer.base(token) for token in sequence]
        gate = gate_of(layer.router, h, real) if real.any() else 0.0
        more = [layer.up @ torch.clamp(layer.down @ one + layer.down_bias, min=0) + layer.up_bias for one in h]
        rows.append(torch.stack([one + gate * m * r for one, m, r in zip(h, more, real, strict=True)]))
    both(layer(x, mask=mask), torch.stack(rows), [p for p in layer.parameters() if p.requires_grad])


def attended(query, key, value, mask):
    """Softmax attention, one query at a time: [H, Q, d] over [H, K, d], mask [Q, K]."""
    out = torch.zeros(*query.shape[:2], value.shape[-1], dtype=query.dtype)
    for h in range(query.shape[0]):
        for q in range(query.shape[1]):
            seen = [k for k in range(key.shape[1]) if mask[q, k]]
            powers = [torch.exp(query[h, q] @ key[h, k] / math.sqrt(query.shape[-1])) for k in seen]
            out[h, q] = sum(p / sum(powers) * value[h, k] for p, k in zip(powers, seen, strict=True))
    return out


def heads(x, count):
    return x.view(x.shape[0], count, -1).transpose(0, 1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_whole_encoder_layer(attention):
    """BERT's layer with all three parts, by hand."""
    base = bert(attn_implementation=attention)
    made = stir(zoo.adapt(base, "UniPELT", rank={"prefix": 3, "lora": 2, "adapter": 4}), 0.5)
    tokens, mask = torch.randint(40, (2, 5)), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    layer, self = made.encoder.layer[0], made.encoder.layer[0].attention.self
    x = made.embeddings(tokens)
    rows = []
    for sequence, real in zip(x, mask.bool(), strict=True):
        parts = {}
        for name in ("query", "key", "value"):
            linear = getattr(self, name)
            plain = linear.base if isinstance(linear, AdaptedLinear) else linear
            out = [plain(token) for token in sequence]
            if plain is not linear:
                gate, (a, b) = gate_of(linear.router, sequence, real), (linear.lora.a[0], linear.lora.b[0])
                out = [one + r * gate * b @ (a @ t) for one, t, r in zip(out, sequence, real, strict=True)]
            parts[name] = heads(torch.stack(out), 3)
        gate, prefix = gate_of(self.gated_prefix.router, sequence, real), self.gated_prefix
        key = torch.cat([gate * prefix.keys, parts["key"]], 1)
        value = torch.cat([gate * prefix.values, parts["value"]], 1)
        seen = torch.cat([torch.ones(3, dtype=torch.bool), real]).expand(5, 8)
        mixed = attended(parts["query"], key, value, seen).transpose(0, 1).flatten(1)
        h = layer.attention.output(mixed, sequence)
        inner = layer.intermediate(h)
        behind = layer.output.dense
        f = behind.base(inner)
        more = F.linear(F.relu(F.linear(f, behind.down, behind.down_bias)), behind.up, behind.up_bias)
        f = f + gate_of(behind.router, f, real) * more * real[:, None]
        rows.append(layer.output.LayerNorm(f + h))
    expected = torch.stack(rows)
    found = made(tokens, attention_mask=mask, output_hidden_states=True).hidden_states[1]
    parameters = [p for p in layer.parameters() if p.requires_grad]
    assert len(parameters) == 2 * 4 + 4 + 6
    both(found[mask.bool()], expected[mask.bool()], parameters)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_attention_sees_the_prefix_before_all_that_it_saw(name, attention, padded, monkeypatch):
    """What the function that computes attention gets in the first layer, without and with a prefix."""
    base, (tokens, mask) = language(name, attn_implementation=attention), batch()
    made = zoo.adapt(base, "UniPELT", rank={"prefix": 4, "lora": 0, "adapter": 0})
    assert {n.rpartition(".")[2] for n, p in made.named_parameters() if p.requires_grad} == {
        "keys",
        "values",
        "weight",
        "bias",
    }
    function = "eager_attention_forward" if attention == "eager" else "sdpa"
    calls = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        calls.append((query, key, value, attention_mask, kwargs.get("position_bias"), kwargs.get("is_causal")))
        return true(module, query, key, value, attention_mask, **kwargs)

    if attention == "sdpa":
        true = ALL_ATTENTION_FUNCTIONS["sdpa"]
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", spy)
    else:
        home = __import__(type(base).__module__, fromlist=["x"])
        true = getattr(home, function)
        monkeypatch.setattr(home, function, spy)
    more = {"attention_mask": mask} if padded else {}
    more |= {"decoder_input_ids": tokens} if base.config.is_encoder_decoder else {}
    with torch.no_grad():
        base(tokens, **more)
        plain = calls[0]
        calls.clear()
        made(tokens, **more)
    found = calls[0]
    prefix = next(m for m in made.modules() if isinstance(m, GatedPrefix))
    assert torch.equal(found[0], plain[0])
    for at, own in ((1, prefix.keys), (2, prefix.values)):
        torch.testing.assert_close(found[at][:, :, 4:], plain[at])
        before = found[at][:, :, :4]
        gates = before.flatten(1) @ own.flatten() / own.square().sum()
        torch.testing.assert_close(before, gates.view(-1, 1, 1, 1) * own)
        assert ((gates > 0) & (gates < 1)).all()
    seen = plain[3]
    if seen is None and not base.config.is_encoder_decoder and attention == "sdpa":
        seen = torch.ones(1, 1, 7, 7).tril().bool()  # as is_causal has it
    if seen is None:
        assert found[3] is None
    else:
        assert torch.equal(found[3][..., 4:], seen)
        assert (found[3][..., :4] == (1 if seen.dtype == torch.bool else 0)).all()
    if plain[4] is not None:
        assert torch.equal(found[4][..., 4:], plain[4])
        assert not found[4][..., :4].any()


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_may_be_computed_otherwise_later(name):
    made, (tokens, mask) = stir(zoo.adapt(language(name), "UniPELT"), 0.2), batch()
    more = {"decoder_input_ids": tokens} if made.config.is_encoder_decoder else {}
    with torch.no_grad():
        expected = made(tokens, attention_mask=mask, **more).logits
        assert torch.equal(copy.deepcopy(made)(tokens, attention_mask=mask, **more).logits, expected)
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop("gated_prefix")  # as in another process
        again = pickle.loads(pickle.dumps(made))
        assert torch.equal(again(tokens, attention_mask=mask, **more).logits, expected)
        made.set_attn_implementation("eager")
        found = made(tokens, attention_mask=mask, output_attentions=True, **more)
    torch.testing.assert_close(found.logits[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
    plain = language(name)
    plain.set_attn_implementation("eager")
    told = plain(tokens, attention_mask=mask, output_attentions=True, **more)
    which = "encoder_attentions" if made.config.is_encoder_decoder else "attentions"
    # None of T5's in transformers 5.17.
    assert [w.shape for w in getattr(found, which)] == [w.shape for w in getattr(told, which)]


def test_a_compiled_model_trains_as_the_plain_one():
    made, (tokens, _) = stir(zoo.adapt(language(num_hidden_layers=1), "UniPELT"), 0.2).train(), batch()
    twin, found = copy.deepcopy(made), []
    twin.compile(backend="eager", fullgraph=True)
    for model in (made, twin):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        found.append((loss, [p.grad for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_generation_runs_with_a_cache():
    made, tokens = stir(zoo.adapt(language(), "UniPELT"), 0.2), torch.randint(3, 64, (2, 5))
    assert made.generate(tokens, max_new_tokens=3, do_sample=False, min_new_tokens=3).shape == (2, 8)


def test_parts_may_be_left_out_and_other_models_may_have_the_rest():
    model, images = vision(), torch.randn(2, 3, 32, 32)
    made = zoo.adapt(model, "UniPELT", rank={"prefix": 0, "lora": 3}, layers=[1, -1])
    torch.testing.assert_close(made(images), model(images))
    assert {n.split(".")[1] for n, m in made.named_modules() if isinstance(m, FollowedLinear)} == {"1", "3"}
    assert {m.lora.rank for m in made.modules() if isinstance(m, AdaptedLinear)} == {3}
    assert {m.rank for m in made.modules() if isinstance(m, FollowedLinear)} == {48 // 16}
    assert made.adapted[0]["rank"] == {"prefix": 0, "lora": 3}
    made = zoo.adapt(language(), "UniPELT", rank=5)
    assert {m.lora.rank for m in made.modules() if isinstance(m, AdaptedLinear)} == {5}


def test_what_does_not_fit_is_named():
    model, (tokens, mask) = language(), batch()
    flash = zoo.adapt(language(), "UniPELT")
    flash.config._attn_implementation = "flex_attention"
    cases = [
        (lambda: zoo.adapt(vision(), "UniPELT"), "prefixes for transformers' attention alone, not for"),
        (
            lambda: zoo.adapt(model, "UniPELT", rank={"lora": 0, "prefix": 0, "adapter": 0}),
            "all of lora, prefix, adapter",
        ),
        (lambda: zoo.adapt(model, "UniPELT", rank={"prompt": 3}), "rank takes whole numbers for lora, prefix, adapter"),
        (lambda: zoo.adapt(model, "UniPELT", rank={"lora": -1}), "rank takes whole numbers for lora, prefix, adapter"),
        (lambda: zoo.adapt(model, "LoRA", rank={"lora": 1}), "rank must be a whole number, got {'lora': 1}"),
        (lambda: zoo.adapt(model, "UniPELT", alpha=2.0), "UniPELT has no use for alpha"),
        (lambda: zoo.adapt(zoo.adapt(model, "UniPELT"), "UniPELT"), "has a prefix already"),
        (lambda: flash(tokens, attention_mask=mask), "prefixes are known to eager and sdpa attention, not to"),
        (lambda: zoo.merge_adapters(zoo.adapt(model, "UniPELT")), "has an adapter behind it, which is no linear map"),
        (
            lambda: zoo.merge_adapters(zoo.adapt(model, "UniPELT", rank={"adapter": 0, "lora": 0})),
            "are prompts, which are no weights",
        ),
        (lambda: FollowedLinear(nn.Linear(2, 3), UniPELTRouter(2), 1), "the router routes 1 experts of width 2"),
        (lambda: FollowedLinear(nn.Linear(2, 3), UniPELTRouter(3), 0), "rank must be at least 1, got 0"),
        (lambda: GatedPrefix(UniPELTRouter(3, 2), 1, 1, 1), "the router routes 2 experts"),
        (lambda: UniPELTRouter(3)(torch.randn(4, 3)), "decides for whole sequences"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError) as caught:
            make()
        assert message in str(caught.value), (message, str(caught.value))
