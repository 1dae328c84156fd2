"""Language families of transformers beyond those with a table of their own: read, trained and written as it does."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_families import SPECIAL, experts_classes, tiny_model
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import zoo
from zoo.models.language import MODELS, configuration
from zoo.moe import IsolatedMoE, LatentExperts, MoE
from zoo.pretrained import causal, image_text, sparse_blocks
from zoo.pretrained.context import decoder_of
from zoo.pretrained.language import FAMILIES
from zoo.pretrained.sparse_rows import BLOCKS

EVERY = {
    family: (family, module, experts)
    for family, module, experts in experts_classes()
    if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and family not in FAMILIES
}
TINY = sorted(name for name, (family, _) in MODELS.items() if name.endswith("_tiny") and family not in FAMILIES)
UNFIT = ("inkling2", "inkling2_loop", "muse_spark")  # whose experts are none of our kernels'
# transformers, reading a checkpoint, overwrites one of these.
OVERWRITTEN = {"zaya": "balancing_biases"}


def error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return ((ours - expected).norm() / expected.norm()).item()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: t for path in folder.glob("*.safetensors") for key, t in load_file(path).items()}


def enlarge(model: torch.nn.Module) -> torch.nn.Module:
    """Weights so large that every expert counts, and biases of both signs."""
    for _, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.3) if p.dim() > 1 else p.data.add_(0.1 * torch.randn_like(p))
    for name, buffer in model.named_buffers():
        if "bias" in name:
            buffer.normal_(std=0.3)
        if "tid2eid" in name:
            buffer.copy_(torch.rand(buffer.shape[0], 4).topk(buffer.shape[1]).indices)
    return model.eval()


@pytest.mark.parametrize("family", EVERY)
def test_every_family_gives_transformers_logits_and_is_written_as_it_was(family, tmp_path):
    torch.manual_seed(0)
    expected = enlarge(tiny_model(*EVERY[family]))
    tokens = torch.randint(0, 64, (2, 9))
    expected.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        logits = expected(tokens, use_cache=False).logits
        ours = zoo.from_pretrained(tmp_path / "a")
        assert type(ours) is type(expected)
        assert not ours.training
        if family not in OVERWRITTEN:
            assert error(ours(tokens, use_cache=False).logits, logits) < 1e-5
        # The experts matter to what was compared.
        for name, p in expected.named_parameters():
            if "experts." in name and "shared" not in name:
                p.zero_()
        assert error(expected(tokens, use_cache=False).logits, logits) > 1e-3
    sparse = any(isinstance(module, MoE) for module in ours.modules())
    config = decoder_of(ours).config
    assert sparse == (config.model_type in BLOCKS)
    assert sparse or family in UNFIT or config._experts_implementation == "zoo"
    zoo.save_pretrained(ours, tmp_path / "b")
    before, after = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        if not key.endswith(OVERWRITTEN.get(family, " ")):
            assert torch.equal(tensor, after[key]), key


# Parts of vision-language models, and a language model that transformers counts among those.
INSIDE = (
    "aria",
    "deepseek_ocr2",
    "ernie4_5_vl_moe",
    "glm4v_moe",
    "glm5_next",
    "hy_v4_vl",
    "minimax_m3_vl",
    "mistral4",
    "mistral_large4",
    "qwen3_vl_moe",
    "unlimited_ocr",
)
OTHERS = {family: (family, module, experts) for family, module, experts in experts_classes() if family in INSIDE}


@pytest.mark.parametrize("family", OTHERS)
def test_language_models_inside_others_give_transformers_outputs_on_our_layers(family):
    torch.manual_seed(0)
    theirs = enlarge(tiny_model(*OTHERS[family]))
    ours, tokens = image_text.put_layers(copy.deepcopy(theirs)), torch.randint(0, 64, (2, 9))
    assert any(isinstance(module, (MoE, IsolatedMoE)) for module in ours.modules())
    with torch.no_grad():
        found, expected = (model(tokens, use_cache=False)[0] for model in (ours, theirs))
    assert error(found, expected) < 1e-5


@pytest.mark.parametrize("bias", [False, True])
def test_experts_of_latent_tokens_are_those_of_transformers(bias, tmp_path):
    """Nemotron 3 Super: LatentMoE."""
    torch.manual_seed(0)
    sizes = {"moe_latent_size": 48, "mlp_bias": bias, "vocab_size": 64}
    theirs = enlarge(causal.class_of("nemotron_h")._from_config(configuration("nemotron_h_tiny", **sizes)))
    theirs.save_pretrained(tmp_path / "a")
    ours, tokens = zoo.from_pretrained(tmp_path / "a"), torch.randint(0, 64, (2, 9))
    experts = [module for module in ours.modules() if isinstance(module, LatentExperts)]
    assert [module.latent_dim for module in experts] == [48, 48]
    assert error(ours(tokens).logits, theirs(tokens).logits) < 1e-5
    zoo.save_pretrained(ours, tmp_path / "b")
    before, after = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    parts = zoo.from_pretrained(tmp_path / "a", offload=4)  # our own reader, tensor by tensor
    assert error(parts(tokens).logits, theirs(tokens).logits) < 1e-5


BEYOND = {
    "laguna": {"moe_router_logit_softcapping": 5.0},
    "cohere2_moe": {"num_shared_experts": 1},
}


@pytest.mark.parametrize("family", BEYOND)
def test_what_is_beyond_a_row_keeps_transformers_gates(family, monkeypatch):
    monkeypatch.setitem(SPECIAL, family, {**SPECIAL.get(family, {}), **BEYOND[family]})
    torch.manual_seed(0)
    theirs = enlarge(tiny_model(*EVERY[family]))
    ours, tokens = image_text.put_layers(copy.deepcopy(theirs)), torch.randint(0, 64, (2, 9))
    assert not any(isinstance(module, MoE) for module in ours.modules())
    with torch.no_grad():
        assert error(ours(tokens, use_cache=False).logits, theirs(tokens, use_cache=False).logits) < 1e-5
    with pytest.raises(ValueError, match=f"{family}: router, losses and capacity are for sparse blocks of ours"):
        image_text.put_layers(theirs, losses={"switch": 0.1})


@pytest.fixture(params=TINY)
def pair(request):
    """transformers' model of a family and ours of the same weights."""
    name = request.param
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 4 if "next" in name else 2, "vocab_size": 256, "hidden_size": 64}
    if name == "nemotron_h_tiny":
        del sizes["num_hidden_layers"]  # it has a list of them
    if name == "phimoe_tiny":
        sizes["router_jitter_noise"] = 0.5  # with the published 0.01 nearly every weight is one
    theirs = causal.class_of(MODELS[name][0])._from_config(configuration(name, **sizes))
    enlarge(theirs)
    ours = image_text.put_layers(copy.deepcopy(theirs))
    return theirs, ours


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and a mask with padding on the left, as a tokenizer makes it for generation."""
    mask = torch.ones(3, 17, dtype=torch.long)
    mask[0, :6] = mask[1, :1] = 0
    return torch.randint(0, 256, (3, 17)), mask


def test_generation_is_that_of_transformers(pair):
    theirs, ours = pair
    tokens, mask = padded()
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = theirs.generate(tokens, **options)
    assert torch.equal(ours.generate(tokens, **options), expected)
    assert torch.equal(
        ours.generate(tokens, use_cache=False, **options), theirs.generate(tokens, use_cache=False, **options)
    )


def test_gradients_are_those_of_transformers(pair):
    theirs, ours = pair
    tokens = torch.randint(0, 256, (3, 17))
    for model in pair:
        # Phi's gate draws its experts in training.
        model.train(model.config.model_type != "phimoe")(tokens, labels=tokens).loss.backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, grad in sparse_blocks.tensors_of_transformers(
        ours, {name: p.grad for name, p in ours.named_parameters()}
    ):
        expected = grads.pop(name)
        if grad is None:  # DeepSeek-V4 compresses what is longer than these texts
            assert expected is None, name
            continue
        assert error(grad, expected) < 1e-4 or grad.abs().max() < 1e-6, name
    # ERNIE's bias of the choice is a parameter there, without a gradient.
    assert all(grad is None for grad in grads.values())


def test_losses_capacity_and_other_gates_train(tmp_path):
    model = zoo.create_model(
        "language/gpt_oss_tiny", losses={"switch": 0.01}, capacity=1.5, num_hidden_layers=2, vocab_size=64
    )
    tokens = torch.randint(0, 64, (2, 16))
    with zoo.moe.record(model) as step:
        loss = model(tokens, labels=tokens).loss
    assert step.losses()
    (loss + sum(step.losses().values())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.save_pretrained(tmp_path / "a")  # transformers' method, our layout
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert error(again(tokens).logits, zoo.from_pretrained(tmp_path / "a")(tokens).logits) < 1e-5
    other = zoo.from_pretrained(tmp_path / "a", router={"name": "ExpertChoiceRouter"})
    assert torch.equal(other.model.layers[0].mlp.router.weight, again.model.layers[0].mlp.router.weight)
    with pytest.raises(ValueError, match="ExpertChoiceRouter cannot be expressed in the GptOss layout"):
        zoo.save_pretrained(other, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_another_limit_of_gpt_oss_is_that_of_transformers():
    if "swiglu_limit" not in GptOssConfig().to_dict():
        pytest.skip("this version of transformers knows one limit alone")
    sizes = {"num_hidden_layers": 2, "vocab_size": 64}
    theirs = {
        limit: causal.class_of("gpt_oss")._from_config(configuration("gpt_oss_tiny", swiglu_limit=limit, **sizes))
        for limit in (0.5, 7.0)
    }
    theirs[7.0].load_state_dict(enlarge(theirs[0.5]).state_dict())
    tokens = torch.randint(0, 64, (2, 9))
    ours = image_text.put_layers(copy.deepcopy(theirs[0.5]))(tokens).logits
    assert error(ours, theirs[0.5](tokens).logits) < 1e-5
    assert error(ours, theirs[7.0].eval()(tokens).logits) > 1e-3


def test_a_dense_model_is_read_as_it_is_and_can_be_upcycled(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    dense = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes)).eval()
    dense.save_pretrained(tmp_path / "a")
    ours, tokens = zoo.from_pretrained(tmp_path / "a"), torch.randint(0, 64, (2, 9))
    torch.testing.assert_close(ours(tokens).logits, dense(tokens).logits)
    zoo.save_pretrained(ours, tmp_path / "b")
    assert all(torch.equal(t, tensors(tmp_path / "b")[key]) for key, t in tensors(tmp_path / "a").items())
    sparse = zoo.upcycle(ours, layers="all", num_experts=4)
    torch.testing.assert_close(sparse(tokens).logits, dense(tokens).logits)
    zoo.save_pretrained(sparse, tmp_path / "c")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "c").config.model_type == "mixtral"
    with pytest.raises(ValueError, match="llama: router, losses and capacity are for sparse blocks"):
        zoo.from_pretrained(tmp_path / "a", losses={"switch": 0.01})


def test_an_unknown_family_names_the_nearest(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gptoss"}')
    with pytest.raises(ValueError, match=r"unknown language family in .*config.json 'gptoss'; did you mean gpt_oss"):
        zoo.from_pretrained(tmp_path)
