"""Models with quantised experts in the layouts in which such are published."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import theirs
from quantiser import E4M3, grid, tensors
from test_image_text import theirs as seeing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import zoo
from zoo.models import count_parameters
from zoo.moe import QuantisedExperts
from zoo.pretrained.causal import check_published

TOKENS = (2, 11)
SIZES = {"hidden_size": 160, "intermediate_size": 200}  # blocks are cut
FAMILIES = {"mixtral": SIZES, "deepseek_v3": {}, "qwen2_moe": {}}
NAMES = {"mixtral": ("block_sparse_moe", "w1", "w3", "w2")}


def meant(stored, key):
    """The numbers of FP8 codes by the format's definition."""
    codes, scale = stored[key], stored[f"{key}_scale_inv"]
    assert codes.dtype == torch.float8_e4m3fn
    assert scale.dtype == torch.float32
    assert scale.shape == tuple(-(-size // 128) for size in codes.shape)
    numbers = E4M3[codes.view(torch.uint8).numpy()] * grid(scale.double().numpy(), codes.shape, (128, 128))
    return torch.from_numpy(numbers)


def few_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantisedExperts)}


def oss(folder, **options):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = GptOssForCausalLM(GptOssConfig(**sizes, **heads, initializer_range=0.2, **options))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.gate_up_proj_bias.normal_()
            layer.mlp.experts.down_proj_bias.normal_()
    model.save_pretrained(folder)
    return zoo.from_pretrained(folder, quantise="mxfp4")


