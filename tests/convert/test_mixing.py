"""Branch-Train-Mix: the experts are the branches' MLPs, all else is their mean."""

from __future__ import annotations

import copy
import json
import math
import weakref

import pytest
import timm
import torch
import transformers
from torch import nn

import zoo
from zoo.convert import averaging
from zoo.moe import MoE

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "bos_token_id": 1, "eos_token_id": 2}
DROPS = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
OPT = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LANGUAGE = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**SIZES, **HEADS}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**SIZES, **HEADS}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**SIZES, **HEADS, "head_dim": 8}),
    "tied": ("LlamaConfig", "LlamaForCausalLM", {**SIZES, **HEADS, "tie_word_embeddings": True}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {**GPT2, **DROPS}),
    "opt": ("OPTConfig", "OPTForCausalLM", {**OPT, "word_embed_proj_dim": 32, "dropout": 0.0}),
}


def language(name: str, **more) -> nn.Module:
    config, model, sizes = LANGUAGE[name]
    return stirred(getattr(transformers, model)(getattr(transformers, config)(**{**sizes, **more})).eval())


def vit(**options) -> nn.Module:
    sizes = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
    return stirred(timm.create_model("vit_tiny_patch16_224", **{**sizes, **options}).eval())


@torch.no_grad()
def stirred(model: nn.Module, spread: float = 0.05) -> nn.Module:
    """The model with all weights moved: norms and biases too, so that nothing may be lost."""
    for parameter in model.parameters():
        parameter.add_(spread * torch.randn_like(parameter))
    return model


def branch(model: nn.Module) -> nn.Module:
    return stirred(copy.deepcopy(model))


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(x)
    return getattr(found, "logits", found)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", [*LANGUAGE, "vit"])
def test_identical_models_mix_to_the_dense_model(name):
    dense = vit() if name == "vit" else language(name)
    x = torch.randn(2, 3, 32, 32) if name == "vit" else torch.randint(3, 64, (2, 9))
    expected = output(dense, x)
    sparse = zoo.mix([dense, copy.deepcopy(dense), copy.deepcopy(dense)], layers=[1])
    assert sum(isinstance(m, MoE) for m in sparse.modules()) == 1
    assert error(output(sparse, x), expected) < 2e-6
    assert torch.equal(output(dense, x), expected)


def softmax(values):
    shifted = [math.exp(v - max(values)) for v in values]
    return [s / sum(shifted) for s in shifted]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_mixed_llama_layer_is_the_paper_s_formula_token_by_token(k):
    models = [language("llama").double() for _ in range(3)]
    weights = [1.0, 2.0, 5.0]
    sparse = zoo.mix(models, k=k, weights=weights, router_std=0.7)
    for name, found in sparse.named_parameters():
        if ".mlp." not in name:
            parts = [dict(m.named_parameters())[name] for m in models]
            expected = sum(w / 8 * p for w, p in zip(weights, parts))
            assert error(found.detach(), expected.detach()) < 1e-14
    for layer in range(2):
        x, moe = torch.randn(7, 32, dtype=torch.float64), sparse.model.layers[layer].mlp
        moe.router.dtype = None
        with torch.no_grad():
            found = moe(x)
            for token, y in zip(x, found):
                logits = (moe.router.weight @ token).tolist()
                chosen = sorted(range(3), key=lambda e: -logits[e])[:k]
                shares = softmax([logits[e] for e in chosen])
                expected = torch.zeros(32, dtype=torch.float64)
                for e, share in zip(chosen, shares):
                    mlp = models[e].model.layers[layer].mlp
                    gate, up = mlp.gate_proj.weight @ token, mlp.up_proj.weight @ token
                    expected += share * (mlp.down_proj.weight @ (gate / (1 + torch.exp(-gate)) * up))
                assert error(y, expected) < 1e-12


@pytest.mark.parametrize("name", ["gpt2", "opt", "vit"])
def test_experts_are_the_branches_mlps_in_order(name):
    seed = vit() if name == "vit" else language(name)
    models = [seed, branch(seed), branch(seed)]
    sparse = zoo.mix(models, router="DenseRouter", router_std=0.0)  # every expert, each a third
    at = {"vit": "blocks.1.mlp", "gpt2": "transformer.h.1.mlp", "opt": "model.decoder.layers.1.fc1"}[name]
    moe = sparse.get_submodule(at)
    x = torch.randn(5, moe.experts.dim)
    with torch.no_grad():
        each = []
        for model in models:
            if name == "opt":
                layer = model.get_submodule("model.decoder.layers.1")
                each.append(layer.fc2(torch.relu(layer.fc1(x))))
            else:
                each.append(model.get_submodule(at)(x))
        assert error(moe(x), sum(each) / 3) < 1e-5


