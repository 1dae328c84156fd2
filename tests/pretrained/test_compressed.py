"""Checkpoints of compressed-tensors, ModelOpt, GPTQ, AWQ, bitsandbytes as models: of the numbers that they mean."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import theirs
from packer import WAYS
from quantiser import quantise, tensors
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import zoo
from zoo.moe import QuantisedExperts
from zoo.parallel import Mesh, Sizes
from zoo.parallel.parts import whole_state

BESIDE = ("input_scale", "input_global_scale", "k_scale", "v_scale")  # of activations and caches


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[key]) and t.dtype == b[key].dtype for key, t in a.items())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("packed")
    theirs("qwen3_moe", moe_intermediate_size=96, head_dim=32).save_pretrained(root / "dense")
    for way, (said, make) in WAYS.items():

        def code(key: str, tensor: torch.Tensor, make=make) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
            parts, meant = make(tensor)
            parts = {key.removesuffix("weight") + end: part for end, part in parts.items()}
            if "k_proj" in key and "weight_scale" in str(list(parts)):
                parts |= {key.removesuffix("weight") + end: torch.ones(1) for end in BESIDE}
            return parts, meant.contiguous()

        quantise(root / "dense", root / way, said, code)
    return root


@pytest.mark.parametrize("way", WAYS)
def test_the_model_is_the_dequantised_one(way: str, folders: Path, tmp_path: Path) -> None:
    ours, plain = zoo.from_pretrained(folders / way), zoo.from_pretrained(folders / f"{way}-plain")
    assert same(ours.state_dict(), plain.state_dict())
    assert not hasattr(ours.config, "quantization_config")
    zoo.save_pretrained(ours, tmp_path / "saved")
    assert same(tensors(tmp_path / "saved"), tensors(folders / f"{way}-plain"))
    tokens = torch.randint(0, 256, (2, 9))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)(tokens).logits
    found = ours.float()(tokens).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("way", ["int4 zeros", "nvfp4", "gptq ordered", "nf4 twice", "fp4 off rows"])
def test_experts_may_be_kept_in_few_bits_or_in_their_files(way: str, folders: Path) -> None:
    exact = zoo.from_pretrained(folders / way, dtype="float32")
    few = zoo.from_pretrained(folders / way, quantise="int8")
    for name, module in few.named_modules():
        if isinstance(module, QuantisedExperts):
            expected = QuantisedExperts.of(exact.get_submodule(name), "int8")
            assert all(torch.equal(b, dict(expected.named_buffers())[n]) for n, b in module.named_buffers())
    away = zoo.from_pretrained(folders / way, offload=2, dtype="float32")
    tokens = torch.randint(0, 256, (1, 5))
    with torch.no_grad():
        expected = exact(tokens).logits
        assert (away(tokens).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    told = {}
    for way in WAYS:
        told[way] = whole_state(zoo.from_pretrained(Path(folder) / way, mesh=Mesh(Sizes(expert=2))))
    if rank == 0:
        torch.save(told, f"{folder}/told.pt")
    dist.destroy_process_group()


def test_processes_read_their_parts(folders: Path) -> None:
    mp.start_processes(work, args=(str(folders),), nprocs=2, start_method="fork")
    for way, state in torch.load(folders / "told.pt").items():
        assert same(state, zoo.from_pretrained(folders / way).state_dict()), way


@pytest.mark.parametrize(
    ("way", "end", "change", "told"),
    [
        ("int4", "weight_scale", lambda t: None, "is quantised, but its scales .*weight_scale are missing"),
        ("int4 zeros", "weight_scale", lambda t: t[:, :-1], "weight_scale has shape .* does not divide"),
        ("int4 zeros", "weight_zero_point", lambda t: t[1:], "weight_zero_point has shape"),
        ("float8 blocks", "weight_scale", lambda t: t[:-1], "does not divide"),
        ("nvfp4", "weight_global_scale", lambda t: None, "is NVFP4, but .*weight_global_scale is missing"),
        ("nvfp4", "weight_scale", lambda t: t[:, 1:], "weight_scale has shape"),
        ("gptq", "qzeros", lambda t: None, "is quantised, but .*qzeros is missing"),
        ("awq", "scales", lambda t: t[1:], "qzeros has shape|scales has shape"),
        ("nf4", "weight.absmax", lambda t: t[1:], "weight.absmax has shape"),
        ("nf4", "weight.absmax", lambda t: None, "is quantised, but tensor .*weight.absmax is missing"),
        ("nf4 twice", "weight.nested_absmax", lambda t: t[:0], "weight.nested_absmax has shape"),
        ("nf4 twice", "weight.absmax", lambda t: t.float(), "weight.absmax is stored as F32; expected U8"),
        ("nf4", "weight", lambda t: t[1:], "bytes, expected .* numbers of 4 bits"),
        ("nf4", "weight.quant_state.bitsandbytes__nf4", lambda t: t[1:], "does not say how a matrix is quantised"),
        ("nf4", "weight.quant_state.bitsandbytes__nf4", lambda t: None, "up_proj.weight is U8; nothing says what"),
        ("llm int8", "SCB", lambda t: None, "up_proj.weight is I8; nothing says what it means"),
        ("llm int8", "SCB", lambda t: t[1:], "SCB has shape"),
        ("llm int8", "weight_format", lambda t: t + 1, "weight_format: expected 0"),
    ],
)
def test_tensors_that_are_wrong_are_named(way, end, change, told, folders: Path, tmp_path: Path) -> None:
    held = tensors(folders / way)
    key = f"model.layers.0.mlp.experts.1.up_proj.{end}"
    changed = change(held.pop(key))
    save_file({**held, **({} if changed is None else {key: changed.contiguous()})}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folders / way / "config.json").read_bytes())
    with pytest.raises(ValueError, match=told) as raised:
        zoo.from_pretrained(tmp_path)
    assert "model.safetensors: " in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "format='marlin-24' is not read; expected"),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparse-24-bitmask",
        ),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"R1": {}}}},
            "transforms is another",
        ),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo='W4A8_AWQ' is not read"),
        ({"quant_method": "gptq", "bits": 3}, "bits=3 is not read"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format='marlin' is not read"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version='gemv' is not read"),
        ({"quant_method": "hqq"}, "quant_method='hqq'.*compressed-tensors, modelopt, gptq, awq, bitsandbytes"),
    ],
)
def test_other_ways_are_refused_before_weights_are_looked_for(settings, told, folders: Path, tmp_path: Path) -> None:
    config = json.loads((folders / "dense" / "config.json").read_text()) | {"quantization_config": settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=told):
        zoo.from_pretrained(tmp_path)


def test_integers_of_two_sizes_are_not_guessed(folders: Path, tmp_path: Path) -> None:
    config = json.loads((folders / "int4" / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = {"weights": {"type": "int", "num_bits": 8}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors(folders / "int4"), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="expected one num_bits for all integers"):
        zoo.from_pretrained(tmp_path)


def test_kimi_k2_is_deepseek_v3_in_other_numbers(tmp_path: Path) -> None:
    """As it is published: of a type that transformers does not know, with code of its own that nobody runs."""
    model = theirs("deepseek_v3", n_group=1, topk_group=1)
    model.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    config |= {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}}
    (tmp_path / "kimi").mkdir()
    (tmp_path / "kimi" / "config.json").write_text(json.dumps(config))
    save_file(load_file(tmp_path / "theirs" / "model.safetensors"), tmp_path / "kimi" / "model.safetensors")
    ours, tokens = zoo.from_pretrained(tmp_path / "kimi"), torch.randint(0, 256, (2, 9))
    expected = model(tokens).logits
    assert (ours(tokens).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    zoo.save_pretrained(ours, tmp_path / "saved")
    assert "auto_map" not in (tmp_path / "saved" / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert (again(tokens).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
