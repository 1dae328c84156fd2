"""Conversions of what conversions made."""

import pytest
import torch
import transformers
from adapted_models import stir
from converted_cases import HEADS, SIZES, error, experts_of, language, losses_of, output, shaken, vit

import zoo
from zoo.moe import LoRAOfExperts, QuantisedExperts

MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}


def mixtral(folder, **fields):
    """A Mixtral that was read from a folder."""
    config = transformers.MixtralConfig(**{**SIZES, **HEADS, **MOE, "intermediate_size": 32, **fields})
    shaken(transformers.MixtralForCausalLM(config)).save_pretrained(folder)
    return zoo.from_pretrained(folder)


def gpt_oss(folder):
    """A gpt-oss, whose experts have biases and clamp both sides, and whose blocks take a pair from their MLPs."""
    fields = {**SIZES, **HEADS, **MOE, "head_dim": 8, "intermediate_size": 32, "sliding_window": 8}
    model = shaken(transformers.GptOssForCausalLM(transformers.GptOssConfig(**fields)))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.gate_up_proj.normal_(0, 2)  # far beyond where they are clamped, at 7
    model.save_pretrained(folder)
    return zoo.from_pretrained(folder)


def tokens():
    return torch.randint(3, 64, (2, 9))


CHANGES = {
    "merge_adapters": lambda m: zoo.merge_adapters(stir(zoo.adapt(m, "LoRA", targets=["gate", "up", "down"], rank=2))),
    "prune": lambda m: zoo.prune(m, experts=[[0, 2]] * 3),
    "grow": lambda m: zoo.grow(m, num_new=1, init="random"),
    "share_depth": zoo.share_depth,
    "to_dense": zoo.to_dense,
    "average": lambda m: zoo.average([m, shaken(zoo.average([m, m]))]),
}


@pytest.mark.filterwarnings("ignore:save_pretrained. .* has adapters alone")
@pytest.mark.parametrize("name", CHANGES)
def test_adapters_beside_what_a_conversion_made_are_not_put_beside_the_model_it_was_made_of(name, tmp_path):
    """Where shapes are the same, and experts alone have changed, nothing else would tell."""
    ids, made = tokens(), CHANGES[name](mixtral(tmp_path / "base"))
    tuned = stir(zoo.adapt(made, "LoRA", rank=2))
    with pytest.warns(UserWarning, match=f"no folder has the model that {name} made"):
        zoo.save_pretrained(tuned, tmp_path / "adapters")
    with pytest.raises(ValueError, match=f"stand beside is what {name} made of another; give base"):
        zoo.from_pretrained(tmp_path / "adapters")
    found = zoo.from_pretrained(tmp_path / "adapters", base=made)
    assert torch.equal(output(found, ids), output(tuned, ids))
    zoo.save_pretrained(tuned, tmp_path / "peft", peft=True)
    with pytest.raises(ValueError, match="read from nowhere; give base"):
        zoo.from_pretrained(tmp_path / "peft")


@pytest.mark.filterwarnings("error:save_pretrained")
def test_adapters_beside_a_converted_model_that_was_saved_and_read_are_found(tmp_path):
    ids, pruned = tokens(), zoo.prune(mixtral(tmp_path / "base"), experts=[[0, 2]] * 3)
    zoo.save_pretrained(pruned, tmp_path / "pruned")
    tuned = stir(zoo.adapt(zoo.from_pretrained(tmp_path / "pruned"), "LoRA", rank=2))
    zoo.save_pretrained(tuned, tmp_path / "adapters")
    assert torch.equal(output(zoo.from_pretrained(tmp_path / "adapters"), ids), output(tuned, ids))
    base = vit()
    zoo.save_pretrained(zoo.upcycle(base, "all", 2), tmp_path / "vit")  # which upcycles again when it is read
    tuned = stir(zoo.adapt(zoo.from_pretrained(tmp_path / "vit"), "LoRA", rank=2))
    zoo.save_pretrained(tuned, tmp_path / "beside")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(output(zoo.from_pretrained(tmp_path / "beside"), images), output(tuned, images))


@pytest.mark.parametrize(
    "options", [{"offload": 2}, {"quantise": "mxfp4"}, {"offload": 2, "quantise": "int8"}], ids=str
)
def test_adapters_beside_experts_with_biases_wherever_these_are(options, tmp_path):
    gpt_oss(tmp_path / "base")
    ids, base = tokens(), zoo.from_pretrained(tmp_path / "base", **options)
    tuned = stir(zoo.adapt(base, "LoRA", rank=2))
    zoo.save_pretrained(tuned, tmp_path / "adapters")
    found = zoo.from_pretrained(tmp_path / "adapters", base=tmp_path / "base", **options)
    assert error(output(found, ids), output(tuned, ids)) < 1e-5


