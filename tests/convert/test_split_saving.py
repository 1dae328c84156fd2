"""Split models on disk: in the layout of a sparse relative where it has a place for the gates, or refused."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from converted_cases import error, experts_of, language, losses_of, output, shaken, vit

import zoo
from zoo.convert import set_k
from zoo.models.image_text import configuration

LINEAR = {"name": "LLaMAMoERouter", "network": "linear", "noise": None}


@pytest.mark.parametrize(
    ("name", "options", "relative"),
    [
        ("llama", {"router": "TopKRouter"}, "MixtralForCausalLM"),
        ("mistral", {"router": LINEAR, "method": "random"}, "MixtralForCausalLM"),
        ("llama", {"router": LINEAR, "scale": 1.5, "method": "importance"}, "MixtralForCausalLM"),
        ("qwen3", {"router": {"name": "TopKRouter", "normalize": False}, "layers": [1]}, "Qwen3MoeForCausalLM"),
        ("qwen3", {"router": "MoEBERTRouter", "k": 1, "method": "importance", "shared": 16}, "Qwen3MoeForCausalLM"),
    ],
)
def test_a_split_model_is_saved_in_its_sparse_relatives_layout(name, options, relative, tmp_path):
    dense, ids = shaken(language(name)), torch.randint(3, 64, (2, 9))
    sparse = zoo.split(dense, **{"num_experts": 4, "k": 2, "calibrate": losses_of(ids), **options})
    with torch.no_grad():
        for moe in experts_of(sparse):
            moe.router.weight.normal_(std=0.5)  # LLaMA-MoE's linear gate starts at zero
    expected = output(sparse, ids)
    assert error(expected, output(dense, ids)) > 1e-3
    zoo.save_pretrained(sparse, tmp_path / "saved")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert type(theirs).__name__ == relative
    assert error(output(theirs, ids), expected) < 2e-5
    assert error(output(zoo.from_pretrained(tmp_path / "saved"), ids), expected) < 2e-5


@pytest.mark.filterwarnings("ignore:split. dropout of only some units")
@pytest.mark.parametrize(
    ("name", "options", "kind", "message"),
    [
        ("llama", {}, ValueError, "unit_weights=True cannot be expressed in the Mixtral layout"),
        ("qwen3", {"router": "MoEficationRouter"}, ValueError, r"mlp.router.out \(4, 4\)/missing there"),
        ("llama", {"router": "LLaMAMoERouter"}, ValueError, r"mlp.router.noise_weight \(4, 32\)/missing there"),
        ("llama", {"router": "MoEBERTRouter"}, ValueError, "normalize=False cannot be expressed in the Mixtral layout"),
        (
            "llama",
            {"router": {"name": "MoEBERTRouter", "level": "sentence", "normalize": True}},
            ValueError,
            "level='sentence' cannot be expressed in the Mixtral layout",
        ),
        ("gpt2 (transposed)", {}, TypeError, "GPT2LMHeadModel has no published layout"),
    ],
)
def test_gates_that_no_layout_has_are_refused_and_nothing_is_written(name, options, kind, message, tmp_path):
    sparse = zoo.split(language(name), num_experts=4, calibrate=losses_of(torch.randint(3, 64, (1, 9))), **options)
    for save in (zoo.save_pretrained, lambda model, folder: model.save_pretrained(folder)):
        with pytest.raises(kind, match=message):
            save(sparse, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"layers": "every-2"},
        {"method": "importance", "shared": 12, "expert_dim": 48, "router": "MoEBERTRouter", "k": 1},
        {"method": "coactivation", "router": {"name": "MoEficationRouter", "k": 3}},
        {"method": "random", "router": "LLaMAMoERouter", "scale": 3.0},
        {"router": {"class_path": "zoo.moe.routers.TopKRouter", "init_args": {"k": 1}}, "capacity": 2.0},
    ],
)
def test_a_split_timm_model_is_read_again_as_it_was_without_any_data(options, tmp_path):
    dense, x = shaken(vit(depth=3)), torch.randn(2, 3, 32, 32)
    calibrate = lambda model: (model(x).square().mean() for _ in range(2))  # noqa: E731
    sparse = zoo.split(dense, **{"num_experts": 4, "k": 2, "calibrate": calibrate, **options})
    zoo.save_pretrained(sparse, tmp_path / "saved")
    again = zoo.from_pretrained(tmp_path / "saved")
    assert torch.equal(output(again, x), output(sparse, x))
    zoo.save_pretrained(again, tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "saved" / "config.json").read_bytes()


def test_another_k_is_saved_too(tmp_path):
    dense, x = shaken(vit(depth=2)), torch.randn(2, 3, 32, 32)
    sparse = zoo.upcycle(zoo.split(dense, layers=[0], num_experts=4, k=1), layers=[1], num_experts=2)
    set_k(sparse, 2)
    zoo.save_pretrained(sparse, tmp_path / "saved")
    again = zoo.from_pretrained(tmp_path / "saved")
    assert [moe.router.k for moe in experts_of(again)] == [2, 2]
    assert torch.equal(output(again, x), output(sparse, x))
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["split"][0]["k"] == 2


def test_a_split_llavas_narrow_experts_have_no_place_in_moe_llavas_layout(tmp_path):
    config = configuration("moe_llava_tiny", text_config={"model_type": "llama"})
    llava = transformers.LlavaForConditionalGeneration._from_config(config)
    sparse = zoo.split(llava, num_experts=4, router={"name": "TopKRouter", "k": 1, "normalize": False})
    assert all(
        name.startswith("model.language_model.") for name, m in sparse.named_modules() if isinstance(m, zoo.moe.MoE)
    )
    width = config.text_config.intermediate_size
    with pytest.raises(ValueError, match=f"experts as wide as the dense MLPs, {width}; found {width // 4}"):
        zoo.save_pretrained(sparse, tmp_path / "saved")


@pytest.mark.parametrize(
    "options",
    [{"router": "TopKRouter"}, {"method": "importance", "shared": 8, "expert_dim": 40}, {"layers": [0, 2]}],
)
def test_a_split_timm_model_that_lost_or_gained_experts_is_read_again(options, tmp_path):
    dense, x = shaken(vit(depth=3)), torch.randn(2, 3, 32, 32)
    calibrate = lambda model: (model(x).square().mean() for _ in range(2))  # noqa: E731
    sparse = zoo.split(dense, **{"num_experts": 4, "k": 2, "calibrate": calibrate, **options})
    layers = len(experts_of(sparse))
    made = {
        "fewer": zoo.prune(sparse, keep=3, by="weight", calibrate=calibrate),
        "uneven": zoo.prune(sparse, experts=[[0, 2], [1, 2, 3], [0, 1, 3]][:layers]),
        "block": zoo.prune(sparse, drop_blocks=[0]),
        "more": shaken(zoo.grow(sparse, num_new=2)),
        "twice": shaken(zoo.grow(zoo.prune(sparse, experts=[[0, 3]] * layers), num_new=1)),
    }
    for name, model in made.items():
        zoo.save_pretrained(model, tmp_path / name)
        again = zoo.from_pretrained(tmp_path / name)
        numbers = [[moe.router.num_experts for moe in experts_of(m)] for m in (again, model)]
        assert numbers[0] == numbers[1], name
        assert error(output(again, x), output(model, x)) < 1e-6, name