@pytest.mark.parametrize("family", FAMILIES)
def test_float8_is_written_as_deepseek_publishes_it(family, tmp_path):
    theirs(family, **FAMILIES[family]).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    few = zoo.from_pretrained(tmp_path / "plain", quantise="float8")
    zoo.save_pretrained(few, tmp_path / "fp8", max_shard_size="300KB")
    stored = tensors(tmp_path / "fp8")
    block, gate, up, down = NAMES.get(family, ("mlp", "gate_proj", "up_proj", "down_proj"))
    for name, experts in few_of(few).items():
        stem = name.removesuffix("mlp.experts") + f"{block}.experts"
        for e in range(experts.num_experts):
            w_in = torch.cat([meant(stored, f"{stem}.{e}.{side}.weight") for side in (gate, up)])
            torch.testing.assert_close(experts.w_in[e].double(), w_in, rtol=1e-6, atol=0)
            w_out = meant(stored, f"{stem}.{e}.{down}.weight")
            torch.testing.assert_close(experts.w_out[e].double(), w_out, rtol=1e-6, atol=0)
    settings = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "fp8"
    assert settings["weight_block_size"] == [128, 128]
    plain = {key for key, tensor in stored.items() if tensor.dim() > 1 and tensor.dtype == torch.bfloat16}
    assert {f"{name}.weight" for name in settings["modules_to_not_convert"]} == plain
    index = json.loads((tmp_path / "fp8" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == count_parameters(few)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_float8_is_read_again(family, tmp_path):
    theirs(family, **FAMILIES[family]).save_pretrained(tmp_path / "plain")
    few = zoo.from_pretrained(tmp_path / "plain", quantise="float8")
    zoo.save_pretrained(few, tmp_path / "fp8")
    again, state = zoo.from_pretrained(tmp_path / "fp8", quantise="float8").state_dict(), few.state_dict()
    assert again.keys() == state.keys()
    for name, tensor in state.items():
        if name.endswith("_scales"):
            torch.testing.assert_close(again[name], tensor, rtol=2.0**-23, atol=0)
        else:
            assert torch.equal(again[name], tensor)
            assert again[name].dtype == tensor.dtype
    whole = zoo.from_pretrained(tmp_path / "fp8")
    for name, experts in few_of(few).items():
        assert all(torch.equal(a, b) for a, b in zip(experts.held[:2], whole.get_submodule(name).held[:2]))
    tokens = torch.randint(0, 256, TOKENS)
    torch.testing.assert_close(few(tokens).logits, whole(tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_makes_room_for_the_codes_of_experts_alone(family, tmp_path):
    theirs(family).save_pretrained(tmp_path / "plain")
    zoo.save_pretrained(zoo.from_pretrained(tmp_path / "plain", quantise="float8"), tmp_path / "fp8")
    config = AutoConfig.from_pretrained(tmp_path / "fp8")
    settings = FineGrainedFP8Config.from_dict(dict(config.quantization_config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    kept = settings.modules_to_not_convert
    replace_with_fp8_linear(model, modules_to_not_convert=kept, quantization_config=settings, pre_quantized=True)
    names = [name for name, module in model.named_modules() if type(module).__name__.startswith("FP8")]
    assert names
    assert all(name.endswith("mlp.experts") for name in names)


@pytest.mark.parametrize("tied", [False, True])
def test_gpt_oss_is_written_in_mxfp4(tied, tmp_path):
    few = oss(tmp_path / "plain", tie_word_embeddings=tied)
    zoo.save_pretrained(few, tmp_path / "mxfp4")
    stored = tensors(tmp_path / "mxfp4")
    assert ("lm_head.weight" in stored) is not tied
    for name, experts in few_of(few).items():
        # transformers holds [E, D, 2F], gates and ups in turn, and [E, F, D].
        w_in, w_out = (
            convert_moe_packed_tensors(
                stored[f"{name}.{own}_blocks"], stored[f"{name}.{own}_scales"], dtype=torch.float32
            )
            for own in ("gate_up_proj", "down_proj")
        )
        assert torch.equal(torch.cat([w_in[..., 0::2], w_in[..., 1::2]], -1).mT, experts.w_in)
        assert torch.equal(w_out.mT, experts.w_out)
    again, state = zoo.from_pretrained(tmp_path / "mxfp4", quantise="mxfp4").state_dict(), few.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    whole = zoo.from_pretrained(tmp_path / "mxfp4")
    tokens = torch.randint(0, 128, TOKENS)
    torch.testing.assert_close(few(tokens).logits, whole(tokens).logits, rtol=1e-4, atol=1e-5)


def test_a_sparse_relative_is_written_in_float8(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 256}
    dense = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    few = zoo.quantise(zoo.upcycle(dense, num_experts=4, k=2, layers="all"), "float8").eval()
    zoo.save_pretrained(few, tmp_path / "fp8")
    tokens = torch.randint(0, 256, TOKENS)
    again = zoo.from_pretrained(tmp_path / "fp8", quantise="float8")
    assert again.config.model_type == "mixtral"
    torch.testing.assert_close(again(tokens).logits, few(tokens).logits, rtol=1e-4, atol=1e-5)


def test_what_has_no_layout_is_refused_before_anything_is_written(tmp_path):
    theirs("mixtral").save_pretrained(tmp_path / "mixtral")
    seeing("qwen3_vl_moe_tiny").save_pretrained(tmp_path / "seeing")
    oss(tmp_path / "oss")
    for name, format in (("mixtral", "int8"), ("mixtral", "mxfp4"), ("seeing", "float8"), ("oss", "float8")):
        few = zoo.from_pretrained(tmp_path / name, quantise=format)
        with pytest.raises(TypeError, match=rf"no published layout has a place for .*QuantisedExperts in {format}"):
            zoo.save_pretrained(few, tmp_path / "out")
        with pytest.raises(TypeError, match="QuantisedExperts"):
            check_published(few)
    assert not (tmp_path / "out").exists()


def test_published_tensors_are_loaded_where_they_are_codes_and_refused_where_they_are_numbers(tmp_path):
    theirs("olmoe").save_pretrained(tmp_path / "plain")
    few = zoo.from_pretrained(tmp_path / "plain", quantise="float8")
    zoo.save_pretrained(few, tmp_path / "fp8")
    other = zoo.from_pretrained(tmp_path / "plain", quantise="float8")
    for experts in few_of(other).values():
        for buffer in experts.buffers():
            buffer.zero_()
    other.load_state_dict(tensors(tmp_path / "fp8"))
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in few.state_dict().items())
    for model in (few, zoo.from_pretrained(tmp_path / "plain", quantise="int8")):
        with pytest.raises(ValueError, match="read the checkpoint with zoo"):
            model.load_state_dict(tensors(tmp_path / "plain"))
