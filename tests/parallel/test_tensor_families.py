"""Language families of transformers, each split as it says itself: outputs and gradients are those of one process."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
from tiny_families import experts_classes, tiny_model
from two_processes import results, spread

from zoo.parallel import Sizes
from zoo.parallel.tensor import planned
from zoo.pretrained import image_text

FAMILIES = (
    "afmoe",
    "axk2",
    "beam",
    "cohere2_moe",
    "deepseek_v2",
    "deepseek_v32",
    "deepseek_v4",
    "ernie4_5_moe",
    "flint",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "gpt_oss",
    "hy_v3",
    "hy_v4",
    "laguna",
    "mistral4",
    "minimax_m3_vl",
    "nemotron_h",
    "phimoe",
    "qwen4_exp",
    "granitemoe_swa",
    "jamba",
    "kimi_linear",
    "lfm2_moe",
    "mimo_v2_flash",
    "minimax",
    "minimax_m2",
    "qwen3_next",
)
if tuple(int(part) for part in version("transformers").split(".")[:2]) < (5, 23):
    # Their plans do not say there that sinks are split with the heads.
    FAMILIES = tuple(family for family in FAMILIES if family not in ("granitemoe_swa", "mimo_v2_flash"))
KNOWN = {family: (family, module, experts) for family, module, experts in experts_classes() if family in FAMILIES}
MESHES = {"tensor": Sizes(tensor=2), "expert": Sizes(expert=2)}


def made(family: str):
    torch.manual_seed(0)
    model = tiny_model(*KNOWN[family]).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.dim() > 1 else p.data.add_(0.1 * torch.randn_like(p))
    return image_text.put_layers(model)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return spread(tmp_path_factory.mktemp("families"), made, KNOWN, MESHES)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("family", KNOWN)
def test_two_processes_compute_what_one_does(told, family, mesh):
    logits, gradients = results(made(family))
    for rank in range(2):
        found, theirs = told[rank][family, mesh]
        assert (found - logits).norm() < 1e-5 * logits.norm()
        assert theirs.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (theirs[name] - gradient).norm() < 1e-4 * gradient.norm() + 1e-8, name


def test_layers_beside_one_that_is_split_in_an_unknown_way_stay_whole():
    model = made("deepseek_v2")
    assert {style for name, style in planned(model).items() if ".self_attn." in name} >= {"colwise", "mla_kv_a_proj"}
    plan = {**model.config.base_model_tp_plan, "layers.*.self_attn.kv_a_proj_with_mqa": "something_new"}
    model.config.base_model_tp_plan = plan
    found = planned(model)
    assert found
    assert not [name for name in found if ".self_attn." in name]
    model.config.base_model_tp_plan = {**plan, "layers.*.self_attn": "something_else"}
    assert planned(model) == found
