"""Parameter-efficient experts beside frozen models."""

from __future__ import annotations

import copy
import pickle
from typing import ClassVar

import pytest
import torch
from adapted_models import GATES, LABELS, LANGUAGE, OWN, batch, language, stir, vision
from torch import nn
from transformers import BertConfig, BertModel

import zoo
from zoo.convert.adapter_kinds import KINDS
from zoo.convert.adapting import adapter_state, base_of, base_state
from zoo.moe import AdaMix, AdaptedLinear, MoE, Router, ScaledLinear, record, telemetry
from zoo.moe.layer import Recorded


def run(model, tokens, mask, **more):
    if model.config.is_encoder_decoder:
        return model(tokens, attention_mask=mask, decoder_input_ids=tokens).logits
    return model(tokens, attention_mask=mask, **more).logits


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def copied(state):
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize("name", LANGUAGE)
@pytest.mark.parametrize("kind", OWN)
def test_a_language_model_computes_what_it_did(kind, name):
    model, (tokens, mask) = language(name), batch()
    before = copied(model.state_dict())
    if name.startswith("opt") and KINDS[kind].level in ("mlp", "adapter", "beside"):
        with pytest.raises(ValueError, match=r"the MLP of model.decoder.layers.0 is part of the layer itself"):
            zoo.adapt(model, kind)
        return
    if name.startswith("t5") and kind in GATES:
        return  # it hands no labels on
    made = zoo.adapt(model, kind, router=GATES.get(kind))
    more = {"moe_context": LABELS} if kind in GATES else {}
    if name.startswith("opt") and kind == "Omni-SMoLA":
        with pytest.raises(ValueError, match=r"needs tokens as \[B, S, D\], got one list of tokens"):
            run(made, tokens, mask)
        return
    with torch.no_grad(), record(made) as step:
        found, expected = run(made, tokens, mask, **more), run(model, tokens, mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
    assert trained(made) == {n for n in adapter_state(made) if n in dict(made.named_parameters())} != set()
    assert all(torch.equal(before[n], t) for n, t in base_state(made).items())
    assert base_state(made).keys() == before.keys() == model.state_dict().keys()
    for calls in step.routings.values():
        for decision in calls:
            # Padding meets no expert; T5's decoder reads the encoder's states, whose padding it is not told.
            met = telemetry.kept_per_token(decision).view(2, 7)
            assert not met[~mask.bool()].any() or model.config.is_encoder_decoder
            assert 0 <= telemetry.max_violation(decision) < decision.num_experts
    assert KINDS[kind].level in ("one", "adapter") or step.routings


@pytest.mark.parametrize("kind", OWN)
def test_a_vision_model_computes_what_it_did(kind):
    model, images = vision(), torch.randn(2, 3, 32, 32)
    made = zoo.adapt(model, kind, router=GATES.get(kind))
    more = {"moe_context": LABELS} if kind in GATES else {}
    with torch.no_grad():
        torch.testing.assert_close(made(images, **more), model(images), rtol=1e-4, atol=1e-5)
    assert any(base_of(m) for m in made.modules())


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_tiny"])
def test_stages_are_counted_as_blocks(name):
    sizes = {
        "swin_tiny_patch4_window7_224": {"window_size": 4, "embed_dim": 24, "depths": (2, 1), "num_heads": (2, 4)},
        "convnext_tiny": {
            "dims": (16, 24, 24, 24),
            "depths": (1, 1, 1, 1),
            "embed_dim": None,
            "img_size": None,
            "num_heads": None,
        },
    }[name]
    model = vision(name, **{"depth": None, **sizes})
    made = zoo.adapt(model, "LoRAMoE", layers=[0, 2])
    names = {n for n, m in made.named_modules() if isinstance(m, AdaptedLinear)}
    assert len(names) == 4
    assert len({n.rpartition(".")[0] for n in names}) == 2
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(made(images), model(images))


def test_a_fused_projection_changes_in_the_parts_that_are_meant():
    model = vision(depth=1)
    made = stir(zoo.adapt(model, "MoELoRA", targets=("query", "value")))
    qkv, x = made.blocks[0].attn.qkv, torch.randn(2, 5, 48)
    apart = (qkv(x) - model.blocks[0].attn.qkv(x)).abs().flatten(0, 1).amax(0) > 1e-4
    assert apart[:48].all()
    assert not apart[48:96].any()
    assert apart[96:].all()
    whole = stir(zoo.adapt(model, "MoELoRA", targets="qkv"))
    assert whole.blocks[0].attn.qkv.columns is None
    assert ((whole.blocks[0].attn.qkv(x) - model.blocks[0].attn.qkv(x)).abs() > 1e-5).any(0).any(0).all()


def test_phi3s_grouped_queries_are_found_in_its_fused_projection():
    made = stir(zoo.adapt(language("phi3 (fused)"), "MoV", num_experts=3))
    inner = made.model.layers[0].self_attn.qkv_proj
    assert (inner.columns, inner.base.columns) in (((48, 64), (32, 48)), ((32, 48), (48, 64)))
    assert isinstance(made.model.layers[0].mlp.down_proj, ScaledLinear)


@pytest.mark.parametrize("layers", ["every-2", [0, -1]])
def test_numbers_of_experts_follow_the_depth(layers):
    made = zoo.adapt(language(), "MoLA", num_experts=(2, 3, 5), layers=layers, targets="q_proj")
    found = {i: m.self_attn.q_proj for i, m in enumerate(made.model.layers) if base_of(m.self_attn.q_proj)}
    counts = {0: 2, 1: 2, 2: 3, 3: 5}
    assert {i: m.lora.num_experts for i, m in found.items()} == {i: counts[i] for i in found}
    assert list(found) == ([1, 3] if layers == "every-2" else [0, 3])
    assert made.adapted[0]["layers"] == list(found)


def test_a_sparse_model_is_adapted_in_its_attention():
    model = zoo.create_model("language/mixtral_tiny", num_hidden_layers=2, hidden_size=64, vocab_size=64).eval()
    made = zoo.adapt(model, "LoRAMoE")
    adapted = [n for n, m in made.named_modules() if isinstance(m, AdaptedLinear)]
    assert {n.rpartition(".")[2] for n in adapted} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    tokens, mask = batch()
    with record(made) as step:
        found = made(tokens, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], model(tokens, attention_mask=mask).logits[mask.bool()])
    moes = [n for n, m in made.named_modules() if isinstance(m, MoE)]
    assert set(step.routings) == {*moes, *adapted}
    for name in (*moes, *adapted):  # its own gates and those of adapters leave padding out alike
        assert set(step.routings[name][0].token_index.tolist()) <= set(mask.flatten().nonzero().flatten().tolist())
    with pytest.raises(ValueError, match=r"adapt: model.layers.0.mlp is a mixture of experts already, and MixLoRA"):
        zoo.adapt(model, "MixLoRA")