@pytest.mark.filterwarnings("ignore:save_pretrained. .* has adapters alone")
def test_blocks_that_share_experts_in_few_bits_have_adapters_inside(tmp_path):
    shared = zoo.quantise(zoo.share_depth(mixtral(tmp_path / "base")), "int8")
    assert len({id(moe.experts) for moe in experts_of(shared)}) == 1
    for base in (shared, zoo.offload(shared, 3)):
        ids, tuned = tokens(), zoo.adapt(base, "LoRA", targets=["query", "gate", "up", "down"], rank=2)
        assert error(output(tuned, ids), output(shared, ids)) < 1e-6
        inside = [module for module in tuned.modules() if isinstance(module, LoRAOfExperts)]
        assert len(inside) == 3
        zoo.save_pretrained(stir(tuned), tmp_path / "adapters", overwrite=True)
        found = zoo.from_pretrained(tmp_path / "adapters", base=base)
        assert error(output(found, ids), output(tuned, ids)) < 1e-6


@pytest.mark.parametrize("few", [lambda m: zoo.quantise(m, "int8"), lambda m: zoo.offload(m, 2)])
def test_experts_that_are_no_parameters_cannot_be_shared(few, tmp_path):
    with pytest.raises(ValueError, match=r"share_depth: model.layers.0.mlp.experts are .*; share first"):
        zoo.share_depth(few(mixtral(tmp_path / "base")))


def test_dense_blocks_share_what_sparse_ones_did(tmp_path):
    ids, shared = tokens(), zoo.share_depth(mixtral(tmp_path / "base", tie_word_embeddings=True))
    dense = zoo.to_dense(shared)
    assert type(dense).__name__ == "MistralForCausalLM"
    for name in "qkvo":
        assert len({id(getattr(layer.self_attn, f"{name}_proj").weight) for layer in dense.model.layers}) == 1
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    zoo.save_pretrained(dense, tmp_path / "dense")
    assert torch.equal(
        output(transformers.MistralForCausalLM.from_pretrained(tmp_path / "dense"), ids), output(dense, ids)
    )


SPARSE_AGAIN = {
    "upcycle": lambda m, ids: zoo.upcycle(m, "all", 2),
    "granular": lambda m, ids: zoo.upcycle(m, "all", 2, granularity=2),
    "mix": lambda m, ids: zoo.mix([m, m]),
    "split": lambda m, ids: zoo.split(m, num_experts=4, k=4),
    "co-activation": lambda m, ids: zoo.split(m, num_experts=4, k=4, method="coactivation", calibrate=losses_of(ids)),
    "MixLoRA": lambda m, ids: zoo.adapt(m, "MixLoRA", num_experts=2, rank=2),
}


@pytest.mark.parametrize("name", SPARSE_AGAIN)
def test_what_was_made_dense_can_be_sparse_again(name, tmp_path):
    """gpt-oss: MLPs with biases that clamp, and answer in pairs."""
    ids, dense = tokens(), zoo.to_dense(gpt_oss(tmp_path / "base"), method={"expert": 1})
    found = SPARSE_AGAIN[name](dense, ids)
    assert error(output(found, ids), output(dense, ids)) < 1e-5
    assert len(experts_of(found)) == 3


def test_grown_experts_are_one_stack_in_few_bits_and_offloaded(tmp_path):
    ids, grown = tokens(), zoo.grow(mixtral(tmp_path / "base"), num_new=2, init="random")
    zoo.save_pretrained(grown, tmp_path / "grown")
    whole = zoo.from_pretrained(tmp_path / "grown")
    few = zoo.quantise(grown, "float8")
    assert [m.num_experts for m in few.modules() if isinstance(m, QuantisedExperts)] == [6] * 3
    assert torch.equal(output(few, ids), output(zoo.quantise(whole, "float8"), ids))
    zoo.save_pretrained(few, tmp_path / "few")
    assert torch.equal(output(zoo.from_pretrained(tmp_path / "few", quantise="float8"), ids), output(few, ids))
    apart = zoo.offload(grown, 3)
    assert error(output(apart, ids), output(grown, ids)) < 1e-6
    assert len([m for m in apart.modules() if type(m).__name__ == "OffloadedExperts"]) == 3


def test_pieces_of_copies_that_were_dropped_are_refused_by_name(tmp_path):
    granular = zoo.upcycle(vit(), "all", 2, granularity=2)
    for experts in ([1], [0, 2, 3]):
        with pytest.warns(UserWarning, match="so that k goes"):
            pruned = zoo.prune(granular, experts=[experts] * 4)
        with pytest.raises(ValueError, match="a model that was changed after it was made"):
            zoo.save_pretrained(pruned, tmp_path / "model")


