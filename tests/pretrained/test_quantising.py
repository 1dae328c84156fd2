"""Models with experts in numbers of few bits: made of others, and read so from folders."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import theirs
from quantiser import quantise_fp8, quantise_mxfp4, tensors
from safetensors.torch import load_file, save_file
from seen import batch
from test_image_text import family as kind_of
from test_image_text import theirs as seeing
from test_peak_memory import PROGRAM
from transformers import GptOssConfig, GptOssForCausalLM

import zoo
from zoo.models import count_parameters
from zoo.moe import Experts, MoE, QuantisedExperts
from zoo.moe.kernels.codes import FORMATS
from zoo.moe.routers import MEORouter, SMEARRouter, TopKRouter

TOKENS = (2, 11)


def error(ours, expected):
    return ((ours - expected).abs().max() / expected.abs().max()).item()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[key]) and t.dtype == b[key].dtype for key, t in a.items())


def with_decoded_weights(model, few):
    """The logits of a model whose experts are given the numbers that the quantised ones hold."""
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            held = few.get_submodule(name).experts.held
            with torch.no_grad():
                for parameter, value in zip((module.experts._in, "down_proj"), held):
                    getattr(module.experts, parameter).copy_(value)
    return model


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_folder_read_into_few_bits_is_the_model_quantised(family, format, tmp_path):
    theirs(family).save_pretrained(tmp_path / "whole", max_shard_size="200KB")
    whole = zoo.from_pretrained(tmp_path / "whole")
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    few = zoo.from_pretrained(tmp_path / "whole", quantise=format)
    made = zoo.quantise(whole, format)
    assert same(few.state_dict(), made.state_dict())
    assert same(whole.state_dict(), before)
    assert any(isinstance(m, QuantisedExperts) for m in few.modules())
    assert count_parameters(few) == count_parameters(whole)
    tokens = torch.randint(0, 256, TOKENS)
    expected = with_decoded_weights(whole, few)(tokens).logits
    assert error(few(tokens).logits, expected) < 1e-5
    generated = few.generate(tokens, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, whole.generate(tokens, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("scales", [torch.float32, torch.float8_e8m0fnu, torch.bfloat16])
def test_published_fp8_is_kept_as_it_is(scales, tmp_path):
    theirs("deepseek_v3", hidden_size=160, moe_intermediate_size=136).save_pretrained(tmp_path / "plain")
    quantise_fp8(tmp_path / "plain", tmp_path / "fp8", scales=scales)
    whole = zoo.from_pretrained(tmp_path / "fp8", dtype=torch.float32)
    few = zoo.from_pretrained(tmp_path / "fp8", dtype=torch.float32, quantise="float8")
    stored = tensors(tmp_path / "fp8")
    checked = 0
    for name, module in few.named_modules():
        if isinstance(module, QuantisedExperts):
            experts = whole.get_submodule(name)
            assert torch.equal(module.w_in, experts.w_in)
            assert torch.equal(module.w_out, experts.w_out)
            for e in range(module.num_experts):
                for own, sides in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
                    keys = [f"{name}.{e}.{side}.weight" for side in sides]
                    codes = torch.cat([stored[key].view(torch.uint8) for key in keys])
                    assert torch.equal(getattr(module, f"{own}_codes")[e], codes)
                    factors = torch.cat([stored[f"{key}_scale_inv"].float() for key in keys])
                    assert torch.equal(getattr(module, f"{own}_scales")[e], factors)
                    checked += 1
    assert checked
    tokens = torch.randint(0, 256, TOKENS)
    assert error(few(tokens).logits, whole(tokens).logits) < 1e-4


def test_published_fp8_in_other_blocks_is_rounded_again(tmp_path):
    theirs("deepseek_v3").save_pretrained(tmp_path / "plain")
    quantise_fp8(tmp_path / "plain", tmp_path / "fp8", (64, 32))
    few = zoo.from_pretrained(tmp_path / "fp8", dtype=torch.float32, quantise="float8")
    made = zoo.quantise(zoo.from_pretrained(tmp_path / "fp8", dtype=torch.float32), "float8")
    assert same(few.state_dict(), made.state_dict())


def test_published_codes_that_are_no_numbers_are_named(tmp_path):
    theirs("deepseek_v3").save_pretrained(tmp_path / "plain")
    quantise_fp8(tmp_path / "plain", tmp_path / "fp8")
    (path,) = [p for p in (tmp_path / "fp8").glob("*.safetensors") if "00001" in p.name]
    stored = load_file(path)
    key = next(key for key in stored if key.endswith("experts.1.up_proj.weight"))
    stored[key].view(torch.uint8)[2, 3] = 0x7F
    save_file(stored, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"mlp.experts.gate_up_proj, expert 1: numbers that are not finite"):
        zoo.from_pretrained(tmp_path / "fp8", quantise="float8")


def test_published_mxfp4_is_kept_as_it_is(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = GptOssForCausalLM(GptOssConfig(**sizes, **heads, initializer_range=0.2))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.gate_up_proj_bias.normal_()
            layer.mlp.experts.down_proj_bias.normal_()
    model.save_pretrained(tmp_path / "plain")
    quantise_mxfp4(tmp_path / "plain", tmp_path / "mxfp4")
    whole = zoo.from_pretrained(tmp_path / "mxfp4", dtype=torch.float32)
    few = zoo.from_pretrained(tmp_path / "mxfp4", dtype=torch.float32, quantise="mxfp4")
    checked = 0
    for name, module in few.named_modules():
        if isinstance(module, QuantisedExperts):
            for ours, theirs_ in zip(module.held, whole.get_submodule(name).held):
                assert torch.equal(ours, theirs_)
            checked += 1
    assert checked == 2
    tokens = torch.randint(0, 128, TOKENS)
    assert error(few(tokens).logits, whole(tokens).logits) < 1e-5
    expected = GptOssForCausalLM.from_pretrained(tmp_path / "mxfp4-plain", dtype=torch.float32)
    assert error(few(tokens).logits, expected(tokens).logits) < 1e-5


def test_a_vision_language_model_is_read_into_few_bits(tmp_path):
    seeing("qwen3_vl_moe_tiny").save_pretrained(tmp_path / "whole")
    whole = zoo.from_pretrained(tmp_path / "whole")
    few = zoo.from_pretrained(tmp_path / "whole", quantise="int8")
    assert same(few.state_dict(), zoo.quantise(whole, "int8").state_dict())
    inputs = batch(kind_of("qwen3_vl_moe_tiny"))
    assert error(few(**inputs).logits, with_decoded_weights(whole, few)(**inputs).logits) < 1e-5


def test_a_vision_model_is_quantised():
    import timm

    model = timm.create_model("vmoe_small_patch32_224", num_classes=10, img_size=64, depth=4, embed_dim=64, num_heads=2)
    torch.nn.init.normal_(model.head.weight)
    few = zoo.quantise(model.eval(), "float8")
    images = torch.randn(2, 3, 64, 64)
    found, expected = few(images), model(images)
    assert torch.isfinite(found).all()
    assert 0 < error(found, expected) < 0.3
    with_decoded_weights(model, few)
    assert error(found, model(images)) < 1e-5


def test_the_model_is_never_whole_in_memory(tmp_path):
    theirs("mixtral").save_pretrained(tmp_path / "warm")
    model = theirs("mixtral", hidden_size=512, intermediate_size=1024).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "big")
    size = (tmp_path / "big" / "model.safetensors").stat().st_size
    assert size > 50e6
    program = PROGRAM.replace("dtype=dtype)", 'dtype=dtype, quantise="float8")').replace(
        "from_pretrained(warm)", 'from_pretrained(warm, quantise="float8")'
    )
    command = [sys.executable, "-c", program, str(tmp_path / "warm"), str(tmp_path / "big"), "bfloat16"]
    took = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    assert took < 0.9 * size


def test_layers_that_share_weights_share_codes():
    model = zoo.create_model("vision/vmoe_tiny_test", depth=4, moe_layers="all", share_depth=True, num_classes=10)
    few = zoo.quantise(model, "int8")
    assert count_parameters(few) == count_parameters(model)
    kinds = [module for module in few.modules() if isinstance(module, QuantisedExperts)]
    assert len(kinds) == 1
    images = torch.randn(2, 3, *model.pretrained_cfg["input_size"][1:])
    found = few.eval()(images)
    assert error(found, with_decoded_weights(model.eval(), few)(images)) < 1e-5


def test_there_is_no_mean_of_codes():
    models = [zoo.quantise(torch.nn.Sequential(MoE(TopKRouter(64, 4), Experts(4, 64, 32))), "int8") for _ in range(2)]
    for call in (zoo.average, zoo.mix):
        with pytest.raises(ValueError, match=r"model 0 has quantised experts \(0.experts\), of which there is no mean"):
            call(models)


@pytest.mark.parametrize("gate", [SMEARRouter, MEORouter])
def test_experts_that_a_gate_merges_are_not_quantised(gate):
    with pytest.raises(ValueError, match=f"quantise: 0: {gate.__name__} merges experts, which it needs whole"):
        zoo.quantise(torch.nn.Sequential(MoE(gate(64, 4), Experts(4, 64, 32))))


def test_what_cannot_be_quantised_is_named(tmp_path):
    theirs("mixtral").save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="unknown format 'int4'; known: float8, mxfp4, int8"):
        zoo.from_pretrained(tmp_path / "whole", quantise="int4")
    with pytest.raises(ValueError, match="with quantise the gates are the checkpoint's own"):
        zoo.from_pretrained(tmp_path / "whole", quantise="int8", router="TopKRouter")
    model = zoo.from_pretrained(tmp_path / "whole")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 3, 4] = torch.inf
    with pytest.raises(ValueError, match=r"quantise: model.layers.1.mlp.experts: numbers that are not finite"):
        zoo.quantise(model, "int8")
    zoo.save_pretrained(model, tmp_path / "broken")
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.down_proj, expert 2: numbers that are not finite"):
        zoo.from_pretrained(tmp_path / "broken", quantise="int8")
    with pytest.raises(ValueError, match="Linear has no experts of ours"):
        zoo.quantise(torch.nn.Linear(2, 2))
