"""Families that are read and written without having models by name, against transformers' own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import zoo
from zoo.moe import MoE
from zoo.pretrained.language import READABLE
from zoo.pretrained.sparse_relatives import published_config

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
DEEPSEEK = {"n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3, "first_k_dense_replace": 1}
GROUPS = {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 1.7}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
INDEX = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}
OLMO = {"num_experts": 8, "num_experts_per_tok": 3}
FIELDS: dict[str, dict[str, Any]] = {
    "flex_olmo": OLMO,
    "mellum": {**OLMO, "norm_topk_prob": True, "head_dim": 8},
    "deepseek_v2": {**DEEPSEEK, **MLA, "topk_method": "group_limited_greedy", **GROUPS, "norm_topk_prob": False},
    "deepseek_v32": {**DEEPSEEK, **MLA, **GROUPS, **INDEX},
    "dots1": {**DEEPSEEK, **GROUPS},
    "glm4_moe": {**DEEPSEEK, **GROUPS, "head_dim": 8},
    "glm4_moe_lite": {**DEEPSEEK, **MLA, **GROUPS},
    "glm_moe_dsa": {**DEEPSEEK, **MLA, **GROUPS, **INDEX},
    "solar_open": {**DEEPSEEK, **GROUPS, "head_dim": 8},
}


@pytest.fixture(params=sorted(READABLE))
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder as transformers writes it, of a small model whose weights are large enough that every expert counts."""
    prefix = READABLE[request.param].prefix
    if not hasattr(transformers, f"{prefix}ForCausalLM"):
        pytest.skip(f"transformers {transformers.__version__} has no {prefix}")
    config_class, model_class = READABLE[request.param].classes()
    known = config_class().to_dict().keys() | FIELDS[request.param].keys()
    config = config_class(**{k: v for k, v in {**SIZES, **FIELDS[request.param]}.items() if k in known})
    model = model_class._from_config(config)
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            buffer.normal_(std=0.3)
    model.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-9)).item()


def by_their_names(model: torch.nn.Module, family: str) -> dict[str, torch.nn.Parameter]:
    shared = f"mlp.{READABLE[family].shared}."
    return {
        name.replace("mlp.router.", "mlp.gate.").replace("mlp.shared.", shared): parameter
        for name, parameter in model.named_parameters()
    }


def test_logits_gradients_and_generation_are_those_of_transformers(checkpoint):
    theirs, ours = AutoModelForCausalLM.from_pretrained(checkpoint), zoo.from_pretrained(checkpoint, losses={"z": 0.1})
    assert [isinstance(layer.mlp, MoE) for layer in ours.model.layers] == [
        hasattr(layer.mlp, "experts") for layer in theirs.model.layers
    ]
    assert isinstance(ours.model.layers[1].mlp, MoE)
    tokens = torch.randint(0, 128, (3, 14))
    mask = torch.ones_like(tokens)
    mask[0, :5] = mask[2, :2] = 0
    for given in (torch.ones_like(tokens), mask):
        found = [model(tokens, attention_mask=given).logits[given.bool()] for model in (ours, theirs)]
        assert error(*found) < 1e-5
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(tokens, **options), theirs.generate(tokens, **options))
    for model in (ours.train(), theirs.train()):
        model(tokens, labels=tokens).loss.backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    found = {name: p.grad for name, p in by_their_names(ours, theirs.config.model_type).items()}
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert (grad is None) == (found[name] is None), name
        assert grad is None or error(found[name], grad) < 1e-4 or (found[name] - grad).abs().max() < 1e-7, name
    with zoo.moe.record(ours) as step:
        ours(tokens)
    assert step.losses()["z"] > 0


def test_what_was_read_is_written_again_bit_for_bit(checkpoint, tmp_path):
    model = zoo.from_pretrained(checkpoint)
    published_config(model)
    model.save_pretrained(tmp_path / "ours")
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], tensor) and after[key].dtype == tensor.dtype for key, tensor in before.items())
    configs = [json.loads((folder / "config.json").read_text()) for folder in (checkpoint, tmp_path / "ours")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("checkpoint", ["glm4_moe"], indirect=True)
def test_a_layer_for_more_tokens_that_transformers_leaves_out_is_left_out(checkpoint):
    file = checkpoint / "model.safetensors"
    held = load_file(file)
    save_file({**held, "model.layers.92.eh_proj.weight": torch.zeros(2, 2)}, file, {"format": "pt"})
    model = zoo.from_pretrained(checkpoint)
    assert torch.equal(model.lm_head.weight, held["lm_head.weight"])
    save_file({**held, "model.layers.9.eh_proj.weight": torch.zeros(2, 2)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.9\.eh_proj\.weight\) unknown to glm4_moe"):
        zoo.from_pretrained(checkpoint)


def test_every_family_is_tested():
    assert FIELDS.keys() == READABLE.keys()


def test_a_family_that_transformers_does_not_have_yet_is_named():
    with pytest.raises(ValueError, match=r"transformers \S+ has no NotYet; expected a newer one"):
        replace(READABLE["dots1"], prefix="NotYet").classes()