@pytest.mark.parametrize(
    ("name", "layers", "relative"),
    [("llama", "all", "Mixtral"), ("mistral", "all", "Mixtral"), ("qwen3", [1], "Qwen3Moe")],
)
def test_a_mixed_model_is_saved_as_its_sparse_relative(name, layers, relative, tmp_path):
    seed = language(name)
    sparse = zoo.mix([seed, branch(seed)], layers=layers, k=1)
    ids = torch.randint(3, 64, (2, 9))
    zoo.save_pretrained(sparse, tmp_path / "mixed")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "mixed").eval()
    assert type(theirs).__name__ == f"{relative}ForCausalLM"
    assert error(output(theirs, ids), output(sparse, ids)) < 2e-5
    assert error(output(zoo.from_pretrained(tmp_path / "mixed"), ids), output(sparse, ids)) < 2e-5


def test_a_mixed_timm_model_is_saved_and_read(tmp_path):
    seed, x = vit(), torch.randn(2, 3, 32, 32)
    sparse = zoo.mix(seed, others=[branch(seed), branch(seed)])
    zoo.save_pretrained(sparse, tmp_path / "mixed")
    assert error(output(zoo.from_pretrained(tmp_path / "mixed"), x), output(sparse, x)) < 2e-6


def test_folders_are_read_one_at_a_time(tmp_path, monkeypatch):
    seed = language("llama")
    models = [seed, branch(seed), branch(seed)]
    folders = [tmp_path / str(i) for i in range(3)]
    for model, folder in zip(models, folders):
        model.save_pretrained(folder)
    alive = []
    read = zoo.from_pretrained

    def counted(source, **options):
        # Of the models that were read, what is alive while the next one is.
        alive.append(sum(model() is not None for model in were))
        model = read(source, **options)
        were.append(weakref.ref(model))
        return model

    were = []
    monkeypatch.setattr("zoo.pretrained.dispatch.from_pretrained", counted)
    ids = torch.randint(3, 64, (2, 9))
    torch.manual_seed(1)
    found = zoo.mix(folders)
    assert alive == [0, 0, 0]  # the result is a copy
    torch.manual_seed(1)
    expected = zoo.mix(models)
    assert error(output(found, ids), output(expected, ids)) < 2e-6
    alive.clear()
    were.clear()
    mean = zoo.average(folders)
    assert alive == [0, 1, 1]
    assert error(output(mean, ids), output(zoo.average(models), ids)) < 2e-6


def test_an_average_is_the_weighted_mean_in_float32_and_keeps_the_type():
    seed = language("tied")
    models = [m.bfloat16() for m in (seed, branch(seed), branch(seed))]
    before = [copy.deepcopy(m.state_dict()) for m in models]
    mean = zoo.average(models, weights=[1, 1, 2])
    assert mean.lm_head.weight is mean.model.embed_tokens.weight
    for name, found in mean.state_dict().items():
        expected = sum(w * s[name].double() for w, s in zip((0.25, 0.25, 0.5), before))
        assert found.dtype == torch.bfloat16
        assert (found.double() - expected).abs().max() <= 2**-8 * expected.abs().max()
    assert all(torch.equal(s[n], t) for s, m in zip(before, models) for n, t in m.state_dict().items())
    alone = zoo.average(models, weights=[0, 0, 3])
    assert all(torch.equal(t, before[2][n]) for n, t in alone.state_dict().items())


def test_sparse_models_are_averaged_too():
    one, two = (zoo.create_model("vision/vmoe_tiny_test", num_classes=3) for _ in range(2))
    mean = zoo.average(one, others=[two])
    for (_, found), a, b in zip(mean.named_parameters(), one.parameters(), two.parameters()):
        assert torch.allclose(found, (a + b) / 2, rtol=1e-6, atol=1e-7)


