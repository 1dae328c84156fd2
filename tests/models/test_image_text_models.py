"""Vision-language models by name: sizes, overrides, and what the list says of them."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo.models import count_parameters
from zoo.models.image_text import MODELS
from zoo.moe import IsolatedMoE, MoE
from zoo.pretrained.context import decoder_of
from zoo.pretrained.image_text import known_types

TINY = sorted(name for name in MODELS if name.endswith("_tiny"))

# Billions of parameters of the language model in all, and active for a token of text, as the authors give them.
PUBLISHED = {
    "qwen3_vl_30b_a3b": (30.5, 3.3),  # arXiv 2505.09388: Qwen3-30B-A3B
    "qwen3_vl_235b_a22b": (235, 22),  # arXiv 2505.09388: Qwen3-235B-A22B
    "glm_4.5v": (106, 12),  # arXiv 2508.06471: GLM-4.5-Air
    "aria": (24.9, 3.5),  # arXiv 2410.05993
    "llama4_scout": (109, 17),  # model card of meta-llama/Llama-4-Scout-17B-16E
    "llama4_maverick": (400, 17),  # model card of meta-llama/Llama-4-Maverick-17B-128E
    "ernie4_5_vl_28b_a3b": (28, 3),  # model card of baidu/ERNIE-4.5-VL-28B-A3B
}


def test_every_family_is_one_of_transformers():
    assert {MODELS[name][0] for name in MODELS} - {"moe_llava"} <= known_types().keys()
    assert set(zoo.list_models("vision_language/*")) >= {f"vision_language/{name}" for name in MODELS}


@pytest.mark.parametrize("name", PUBLISHED)
def test_real_models_have_the_published_parameters_without_memory(name):
    with torch.device("meta"):
        model = zoo.create_model(f"vision_language/{name}")
    assert all(p.is_meta for p in model.parameters())
    total, active = count_parameters(model)
    head = model.get_output_embeddings().weight
    words = model.get_input_embeddings().weight
    language = sum(p.numel() for p in decoder_of(model).parameters()) + (0 if head is words else head.numel())
    beside = total - language
    published_total, published_active = PUBLISHED[name]
    assert abs(language / 1e9 / published_total - 1) < 0.03
    # Some authors count embeddings among the active parameters, and some do not.
    least = active - beside - words.numel() - head.numel()
    assert least / 1e9 < 1.06 * published_active
    assert (active - beside) / 1e9 > 0.94 * published_active


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_learn_and_every_gate_gets_a_gradient(name):
    torch.manual_seed(0)
    model = zoo.create_model(f"vision_language/{name}").train()
    tokens = torch.randint(0, 240, (2, 12))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    gates = [m.router for m in model.modules() if isinstance(m, MoE)]
    assert gates
    isolated = {id(m.parts[1].router) for m in model.modules() if isinstance(m, IsolatedMoE)}
    assert all(router.weight.grad.abs().max() > 0 for router in gates if id(router) not in isolated)


def test_overrides_change_only_what_they_name():
    model = zoo.create_model(
        "vision_language/qwen3_vl_moe_tiny",
        text_config={"num_hidden_layers": 3},
        losses={"switch": 0.01},
        router={"name": "TopKRouter", "k": 3},
        backend="reference",
        dtype="bfloat16",
    )
    found = [m for m in model.modules() if isinstance(m, MoE)]
    assert len(found) == 3
    assert {(m.router.k, m.experts.num_experts, m.experts.backend) for m in found} == {(3, 8, "reference")}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("vision_language/qwen3_vl_tiny", {}, "did you mean vision_language/qwen3_vl"),
        ("vision_language/aria_tiny", {"text_confg": {}}, "override of aria 'text_confg'; did you mean text_config"),
        (
            "vision_language/aria_tiny",
            {"text_config": {"moe_topkk": 2}},
            "override of aria_text 'moe_topkk'; .*moe_topk",
        ),
        ("vision_language/aria_tiny", {"losses": {"swich": 1}}, "swich"),
    ],
)
def test_a_wrong_name_lists_the_nearest(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        zoo.create_model(name, **overrides)