@pytest.mark.parametrize("training", [True, False])
def test_modes_are_those_of_the_model(training, tmp_path):
    """Adapters take theirs from what they stand beside: dropout in evaluation would show here."""
    base = mixtral(tmp_path / "base").train(training)
    for made in (zoo.offload(base, 2), zoo.prune(base, drop_layers=[1]), zoo.prune(base, drop_blocks=[1])):
        assert {module.training for module in made.modules()} == {training}
    inside = zoo.adapt(zoo.offload(base, 2), "LoRA", targets=["gate", "up", "down"], rank=2, dropout=0.5)
    assert {module.training for module in inside.modules()} == {training}


def test_layers_whose_blocks_read_two_modalities_are_dropped_by_their_numbers():
    sizes = {
        "image_size": 16,
        "patch_size": 8,
        "vocab_size": 64,
        "text_length": 4,
        "channels": 3,
        "embed_dim": 24,
        "depth": 4,
    }
    model = zoo.create_model("vision_language/limoe_tiny", **sizes, num_heads=2, num_experts=2).eval()
    images, ids = torch.randn(2, 3, 16, 16), torch.randint(1, 64, (2, 4))

    def calibrate(model):
        yield model(images, ids).logits.mean()

    with pytest.raises(ValueError, match="has no one stream; give drop_layers as numbers of layers"):
        zoo.prune(model, drop_layers=1, calibrate=calibrate)
    dropped = zoo.prune(model, drop_layers=[0])
    with torch.no_grad():
        model.blocks[1].mlp.experts.down_proj.zero_()
        model.blocks[1].mlp.experts.down_proj_bias.zero_()
        assert error(dropped(images, ids).logits, model(images, ids).logits) < 1e-5


def test_the_number_of_experts_a_token_meets_is_set_after_other_conversions():
    """gpt2's biases are parts of the whole, k of them a token: of what shares, grows or adapts them."""
    ids, dense = tokens(), shaken(language("gpt2 (transposed)"))
    split = zoo.split(dense, num_experts=4, k=2)
    for made, expected in (
        (zoo.share_depth(split), zoo.share_depth(dense)),
        (zoo.adapt(split, "LoRA", targets=["gate", "up", "down"], rank=2), dense),
        (zoo.adapt(split, "LLaVA-MoLE", num_experts=2, rank=2), dense),
    ):
        zoo.convert.set_k(made, 4)
        assert error(output(made, ids), output(expected, ids)) < 1e-5
    grown = zoo.grow(split, num_new=1)
    zoo.convert.set_k(grown, 4)
    for layer, mlp in zip(experts_of(grown), (block.mlp for block in dense.transformer.h)):
        parts = 4 * layer.experts.whole().down_proj_bias
        torch.testing.assert_close(parts, mlp.c_proj.bias.expand(5, -1), rtol=1e-5, atol=1e-7)
    apart = zoo.offload(split, 2)
    with pytest.raises(ValueError, match="offloaded experts, whose biases stay where they are; set k before"):
        zoo.convert.set_k(apart, 4)
    assert {layer.router.k for layer in experts_of(apart)} == {2}


def test_an_optimizer_is_not_half_filled():
    dense = language("llama")
    old, grown = torch.optim.AdamW(dense.parameters()), zoo.grow(zoo.upcycle(dense, "all", 2), num_new=1)
    output_of = dense(tokens()).logits.square().mean()
    output_of.backward()
    old.step()
    new = torch.optim.AdamW(grown.parameters())
    with pytest.raises(ValueError, match=r"layers.0.mlp has GrownExperts, which upcycle does not make"):
        zoo.convert.upcycle_optimizer(old, dense, new, grown)
    assert not new.state


def test_blocks_that_tell_token_ids_take_what_conversions_put_there():
    """DeepSeek-V4, whose blocks hand input_ids to their MLPs, and whose first gates look tokens up."""
    model = zoo.create_model("language/deepseek_v4_tiny", num_hidden_layers=2, vocab_size=64).eval()
    tokens = torch.randint(0, 64, (2, 9))
    logits = model(tokens).logits
    dense = zoo.to_dense(model, shared=0)
    for layer, before in zip(dense.model.layers, model.model.layers):
        assert layer.mlp.activation == "swiglu:10.0"
        assert layer.mlp.down_proj.weight.shape == before.mlp.experts.down_proj.shape[1:]
    assert dense(tokens).logits.isfinite().all()
    again = zoo.split(dense, num_experts=4, k=4)
    torch.testing.assert_close(again(tokens).logits, dense(tokens).logits, rtol=1e-3, atol=1e-4)
    for other in (zoo.offload(model, 4), zoo.adapt(model, "LoRA", targets=["down_proj"])):
        torch.testing.assert_close(other(tokens).logits, logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"experts of a ScoredHashRouter cannot be dropped, its table \[64, 3\] mixes"):
        zoo.prune(model, 8, by="counts", calibrate=lambda m: [m(tokens, labels=tokens).loss])
