"""Models whose experts stay in files or on the host, against the whole models, and transformers' own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from conftest import theirs
from quantiser import quantise_fp8
from seen import batch
from test_image_text import family as kind_of
from test_image_text import theirs as seeing
from test_peak_memory import PROGRAM
from transformers import GptOssConfig, GptOssForCausalLM

import zoo
from zoo.models import count_parameters
from zoo.moe import MoE, OffloadedExperts
from zoo.moe.routers import SMEARRouter

TOKENS = (2, 11)


def error(ours, expected):
    return ((ours - expected).abs().max() / expected.abs().max()).item()


def offloaded(model):
    return [module for module in model.modules() if isinstance(module, OffloadedExperts)]


@pytest.mark.parametrize("slots", [1, 3, 100])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_experts_in_files_give_transformers_logits(family, slots, tmp_path):
    model = theirs(family)
    model.save_pretrained(tmp_path / "model", max_shard_size="200KB")
    found = zoo.from_pretrained(tmp_path / "model", offload=slots)
    tokens = torch.randint(0, 256, TOKENS)
    with torch.no_grad():
        assert error(found(tokens).logits, model(tokens).logits) < 1e-5
    prompt = torch.randint(0, 256, (1, 5))
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(found.generate(prompt, **given), model.generate(prompt, **given))
    experts = offloaded(found)
    assert experts
    assert all(m.slots == min(slots, m.num_experts) and m.read for m in experts)
    whole = zoo.from_pretrained(tmp_path / "model")
    assert count_parameters(found) == count_parameters(whole)
    assert found.state_dict().keys() == {n for n in whole.state_dict() if ".experts." not in n}


def test_a_stack_in_one_tensor_with_biases_is_read_expert_by_expert(tmp_path):
    config = GptOssConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=24, num_local_experts=5, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=256, initializer_range=0.2,
    )  # fmt: skip
    model = GptOssForCausalLM._from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("_bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "oss")
    found = zoo.from_pretrained(tmp_path / "oss", offload=2)
    tokens = torch.randint(0, 256, TOKENS)
    with torch.no_grad():
        assert error(found(tokens).logits, model(tokens).logits) < 1e-5


@pytest.mark.parametrize("format", ["float8", "int8"])
def test_experts_come_from_fp8_files_as_codes(format, tmp_path):
    theirs("deepseek_v3").save_pretrained(tmp_path / "model")
    quantise_fp8(tmp_path / "model", tmp_path / "fp8")
    found = zoo.from_pretrained(tmp_path / "fp8", offload=2, quantise=format, dtype="float32")
    expected = zoo.from_pretrained(tmp_path / "fp8", quantise=format, dtype="float32")
    tokens = torch.randint(0, 256, TOKENS)
    with torch.no_grad():
        assert error(found(tokens).logits, expected(tokens).logits) < 1e-5
        read_whole = zoo.from_pretrained(tmp_path / "fp8", offload=2, dtype="float32")
        whole = zoo.from_pretrained(tmp_path / "fp8", dtype="float32")
        assert error(read_whole(tokens).logits, whole(tokens).logits) < 1e-5


def test_a_model_of_images_and_text_leaves_its_experts_in_files(tmp_path):
    model = seeing("qwen3_vl_moe_tiny")
    model.save_pretrained(tmp_path / "seen")
    found = zoo.from_pretrained(tmp_path / "seen", offload=2)
    given = batch(kind_of("qwen3_vl_moe_tiny"))
    with torch.no_grad():
        assert error(found(**given).logits, model(**given).logits) < 1e-4
    assert offloaded(found)


def test_memory_is_that_of_the_slots(tmp_path):
    theirs("mixtral").save_pretrained(tmp_path / "warm")
    model = theirs("mixtral", hidden_size=512, intermediate_size=1024, num_local_experts=16)
    model.save_pretrained(tmp_path / "big")
    size = (tmp_path / "big" / "model.safetensors").stat().st_size
    assert size > 200e6
    run = "import torch\ntokens = torch.arange(64)[None]\n"
    program = run + PROGRAM.replace("from_pretrained(warm)", "from_pretrained(warm, offload=2)(tokens)")
    program = program.replace("dtype=dtype)", "offload=2)\nmodel(tokens)")
    command = [sys.executable, "-c", program, str(tmp_path / "warm"), str(tmp_path / "big"), ""]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    took = int(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout.split()[-1])
    assert took < 0.4 * size  # 2 of 16 experts, and all that are met went through them


@pytest.mark.parametrize("format", [None, "int8", "mxfp4"])
def test_experts_on_the_host_are_shared_with_the_model_they_are_from(format):
    model = zoo.create_model("language/mixtral_tiny").eval()
    model = model if format is None else zoo.quantise(model, format)
    found = zoo.offload(model, 3)
    kept = {tensor.data_ptr() for experts in offloaded(found) for tensor in experts.source.tensors.values()}
    own = {t.data_ptr() for m in model.modules() if isinstance(m, MoE) for t in m.experts.state_dict().values()}
    assert kept == own
    assert not {t.data_ptr() for t in found.parameters()} & {t.data_ptr() for t in model.parameters()}
    tokens = torch.randint(0, 256, TOKENS)
    with torch.no_grad():
        assert error(found(tokens).logits, model(tokens).logits) < 1e-4


@pytest.mark.parametrize("format", [None, "float8"])
def test_adapters_beside_and_inside_offloaded_experts_learn(format, tmp_path):
    model = zoo.create_model("language/mixtral_tiny")
    model = model if format is None else zoo.quantise(model, format)
    targets = ["q_proj", "gate", "up", "down"]
    tuned = zoo.adapt(zoo.offload(model, 2), "LoRA", rank=4, targets=targets)
    expected = zoo.adapt(model, "LoRA", rank=4, targets=targets)
    ours, theirs_ = dict(tuned.named_parameters()), dict(expected.named_parameters())
    learning = [name for name, p in ours.items() if p.requires_grad]
    assert learning
    with torch.no_grad():
        for name in learning:
            ours[name].normal_(std=0.1)
            theirs_[name].copy_(ours[name])
    tokens = torch.randint(0, 256, TOKENS)
    for one in (tuned, expected):
        one(tokens).logits.square().mean().backward()
    for name in learning:
        assert error(ours[name].grad, theirs_[name].grad) < 1e-4, name
    zoo.save_pretrained(tuned, tmp_path / "adapters")
    read = zoo.from_pretrained(tmp_path / "adapters", base=model)
    with torch.no_grad():
        assert error(read(tokens).logits, tuned(tokens).logits) < 1e-4
    with pytest.raises(ValueError, match="offloaded experts cannot take adapters in"):
        zoo.merge_adapters(tuned)


def test_it_says_what_it_cannot_do(tmp_path):
    model = zoo.create_model("language/mixtral_tiny")
    with pytest.raises(ValueError, match=r"offload: model\.layers\.0\.mlp\.experts: slots must be at least 1, got 0"):
        zoo.offload(model, 0)
    with pytest.raises(ValueError, match=r"slots must be a whole number, got 2\.5"):
        zoo.offload(model, 2.5)
    with pytest.raises(ValueError, match="offload: Linear has no experts of ours"):
        zoo.offload(torch.nn.Linear(2, 2), 2)
    merging = zoo.create_model("language/mixtral_tiny", router=SMEARRouter)
    with pytest.raises(ValueError, match="SMEARRouter merges experts"):
        zoo.offload(merging, 2)
    with pytest.raises(TypeError, match=r"model\.layers\.0\.mlp\.experts are offloaded experts"):
        zoo.save_pretrained(zoo.offload(model, 2), tmp_path / "no")
    assert not (tmp_path / "no").exists()
    zoo.save_pretrained(model, tmp_path / "model")
    with pytest.raises(ValueError, match="with offload the gates are the checkpoint's own"):
        zoo.from_pretrained(tmp_path / "model", offload=2, router={"name": "TopKRouter", "k": 1})
    with pytest.raises(ValueError, match="slots must be at least 1"):
        zoo.from_pretrained(tmp_path / "model", offload=0)


def test_a_file_that_goes_is_named_when_an_expert_is_read(tmp_path):
    zoo.save_pretrained(zoo.create_model("language/mixtral_tiny"), tmp_path / "model")
    found = zoo.from_pretrained(tmp_path / "model", offload=2)
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        found(torch.randint(0, 256, TOKENS))


def test_the_working_directory_may_change(tmp_path, monkeypatch):
    model = theirs("mixtral")
    model.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    found = zoo.from_pretrained("model", offload=2)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    tokens = torch.randint(0, 256, TOKENS)
    with torch.no_grad():
        assert error(found(tokens).logits, model(tokens).logits) < 1e-5


@pytest.mark.parametrize("scales", [False, True])
def test_a_file_that_is_written_to_is_named_when_an_expert_is_read(scales, tmp_path):
    """Another model's experts of the same shapes would be computed with."""
    theirs("deepseek_v3").save_pretrained(tmp_path / "model", **({} if scales else {"max_shard_size": "200KB"}))
    folder = tmp_path / "model"
    if scales:
        quantise_fp8(folder, tmp_path / "fp8")
        folder = tmp_path / "fp8"
    found = zoo.from_pretrained(folder, offload=2)
    for path in folder.glob("*.safetensors"):
        path.write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"safetensors has changed since model\.layers\.\d\.mlp\.experts was found"):
        found(torch.randint(0, 256, TOKENS))