def test_it_works_on_the_meta_device_and_follows_the_seed():
    with torch.device("meta"):
        models = [transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **HEADS)) for _ in range(2)]
    sparse = zoo.mix(models)
    assert all(p.is_meta for p in sparse.parameters())
    seed = language("llama")
    first, second = (torch.manual_seed(3) and zoo.mix([seed, seed]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


def test_it_trains_under_checkpointing_in_bfloat16_and_keeps_mode_and_frozen_weights():
    seed = language("llama").bfloat16().train()
    seed.model.layers[0].mlp.requires_grad_(False)
    sparse = zoo.mix([seed, branch(seed)], losses={"switch": 0.01})
    assert sparse.training
    assert not sparse.model.layers[0].mlp.experts.down_proj.requires_grad
    sparse.gradient_checkpointing_enable()
    ids = torch.randint(3, 64, (2, 5))
    copy.deepcopy(sparse)(input_ids=ids, labels=ids).loss.backward()
    with zoo.moe.record(sparse) as step:
        loss = sparse(input_ids=ids, labels=ids).loss
    (loss + sum(step.losses().values())).backward()
    assert sparse.model.layers[1].mlp.experts.down_proj.grad.abs().sum() > 0
    assert sparse.model.layers[0].mlp.router.weight.grad.dtype == torch.bfloat16


def test_what_is_no_copy_is_refused_by_name(tmp_path):
    llama = language("llama")
    for other, message in [
        (language("qwen3"), "model 1 is no copy of model 0: Qwen3ForCausalLM, expected LlamaForCausalLM"),
        (language("llama", num_attention_heads=2), "head_dim=16, expected 8"),
        (language("llama", rms_norm_eps=1e-3), "rms_norm_eps=0.001, expected 1e-06"),
        (language("llama", vocab_size=65), "vocab_size=65, expected 64"),
    ]:
        for combine in (zoo.mix, zoo.average):
            with pytest.raises(ValueError, match=message):
                combine([llama, other])
    with pytest.raises(ValueError, match="num_heads=4, expected 3"):
        zoo.mix([vit(), vit(num_heads=4)])
    resized = language("llama")
    resized.model.layers[1].mlp.up_proj = nn.Linear(32, 40, bias=False)
    with pytest.raises(ValueError, match=r"up_proj.weight \(40, 32\), expected \(48, 32\) \(1 tensors differ\)"):
        zoo.mix([llama, resized])
    for i, word in enumerate(("cat", "dog")):
        llama.save_pretrained(tmp_path / str(i))
        words = {"model": {"vocab": {"a": 0, word: 1}}, "added_tokens": []}
        (tmp_path / str(i) / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(ValueError, match="another vocabulary; 'cat' is missing, expected 1"):
        zoo.mix([tmp_path / "0", tmp_path / "1"])


def test_numbers_that_do_not_fit_are_refused():
    seed = vit()
    with pytest.raises(ValueError, match="mix: expected at least 2 models, got 1"):
        zoo.mix(seed)
    with pytest.raises(ValueError, match="mix: 3 weights for 2 models"):
        zoo.mix([seed, seed], weights=[1, 1, 1])
    for weights in ([0, 0], [1, -1], [1, math.nan]):
        with pytest.raises(ValueError, match="average: weights must be at least 0"):
            zoo.average([seed, seed], weights=weights)
    with pytest.raises(ValueError, match="k must be between 1 and num_experts=2, got 3"):
        zoo.mix([seed, seed], k=3)


def test_the_mean_of_equal_tensors_is_exactly_them():
    value = torch.randn(50)
    mean = averaging.RunningMean({"w": value.clone()}, 1 / 3)
    for _ in range(2):
        mean.add({"w": value}, 1 / 3)
    assert torch.equal(mean.target["w"], value)


def test_what_is_no_model_is_refused_by_its_type():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="average: expected models, folders or hub ids, got a OrderedDict"):
        zoo.average([model, model.state_dict()])


@pytest.mark.parametrize(("made", "said"), [(zoo.quantise, "quantised"), (lambda m: zoo.offload(m, 2), "offloaded")])
def test_experts_without_a_mean_are_refused(made, said):
    model = made(zoo.create_model("language/mixtral_tiny"))
    with pytest.raises(ValueError, match=rf"average: model 0 has {said} experts \(model\.layers\.0\.mlp\.experts\)"):
        zoo.average([model, model])
