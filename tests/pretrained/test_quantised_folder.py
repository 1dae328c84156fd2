"""Quantised checkpoints as models: they are what plain transformers makes of the dequantised weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import theirs
from quantiser import quantise, quantise_fp8, quantise_mxfp4, tensors
from safetensors.torch import load_file, save_file
from seen import batch
from test_image_text import family as kind_of
from test_image_text import theirs as seeing
from test_moe_llava import published
from test_peak_memory import peak
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GptOssConfig, GptOssForCausalLM, Mxfp4Config

import zoo
from zoo.moe import MoE
from zoo.parallel import Mesh, Sizes
from zoo.parallel.parts import whole_state
from zoo.pretrained import folder as files
from zoo.pretrained import image_text

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3")
FORMS = {
    "published": ((128, 128), torch.float32),
    "cut": ((48, 40), torch.bfloat16),
    "powers": ((16, 32), torch.float8_e8m0fnu),
}
SEEING = ("qwen3_vl_moe_tiny", "glm4v_moe_tiny", "llava_mixtral_tiny")
MESH = Sizes(expert=2)


def error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return ((ours - expected).abs().max() / expected.abs().max()).item()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[key]) and t.dtype == b[key].dtype for key, t in a.items())


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("quantised")
    for family in FAMILIES:
        theirs(family).save_pretrained(root / family)
        for form, options in FORMS.items():
            quantise_fp8(root / family, root / f"{family}-{form}", *options)
    for name in SEEING:
        seeing(name).save_pretrained(root / name)
        quantise_fp8(root / name, root / f"{name}-fp8", (48, 40))
    return root


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_fp8_is_the_dequantised_one(family, form, folders, tmp_path):
    source, dense = folders / f"{family}-{form}", folders / f"{family}-{form}-plain"
    ours = zoo.from_pretrained(source)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert not hasattr(ours.config, "quantization_config")
    assert same(ours.state_dict(), zoo.from_pretrained(dense).state_dict())
    zoo.save_pretrained(ours, tmp_path / "saved")
    assert same(tensors(tmp_path / "saved"), tensors(dense))
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    tokens = torch.randint(0, 256, (2, 11))
    exact = ours.float()
    for other in (dense, tmp_path / "saved"):
        expected = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
        assert error(exact(tokens).logits, expected(tokens).logits) < 1e-5


def test_the_dtype_is_the_one_asked_for(folders):
    source = folders / "deepseek_v3-cut"
    codes, key = tensors(source), "model.layers.1.mlp.experts.3.down_proj.weight"
    scale = codes[f"{key}_scale_inv"].double().repeat_interleave(48, 0).repeat_interleave(40, 1)
    values = codes[key].double() * scale[: len(codes[key]), : codes[key].shape[1]]
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        down = zoo.from_pretrained(source, dtype=dtype).model.layers[1].mlp.experts.down_proj[3]
        assert torch.equal(down, values.to(dtype))


def test_without_a_dtype_or_with_float8_it_is_bfloat16(folders, tmp_path):
    for dtype in ({}, {"dtype": "float8_e4m3fn"}):
        config = json.loads((folders / "mixtral-cut" / "config.json").read_text())
        config.pop("dtype")
        for path in (folders / "mixtral-cut").glob("model*"):
            (tmp_path / path.name).unlink(missing_ok=True)
            (tmp_path / path.name).symlink_to(path)
        (tmp_path / "config.json").write_text(json.dumps(config | dtype))
        assert {p.dtype for p in zoo.from_pretrained(tmp_path).parameters()} == {torch.bfloat16}


def test_tensors_that_are_wrong_are_named_with_their_file(folders, tmp_path):
    for path in (folders / "qwen3_moe-cut").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    key = "model.layers.0.mlp.experts.2.up_proj.weight_scale_inv"
    path = tmp_path / "model-00002-of-00002.safetensors"
    held = load_file(path)
    save_file({**held, key: held[key][:1].clone()}, path)
    with pytest.raises(ValueError, match=rf"00002.safetensors: tensor {key} has shape \[1, 2\], expected \[3, 2\]"):
        zoo.from_pretrained(tmp_path)
    save_file({**held, "lm_head.weight_scale_inv": torch.ones(1, 1)}, path)
    with pytest.raises(
        ValueError, match=r"00002.safetensors: 1 tensor \(lm_head.weight_scale_inv\) unknown to qwen3_moe"
    ):
        zoo.from_pretrained(tmp_path)
    save_file({name: t for name, t in held.items() if name != key}, path)
    index = tmp_path / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    del names[key]
    index.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ValueError, match=rf"00001.*: tensor {key[:-10]} is FP8, but its scales {key} are missing"):
        zoo.from_pretrained(tmp_path)


def test_a_quantisation_of_nothing_is_read(folders, tmp_path):
    dense = folders / "mixtral-cut-plain"
    config = json.loads((dense / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(dense / "model.safetensors")
    model = zoo.from_pretrained(tmp_path)
    assert same(model.state_dict(), zoo.from_pretrained(dense).state_dict())
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("name", SEEING)
def test_a_vision_language_model_in_fp8_is_the_dequantised_one(name, folders, tmp_path):
    source, dense = folders / f"{name}-fp8", folders / f"{name}-fp8-plain"
    ours = zoo.from_pretrained(source)
    assert ours.dtype == torch.bfloat16
    plainly = zoo.from_pretrained(dense)
    assert same(ours.state_dict(), plainly.state_dict())
    for model, target in ((ours, "saved"), (plainly, "plain")):
        zoo.save_pretrained(model, tmp_path / target)
    assert tensors(tmp_path / "saved").keys() == tensors(dense).keys()
    assert same(tensors(tmp_path / "saved"), tensors(tmp_path / "plain"))
    assert "quantization_config" not in (tmp_path / "saved" / "config.json").read_text()
    expected = AutoModelForImageTextToText.from_pretrained(dense, dtype=torch.float32)
    inputs = batch(kind_of(name))
    assert error(ours.float()(**inputs).logits, expected(**inputs).logits) < 1e-5
    assert zoo.from_pretrained(source, dtype="float32").dtype == torch.float32
    assert zoo.from_pretrained(source, device="meta").dtype == torch.bfloat16


def test_a_moe_llava_in_fp8_is_the_dequantised_one(tmp_path):
    (tmp_path / "published").mkdir()
    published(tmp_path / "published", "moe_llava_phi")
    quantise_fp8(tmp_path / "published", tmp_path / "fp8", (48, 40))
    config = tmp_path / "published" / "tower-config"
    ours, dense = (
        zoo.from_pretrained(tmp_path / name, vision_tower=str(config), image_token_id=250, dtype="bfloat16")
        for name in ("fp8", "fp8-plain")
    )
    assert same(ours.state_dict(), dense.state_dict())
    assert not hasattr(ours.config.get_text_config(), "quantization_config")


@pytest.fixture(scope="module")
def oss(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("oss")
    config = GptOssConfig(
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=96,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=128,
        head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    model = GptOssForCausalLM(config)
    model.generation_config.eos_token_id = 17
    model.save_pretrained(root / "dense")
    quantise_mxfp4(root / "dense", root / "mxfp4")
    return root


def read_oss(folder: Path, dtype: torch.dtype | str = "auto") -> GptOssForCausalLM:
    raw = json.loads((folder / "config.json").read_text())
    return image_text._read(GptOssForCausalLM, folder, dtype, {}, files.entries_of(folder, raw))


def test_gpt_oss_in_mxfp4_is_the_dequantised_one(oss, tmp_path):
    ours, dense = read_oss(oss / "mxfp4"), GptOssForCausalLM.from_pretrained(oss / "mxfp4-plain")
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert same(ours.state_dict(), dense.state_dict())
    assert ours.generation_config.eos_token_id == 17
    other = GptOssForCausalLM.from_pretrained(
        oss / "mxfp4", dtype="auto", quantization_config=Mxfp4Config(dequantize=True)
    )
    assert same(ours.state_dict(), other.state_dict())
    ours.save_pretrained(tmp_path / "saved")
    assert same(tensors(tmp_path / "saved"), tensors(oss / "mxfp4-plain"))
    assert "quantization_config" not in (tmp_path / "saved" / "config.json").read_text()
    tokens = torch.randint(0, 128, (2, 9))
    ours, dense = read_oss(oss / "mxfp4", torch.float32), dense.float()
    # Numbers of three bits and powers of two are bfloat16's too.
    assert torch.equal(ours.model.layers[0].mlp.experts.down_proj, dense.model.layers[0].mlp.experts.down_proj)
    assert error(ours(tokens).logits, dense(tokens).logits) < 1e-5


def test_gpt_oss_in_mxfp4_is_on_our_layers(oss, tmp_path):
    ours = zoo.from_pretrained(oss / "mxfp4", dtype="float32")
    assert sum(isinstance(module, MoE) for module in ours.modules()) == 2
    dense, tokens = GptOssForCausalLM.from_pretrained(oss / "mxfp4-plain").float(), torch.randint(0, 128, (2, 9))
    assert error(ours(tokens).logits, dense(tokens).logits) < 1e-5
    zoo.save_pretrained(zoo.from_pretrained(oss / "mxfp4"), tmp_path / "saved")
    assert same(tensors(tmp_path / "saved"), tensors(oss / "mxfp4-plain"))


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    told = {}
    for name in NAMES:
        model = zoo.from_pretrained(Path(folder) / name, mesh=Mesh(MESH))
        told[name] = model.bytes_read, whole_state(model)
        zoo.save_pretrained(model, Path(folder) / "back" / name)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.o_proj\.weight_scale_inv"):
        zoo.from_pretrained(Path(folder) / "wrong", mesh=Mesh(MESH))
    torch.save(told, f"{folder}/told-{rank}.pt")
    dist.destroy_process_group()


NAMES = [f"{family}-{form}" for family in ("deepseek_v3", "mixtral") for form in ("published", "cut")]
NAMES += [f"{name}-fp8" for name in SEEING]


@pytest.fixture(scope="module")
def told(folders) -> list[dict]:
    def code(key: str, tensor: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        codes = torch.zeros(tensor.shape).to(torch.float8_e4m3fn)
        return {key: codes} if "0.self_attn.o_proj" in key else {key: codes, f"{key}_scale_inv": torch.ones(())}, tensor

    quantise(folders / "mixtral", folders / "wrong", {"quant_method": "fp8"}, code)
    (folders / "back").mkdir()
    mp.start_processes(work, args=(str(folders),), nprocs=2, start_method="fork")
    return [torch.load(folders / f"told-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", NAMES)
def test_processes_read_what_one_does(name, folders, told, tmp_path):
    expected = zoo.from_pretrained(folders / name)
    tied = set(expected.all_tied_weights_keys or {})
    whole = {key: t for key, t in expected.state_dict().items() if key not in tied}
    # The first of the processes has them all together.
    assert same({key: t for key, t in told[0][name][1].items() if key not in tied}, whole)
    zoo.save_pretrained(expected, tmp_path / "saved")
    assert same(tensors(folders / "back" / name), tensors(tmp_path / "saved"))


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("deepseek", "mixtral"))])
def test_each_process_reads_the_bytes_of_its_own_parts_and_their_scales(name, folders, told):
    held = tensors(folders / name)
    block = FORMS[name.rpartition("-")[2]][0]
    for rank in range(2):
        expected = 0
        for key, tensor in held.items():
            rows, scale = range(len(tensor)), held.get(f"{key}_scale_inv")
            if key.endswith("_scale_inv"):
                continue
            if ".experts." in key:
                expert, experts = (
                    int(key.split(".experts.")[1].split(".")[0]),
                    len({k for k in held if same_stack(k, key)}),
                )
                if expert // (experts // 2) != rank:
                    continue
            elif "correction_bias" not in key:
                step = -(-len(tensor) // 2)
                rows = rows[rank * step : (rank + 1) * step]
            expected += len(rows) * tensor[0].nbytes
            if scale is not None:
                expected += len({row // block[0] for row in rows}) * scale[0].nbytes
        assert told[rank][name][0] == expected


def same_stack(a: str, b: str) -> bool:
    return re.sub(r"experts\.\d+", "", a) == re.sub(r"experts\.\d+", "", b) and ".experts." in a


def test_peak_memory_while_loading_is_the_model_and_one_tensor(tmp_path):
    theirs("mixtral").save_pretrained(tmp_path / "dense")
    quantise_fp8(tmp_path / "dense", tmp_path / "warm")
    theirs("mixtral", hidden_size=512, intermediate_size=1024).save_pretrained(tmp_path / "big")
    quantise_fp8(tmp_path / "big", tmp_path / "fp8")
    size = (tmp_path / "fp8-plain" / "model.safetensors").stat().st_size
    assert size > 50e6
    assert peak(tmp_path / "warm", tmp_path / "fp8", "bfloat16") < 1.2 * size