@pytest.mark.parametrize("format", ["int8", "mxfp4"])
def test_adapters_remember_the_format_of_offloaded_experts(format, tmp_path):
    zoo.save_pretrained(zoo.create_model("language/mixtral_tiny"), tmp_path / "model")
    base = zoo.from_pretrained(tmp_path / "model", offload=3, quantise=format)
    tuned = zoo.adapt(base, "LoRA", rank=2, targets=["gate", "down"]).eval()
    zoo.save_pretrained(tuned, tmp_path / "adapters")
    tokens = torch.randint(0, 256, TOKENS)
    for options in ({}, {"offload": 2}):
        read = zoo.from_pretrained(tmp_path / "adapters", **options)
        with torch.no_grad():
            assert error(read(tokens).logits, tuned(tokens).logits) < 1e-4


def test_experts_that_are_offloaded_already_are_named():
    model = zoo.create_model("language/mixtral_tiny")
    with pytest.raises(ValueError, match="slots must be a whole number, got True"):
        zoo.offload(model, True)
    away, few = zoo.offload(model, 2), zoo.quantise(model)
    for change in (zoo.quantise, lambda m: zoo.offload(m, 2)):
        with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts are offloaded already"):
            change(away)
    with pytest.raises(ValueError, match=r"quantise: model\.layers\.0\.mlp\.experts are in few bits already"):
        zoo.quantise(few)


@pytest.mark.parametrize("option", [{"offload": 2}, {"quantise": "int8"}])
@pytest.mark.parametrize("name", ["vision/vmoe_tiny_test", "vision_language/limoe_tiny", "recommendation/mmoe"])
def test_folders_that_are_read_whole_say_what_to_do(name, option, tmp_path):
    zoo.save_pretrained(zoo.create_model(name), tmp_path / "model")
    (key,) = option
    with pytest.raises(
        ValueError, match=rf"from_pretrained: {key} is for transformers' layout; .* zoo\.{key}\(model\)"
    ):
        zoo.from_pretrained(tmp_path / "model", **option)


def test_a_state_with_experts_is_not_loaded_beside_offloaded_ones():
    model = zoo.create_model("language/mixtral_tiny")
    found = zoo.offload(model, 2)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.gate_up_proj is experts'; those .* are offloaded"):
        found.load_state_dict(model.state_dict())
    assert not found.load_state_dict(found.state_dict()).missing_keys