def test_layers_that_have_experts_themselves_are_adapted_in_their_attention():
    base = zoo.create_model("vision_language/gemma4_tiny").eval()  # router and experts are the layer's own
    made = zoo.adapt(base, "MoLoRA", num_experts=2)
    adapted = {n.removeprefix("model.language_model.layers.0.") for n, m in made.named_modules() if base_of(m)}
    assert {f"self_attn.{name}_proj" for name in "qkvo"} < adapted
    assert not any("experts" in name or "router" in name for name in adapted)
    tokens = torch.randint(10, 60, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(made(input_ids=tokens).logits, base(input_ids=tokens).logits, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match=r"expected an attention_mask \[B, S\], got a dict of masks"):
            zoo.adapt(base, "SMoP")(input_ids=tokens)


def test_attention_and_mlps_are_adapted_in_two_calls():
    model, (tokens, mask) = language(), batch()
    first = stir(zoo.adapt(model, "MoELoRA"))
    both = zoo.adapt(first, "MixLoRA")
    assert trained(first) < trained(both)
    assert [how["kind"] for how in both.adapted] == ["MoELoRA", "MixLoRA"]
    torch.testing.assert_close(
        run(both, tokens, mask)[mask.bool()], run(first, tokens, mask)[mask.bool()], atol=1e-4, rtol=1e-4
    )
    assert both.adapted[1]["layers"] == [0, 1, 2, 3]


def test_a_layer_may_have_two_adapters_of_one_kind(tmp_path):
    base, (tokens, mask) = language(), batch()
    first = stir(zoo.adapt(base, "LoRA", targets=("query", "up"), rank=2))
    both = stir(zoo.adapt(first, "LoRA", targets=("query", "q_proj", "up"), rank=3, layers=[0, 1]))
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        linear, x = base.model.layers[1].get_submodule(name), torch.randn(4, 32)
        expected, layer = linear(x), both.model.layers[1].get_submodule(name)
        for lora in (layer.lora, layer.base.lora):
            expected = expected + lora.alpha / lora.rank * x @ lora.a[0].T @ lora.b[0].T
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        assert base_of(both.model.layers[2].get_submodule(name).base) is None
    zoo.save_pretrained(both, tmp_path / "adapters")
    again = zoo.from_pretrained(tmp_path / "adapters", base=base)
    assert torch.equal(run(again, tokens, mask), run(both, tokens, mask))
    torch.testing.assert_close(
        run(zoo.merge_adapters(both), tokens, mask), run(both, tokens, mask), rtol=1e-3, atol=1e-3
    )


def test_berts_mlps_are_found_and_its_gates_hear_of_padding():
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3, "num_hidden_layers": 2}
    model = BertModel(BertConfig(vocab_size=64, **sizes)).eval()
    made, (tokens, mask) = zoo.adapt(model, "LoRAMoE"), batch()
    adapted = {n.removeprefix("encoder.layer.0.") for n, m in made.named_modules() if base_of(m)}
    assert {"intermediate.dense", "output.dense"} == {n for n in adapted if not n.startswith("encoder")}
    with torch.no_grad(), record(made) as step:
        made(tokens, attention_mask=mask)
    for decision in (decision for calls in step.routings.values() for decision in calls):
        assert set(decision.token_index.tolist()) == set(mask.flatten().nonzero().flatten().tolist())


