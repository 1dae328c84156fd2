"""What transformers' Trainer does with a model of ours: saves it over and over, and reads its tensors back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

import zoo
from zoo.pretrained.language import FAMILIES

SIZES = {"num_hidden_layers": 2, "vocab_size": 64, "hidden_size": 32}


def small(name: str):
    return zoo.create_model(f"language/{name}_tiny", **SIZES)


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize("family", [*FAMILIES, "glm4_moe", "deepseek_v2"])
def test_a_checkpoints_tensors_are_read_back_without_being_strict(family, tmp_path):
    trained, fresh = small(family), small(family)
    for buffer in trained.buffers():
        if buffer.is_floating_point() and buffer.shape == (16,):
            buffer.normal_()  # the bias of the choice
    trained.save_pretrained(tmp_path / "a", state_dict=None, is_main_process=True)
    assert not same(trained, fresh)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(fresh)))
    for model in (fresh, copied):
        found = model.load_state_dict(load_file(tmp_path / "a" / "model.safetensors"), strict=False)
        assert not found.missing_keys
        assert not found.unexpected_keys
        assert same(trained, model)


@pytest.mark.parametrize("family", ["mixtral", "glm4_moe", "granitemoe"])
def test_a_model_says_where_a_second_one_like_it_is_read_and_its_files_do_not(family, tmp_path):
    small(family).save_pretrained(tmp_path / "a")
    model = zoo.from_pretrained(tmp_path / "a")
    assert model.name_or_path == model.config.name_or_path == str(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    assert str(tmp_path) not in (tmp_path / "b" / "config.json").read_text()


def test_shards_are_read_one_after_another(tmp_path):
    trained, fresh = small("mixtral"), small("mixtral")
    trained.save_pretrained(tmp_path / "a", max_shard_size="100KB")
    files = sorted((tmp_path / "a").glob("*.safetensors"))
    assert len(files) > 2
    for file in files:
        fresh.load_state_dict(load_file(file), strict=False)
    assert same(trained, fresh)


def test_an_upcycled_model_is_read_back(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes)
    trained, fresh = (
        zoo.upcycle(AutoModelForCausalLM.from_config(config), layers="all", num_experts=4) for _ in range(2)
    )
    trained.save_pretrained(tmp_path / "a")
    assert not same(trained, fresh)
    fresh.load_state_dict(load_file(tmp_path / "a" / "model.safetensors"), strict=False)
    assert same(trained, fresh)


def test_its_own_tensors_are_read_as_ever():
    trained, fresh = small("qwen2_moe"), small("qwen2_moe")
    fresh.load_state_dict(trained.state_dict())
    assert same(trained, fresh)
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh.load_state_dict({})


def test_names_that_are_not_known_are_an_error_not_passed_over(tmp_path):
    model = small("qwen3_next")
    published = {"model.layers.0.mlp.experts.0.gate_proj.weight": torch.zeros(128, 32)}
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"gate_proj\.weight and 0 more are named as qwen3_next is published"):
        model.load_state_dict(published, strict=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_saving_again_replaces_the_checkpoint_and_leaves_other_files(tmp_path):
    model = small("mixtral")
    (tmp_path / "a" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "a" / "notes.txt").write_text("mine")
    for _ in range(2):
        with torch.no_grad():
            next(model.parameters()).add_(1)
        model.save_pretrained(tmp_path / "a")
    assert same(zoo.from_pretrained(tmp_path / "a"), model)
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "a" / "checkpoint-2").is_dir()
    with pytest.raises(FileExistsError):
        zoo.save_pretrained(model, tmp_path / "a")


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_state_that_is_given_is_what_is_written(name, tmp_path):
    model, other = small(name), small(name)
    model.save_pretrained(tmp_path / "a", state_dict=other.state_dict())
    assert same(zoo.from_pretrained(tmp_path / "a"), other)


def test_other_processes_write_nothing_and_other_options_are_refused(tmp_path):
    model = small("mixtral")
    model.save_pretrained(tmp_path / "a", is_main_process=False)
    assert not (tmp_path / "a").exists()
    with pytest.raises(TypeError, match="push_to_hub=True is not supported"):
        model.save_pretrained(tmp_path / "a", push_to_hub=True)
    model.save_pretrained(tmp_path / "a", push_to_hub=False, safe_serialization=True, variant=None)
    assert (tmp_path / "a" / "model.safetensors").is_file()