def test_a_gate_may_be_any_other_one():
    made = zoo.adapt(language(), "MoELoRA", router={"k": 1, "jitter": 0.1}, losses={"z": 0.1}, num_experts=3)
    gate = made.model.layers[0].self_attn.q_proj.router
    assert (gate.k, gate.jitter, gate.normalize, gate.num_experts, list(gate.losses.terms)) == (1, 0.1, True, 3, ["z"])
    made = zoo.adapt(language(), "MoELoRA", router="ExpertChoiceRouter")
    assert type(made.model.layers[0].self_attn.q_proj.router).__name__ == "ExpertChoiceRouter"
    assert zoo.adapt(language(), "MoLA", num_experts=1).model.layers[0].self_attn.q_proj.router.k == 1


class Spy(Router):
    """A dense gate that keeps what it was told."""

    seen: ClassVar[list] = []

    def __init__(self, dim, num_experts):
        super().__init__(dim, num_experts)
        self.gate = zoo.moe.routers.DenseRouter(dim, num_experts)

    def forward(self, x, **context):
        self.seen.append(context)
        return self.gate(x, **context)


@pytest.mark.parametrize("name", ["llama", "gpt2 (transposed, fused)"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gates_are_told_of_the_batch_and_by_the_caller(name, checkpointing):
    made = zoo.adapt(language(name), "MoELoRA", router=Spy, layers=[1]).train()
    if checkpointing:
        made.gradient_checkpointing_enable({"use_reentrant": False})
    tokens, mask = batch()
    Spy.seen.clear()
    made(tokens, attention_mask=mask, labels=tokens, moe_context={"task": torch.tensor([4, 5])}).loss.backward()
    assert len(Spy.seen) == (4 if checkpointing else 2)
    for told in Spy.seen:
        assert torch.equal(told["token_ids"], tokens)
        assert torch.equal(told["mask"], mask.bool())
        assert told["task"].tolist() == [4, 5]
    Spy.seen.clear()
    made(tokens)
    assert not {"mask", "task"} & Spy.seen[0].keys()
    # transformers' own hook for checkpointing cannot be pickled.
    for same in (copy.deepcopy(made), *(() if checkpointing else (pickle.loads(pickle.dumps(made)),))):
        Spy.seen.clear()
        same(tokens, moe_context={"task": 3})
        assert [told["task"] for told in Spy.seen] == [3, 3]


@pytest.mark.parametrize("kind", [*OWN, "UniPELT"])
def test_it_works_on_the_meta_device_and_by_the_seed(kind):
    model = language()
    with torch.device("meta"):
        thin = zoo.adapt(copy.deepcopy(model).to("meta"), kind, router=GATES.get(kind))
    made = []
    for _ in range(2):
        torch.manual_seed(5)
        made.append(zoo.adapt(model, kind, router=GATES.get(kind)).state_dict())
    assert {n: t.shape for n, t in thin.state_dict().items()} == {n: t.shape for n, t in made[0].items()}
    assert all(t.is_meta for t in thin.state_dict().values())
    assert all(torch.equal(made[0][n], made[1][n]) for n in made[0])


def test_new_parameters_take_type_device_and_mode_of_the_weights():
    made = zoo.adapt(language().bfloat16().train(), "MixLoRA")
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert all(m.training for m in made.modules())
    made = zoo.adapt(language().bfloat16(), "MoLoRA", dtype="float32")
    assert {p.dtype for n, p in made.named_parameters() if n in trained(made)} == {torch.float32}
    assert not any(m.training for m in made.modules())
    mixed = language().train()
    mixed.model.layers[0].mlp.act_fn.eval()
    made = zoo.adapt(mixed, "AdaMix")
    assert [n for n, m in made.named_modules() if not m.training] == ["model.layers.0.mlp.base.act_fn"]
    made = zoo.adapt(language().bfloat16(), "MoLoRA")
    tokens, mask = batch()
    assert run(made, tokens, mask).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [*OWN, "UniPELT"])
def test_wide_adapters_stand_beside_narrow_weights(kind):
    base, (tokens, mask) = language().bfloat16().train(), batch()
    made = zoo.adapt(base, kind, router=GATES.get(kind), dtype="float32")
    context = {"moe_context": LABELS} if kind in GATES else {}
    out = made(tokens, attention_mask=mask, labels=tokens, **context)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert {p.grad.dtype for p in made.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("name", ["llama", "gpt2 (transposed, fused)"])
@pytest.mark.parametrize("kind", [*OWN, "UniPELT"])
def test_what_a_sequence_gets_does_not_depend_on_padding_or_others(kind, name):
    made, (tokens, mask) = stir(zoo.adapt(language(name), kind, router=GATES.get(kind)), 0.1), batch()
    together, alone = ({"moe_context": LABELS}, {"moe_context": {n: t[:1] for n, t in LABELS.items()}})
    together, alone = (together, alone) if kind in GATES else ({}, {})
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = made(tokens, attention_mask=mask, position_ids=positions, **together).logits[0, 3:]
        expected = made(tokens[:1, 3:], **alone).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


class Int8(nn.Linear):
    """A linear layer of whole numbers, as quantisers make them."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.weight = nn.Parameter((self.weight.data * 300).to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) / 300, self.bias)


@pytest.mark.parametrize("kind", ["MoELoRA", "MoV", "LoRA"])
def test_quantised_layers_are_stood_beside(kind):
    base, x = nn.Sequential(*(nn.Sequential(Int8(8, 6), nn.ReLU(), Int8(6, 8)) for _ in range(2))), torch.randn(5, 8)
    made = zoo.adapt(base, kind, targets=("0", "2"))
    assert torch.equal(made(x), base(x))
    assert {p.dtype for n, p in made.named_parameters() if n in trained(made)} == {torch.float32}
    made(x).sum().backward()
    assert {n for n, p in made.named_parameters() if p.grad is not None} == trained(made)


def test_what_does_not_fit_is_named():
    model = language()
    cases = [
        (lambda: zoo.adapt(model, "MixLora"), "did you mean MixLoRA"),
        (lambda: zoo.adapt(model, "moelora"), "MoELoRA (a gate that chooses) or MOELoRA (by task)"),
        (lambda: zoo.adapt(model), "adapt: give a kind"),
        (
            lambda: zoo.adapt(model, "LoRAMoE", targets="fc1"),
            "is called fc1; its blocks have: self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, self_attn.o_proj, "
            "mlp.gate_proj, mlp.up_proj, mlp.down_proj",
        ),
        (lambda: zoo.adapt(model, "MixLoRA", targets="fc1"), "no linear layer 'fc1' in model.layers.0.mlp"),
        (lambda: zoo.adapt(model, "MOELoRA"), "adapt: MOELoRA needs num_tasks: give router={'num_tasks': ...}"),
        (lambda: zoo.adapt(model, "MoV", rank=3), "adapt: MoV has no use for rank, got 3"),
        (lambda: zoo.adapt(model, "AdaMix", router="TopKRouter"), "AdaMix has no use for router"),
        (lambda: zoo.adapt(model, "MoR1E", alpha=2.0), "MoR1E has no use for alpha"),
        (lambda: zoo.adapt(model, "MoR1E", rank=5), "32 experts are no pairs of 5 rows and columns"),
        (lambda: zoo.adapt(model, "LoRA", num_experts=2), "LoRA has no use for num_experts"),
        (lambda: zoo.adapt(model, "MoLA", num_experts=[]), "num_experts is an empty list"),
        (lambda: zoo.adapt(model, "MoLA", num_experts=0), "num_experts must be at least 1, got 0"),
        (lambda: zoo.adapt(model, "LoRA", alpha="16"), "alpha must be a number, got '16'"),
        (
            lambda: zoo.adapt(model, "MoELoRA", contrastive={"weigth": 1}),
            "contrastive takes weight, and of temperature",
        ),
        (lambda: zoo.adapt(model, "MoELoRA", contrastive={"weight": 1, "k": 2}), "samples; got {'weight': 1, 'k': 2}"),
        (lambda: zoo.adapt(model, "LoRA", rank=2.5), "rank must be a whole number, got 2.5"),
        (lambda: zoo.adapt(model, "AdaMix", rank="8"), "rank must be a whole number, got '8'"),
        (lambda: zoo.adapt(model, "MoLA", layers=[9]), "no block 9 among 4 blocks"),
        (lambda: zoo.adapt(nn.Linear(3, 3), "MoLA"), "no linear layer of Linear is called"),
        (lambda: zoo.adapt(model, "MeteoRA"), "MeteoRA has no targets of its own"),
        (lambda: zoo.adapt(model, "MoLA", source="there"), "a source says all itself"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError) as caught:
            make()
        assert message in str(caught.value)


def test_weights_that_a_block_uses_itself_are_refused():
    model = vision("swinv2_tiny_window8_256", window_size=4, embed_dim=24, depths=(1, 1), num_heads=(2, 4), depth=None)
    with pytest.raises(ValueError, match=r"computes with the weight of layers.0.blocks.0.attn.qkv itself"):
        zoo.adapt(model, "MoELoRA")
    made = zoo.adapt(model, "LoRAMoE")
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(made(images), model(images))


def test_adamix_and_others_are_not_recorded_as_gates():
    made = zoo.adapt(language(), "AdaMix")
    assert any(isinstance(m, AdaMix) for m in made.modules())
    assert not any(isinstance(m, Recorded) for m in made.modules())


def test_attention_whose_place_in_a_block_has_no_name_of_its_own_is_found():
    """Nemotron-H: attention, state-space layers and experts are all called mixer."""
    model = zoo.create_model("language/nemotron_h_tiny").eval()
    adapted = zoo.adapt(model, "LoRAMoE")
    found = {name.removesuffix(".lora") for name, m in adapted.named_modules() if type(m).__name__ == "LoRAExperts"}
    assert found == {f"model.layers.2.mixer.{part}_proj" for part in "qkvo"}
    tokens = torch.randint(0, 1024, (2, 9))
    torch.testing.assert_close(adapted(tokens).logits, model(tokens).logits)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    adapted.train()(tokens, attention_mask=mask, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
