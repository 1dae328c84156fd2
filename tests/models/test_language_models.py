"""Language models by name: sizes, initialisation, overrides, and the dense twin."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import zoo
from zoo.models import count_parameters, dense_twin
from zoo.models.language import MODELS, configuration
from zoo.moe import MLP, MoE
from zoo.pretrained.language import FAMILIES

TINY = zoo.list_models("language/*_tiny")

# Billions of parameters in all and active for a token, as the authors give them.
PUBLISHED = {
    "mixtral_8x7b": (46.7, 12.9),  # mistral.ai/news/mixtral-of-experts
    "mixtral_8x22b": (140.6, 39.2),  # mistral.ai/news/mixtral-8x22b: 141B and 39B
    "olmoe_1b_7b": (6.9, 1.3),  # arXiv 2409.02060, table 1
    "qwen1.5_moe_a2.7b": (14.3, 2.7),  # model card of Qwen/Qwen1.5-MoE-A2.7B
    "qwen3_30b_a3b": (30.5, 3.3),  # arXiv 2505.09388 and model card of Qwen/Qwen3-30B-A3B
    "deepseek_v3": (671.0, 37.0),  # arXiv 2412.19437, without the multi-token prediction layer
    "deepseek_v2": (235.7, 21.4),  # arXiv 2405.04434, section 3.1.2: 236B and 21B
    "deepseek_v2_lite": (15.7, 2.7),  # arXiv 2405.04434, appendix B: 2.4B without the embeddings' 0.2B
    "ernie4_5_21b_a3b": (21.8, 3.4),  # model card of baidu/ERNIE-4.5-21B-A3B-PT: 21B and 3B
    "glm_4.5": (352.8, 33.6),  # arXiv 2508.06471, table 1: 355B and 32B, with a multi-token prediction layer
    "glm_4.5_air": (106.9, 13.4),  # the same: 106B and 12B without embeddings
    "gpt_oss_20b": (20.9, 4.2),  # arXiv 2508.10925, table 1: 20.91B, and 3.61B without the embeddings' 0.58B
    "gpt_oss_120b": (116.8, 5.7),  # the same: 116.83B, and 5.13B without the embeddings' 0.58B
    "nemotron_3_nano_30b_a3b": (31.6, 3.6),  # arXiv 2512.20848: 31.6B, and 3.6B with embeddings
    "phi_3.5_moe": (41.9, 6.6),  # arXiv 2404.14219: 42B and 6.6B
    "qwen3_next_80b_a3b": (79.7, 3.9),  # model card of Qwen/Qwen3-Next-80B-A3B-Instruct: 80B and 3B without embeddings
}
# Layers that a family needs to have one of every kind.
LAYERS = {"qwen3_next": 4}


def layers(model: nn.Module) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


def batch(model: nn.Module, size: tuple[int, int] = (2, 12)) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, size)


def test_there_is_a_tiny_and_a_real_model_of_every_family():
    tiny, real = ({MODELS[name.split("/")[-1]][0] for name in names} for names in (TINY, PUBLISHED))
    assert tiny >= real >= set(FAMILIES)
    assert {name for name in MODELS if not name.endswith("_tiny")} == set(PUBLISHED)
    assert set(zoo.list_models("language/*")) == {f"language/{name}" for name in MODELS}
    assert zoo.list_models("nothing*") == []
    with pytest.raises(TypeError, match=r"list_models: expected a pattern such as 'language/\*', got 3"):
        zoo.list_models(3)


@pytest.mark.parametrize("name", PUBLISHED)
def test_real_models_have_the_published_parameters_without_memory(name):
    with torch.device("meta"):
        model = zoo.create_model(f"language/{name}")
        theirs = AutoModelForCausalLM.from_config(configuration(name))
    assert all(p.is_meta for p in model.parameters())
    total, active = count_parameters(model)
    published_total, published_active = PUBLISHED[name]
    assert abs(total / 1e9 - published_total) < 0.051
    assert abs(active / 1e9 / published_active - 1) < 0.02
    # ERNIE's bias of the choice is a parameter there.
    assert total == sum(p.numel() for name, p in theirs.named_parameters() if "correction_bias" not in name)


def test_active_parameters_are_counted_by_hand():
    model = zoo.create_model("language/mixtral_tiny", num_hidden_layers=1, hidden_size=8, intermediate_size=6)
    experts = 3 * 8 * 6
    assert count_parameters(model)[0] - count_parameters(model)[1] == (8 - 2) * experts


@pytest.mark.parametrize("name", [name for name in TINY if MODELS[name.split("/")[1]][0] in FAMILIES])
def test_fresh_weights_are_normal_with_the_familys_width(name):
    torch.manual_seed(0)
    for std in (0.02, 0.1):
        for model in (zoo.create_model(name, initializer_range=std), dense_twin(name, initializer_range=std)):
            for parameter_name, p in model.named_parameters():
                if p.dim() == 1:
                    assert torch.equal(p, torch.ones_like(p) if "norm" in parameter_name else torch.zeros_like(p))
                else:
                    allowed = 5 * std / p.numel() ** 0.5
                    assert abs(p.std() - std) < allowed, parameter_name
                    assert abs(p.mean()) < allowed, parameter_name


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_learn_and_every_parameter_gets_a_gradient(name):
    torch.manual_seed(0)
    family = MODELS[name.split("/")[1]][0]
    # Nemotron-H has a list of layers, not a number.
    number = {} if family == "nemotron_h" else {"num_hidden_layers": LAYERS.get(family, 2)}
    model = zoo.create_model(name, vocab_size=64, **number)
    tokens = batch(model, (4, 16))
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert abs(loss.item() - math.log(64)) < 0.2
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.step()
        optimizer.zero_grad()
        after = model(tokens, labels=tokens).loss
        after.backward()
    assert after < 0.8 * loss


@pytest.mark.parametrize("name", TINY)
def test_the_dense_twin_has_the_active_parameters_but_for_the_gates(name):
    model = zoo.create_model(name)
    twin = dense_twin(name)
    gates = sum(p.numel() for m in layers(model) for p in m.router.parameters())
    gates += sum(m.shared_gate.weight.numel() for m in layers(model) if m.shared_gate is not None)
    # An MLP as wide as k experts has one output bias, not k.
    biases = sum((m.router.k - 1) * m.experts.dim for m in layers(model) if m.experts.b_out is not None)
    assert count_parameters(twin) == (count_parameters(model)[1] - gates - biases,) * 2
    assert layers(twin) == []
    tokens = batch(twin)
    twin(tokens, labels=tokens).loss.backward()
    assert twin.eval().generate(tokens, max_new_tokens=2, do_sample=False).shape == (2, 14)


@pytest.mark.parametrize("name", [name for name in TINY if MODELS[name.split("/")[1]][0] not in FAMILIES])
def test_other_families_experts_start_as_wide_as_theirs(name):
    torch.manual_seed(0)
    for std in (0.02, 0.1):
        for layer in layers(zoo.create_model(name, initializer_range=std)):
            for weight in (layer.experts.w_in, layer.experts.w_out):
                assert abs(weight.std() - std) < 5 * std / weight.numel() ** 0.5
        twin = dense_twin(name, initializer_range=std)
        for mlp in (module for module in twin.modules() if isinstance(module, MLP)):
            for weight in (linear.weight for linear in mlp.children()):
                assert abs(weight.std() - std) < 5 * std / weight.numel() ** 0.5


@pytest.mark.parametrize("option", [{"attention": "MoH"}, {"mixture_of_depths": {}}, {"shortcut": True}])
def test_what_other_families_do_not_take_is_named(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))}: not for gpt_oss; expected a model of mixtral"):
        zoo.create_model("language/gpt_oss_tiny", **option)


@pytest.mark.parametrize("option", [{"attention": "MoH"}, {"mixture_of_depths": {}}])
def test_complex_rotary_positions_are_not_for_other_attention(option):
    with pytest.raises(ValueError, match="not for deepseek_v2, whose rotary positions are complex numbers"):
        zoo.create_model("language/deepseek_v2_tiny", **option)


@pytest.mark.parametrize("name", ["glm4_moe_tiny", "gpt_oss_tiny"])
def test_a_list_of_gates_is_for_the_first_layers_and_its_last_for_the_rest(name):
    router = [{"name": "TopKRouter", "k": 1}, {"name": "TopKRouter", "k": 3}]
    model = zoo.create_model(f"language/{name}", router=router, vocab_size=64)
    assert [m.router.k for m in layers(model)] == [1, *[3] * (len(layers(model)) - 1)]
    assert model(batch(model)).logits.isfinite().all()


def test_a_twin_of_a_model_follows_its_gate_and_its_overrides():
    model = zoo.create_model("language/olmoe_tiny", router={"name": "TopKRouter", "k": 3}, num_hidden_layers=2)
    twin = dense_twin(model.to(torch.bfloat16), num_hidden_layers=3)
    assert len(twin.model.layers) == 3
    assert twin.model.layers[0].mlp.up_proj.weight.shape == (3 * 128, 128)
    assert {p.dtype for p in twin.parameters()} == {torch.bfloat16}
    assert model.config.num_hidden_layers == 2
    # What concerns experts alone may be shared between both calls.
    dense_twin("language/olmoe_tiny", losses={"switch": 0.01}, router="TopKRouter", backend="reference", capacity=1.0)


def test_one_seed_gives_one_model():
    made = []
    for _ in range(2):
        torch.manual_seed(7)
        made.append(zoo.create_model("language/qwen2_moe_tiny").state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_overrides_change_the_configuration_under_either_of_its_names():
    model = zoo.create_model("language/deepseek_v3_tiny", num_local_experts=8, hidden_size=64, backend="reference")
    assert model.config.n_routed_experts == 8
    assert {m.experts.num_experts for m in layers(model)} == {8}
    assert {m.experts.backend for m in layers(model)} == {"reference"}
    assert {m.router.dim for m in layers(model)} == {64}


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype_holds_for_weights_but_not_for_what_must_stay_exact(dtype):
    model = zoo.create_model("language/deepseek_v3_tiny", dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers()} == {torch.float32}
    assert model.config.dtype == torch.bfloat16
    assert model(batch(model)).logits.isfinite().all()


def test_dense_layers_stay_where_the_configuration_puts_them():
    model = zoo.create_model("language/deepseek_v3_tiny", first_k_dense_replace=2)
    assert [isinstance(layer.mlp, MoE) for layer in model.model.layers] == [False, False, True, True]
    model = zoo.create_model("language/qwen3_moe_tiny", decoder_sparse_step=2)
    assert [isinstance(layer.mlp, MoE) for layer in model.model.layers] == [False, True, False, True]


def test_tied_embeddings_are_one_tensor():
    model = zoo.create_model("language/mixtral_tiny", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("act", ["gelu", "relu", "gelu_pytorch_tanh"])
def test_other_activations_reach_the_experts(act):
    from transformers.activations import ACT2FN

    model = zoo.create_model("language/mixtral_tiny", hidden_act=act, num_hidden_layers=1)
    x, experts = torch.randn(5, 128), layers(model)[0].experts
    routing = layers(model)[0].router(x)
    expected = torch.zeros(5, 128)
    for token, expert, weight in zip(routing.token_index, routing.expert_index, routing.weight):
        gate, up = (experts.gate_up_proj[expert] @ x[token]).chunk(2)
        expected[token] += weight * (experts.down_proj[expert] @ (ACT2FN[act](gate) * up))
    torch.testing.assert_close(layers(model)[0](x[None])[0], expected)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("language/mixtral_tny", {}, "did you mean language/mixtral_tiny"),
        ("langage/mixtral_tiny", {}, "did you mean language/mixtral_tiny"),
        ("mixtral_tiny", {}, "did you mean language/mixtral_tiny"),
        ("zzz", {}, "known: language/"),
        ("language/mixtral_tiny", {"hidden_sise": 8}, "override of mixtral 'hidden_sise'; did you mean hidden_size"),
        ("language/mixtral_tiny", {"lossess": {}}, "did you mean losses"),
        ("language/mixtral_tiny", {"hidden_act": "quick_gelu"}, "'quick_gelu'; did you mean"),
        ("language/mixtral_tiny", {"dtype": "bfloat61"}, "did you mean bfloat16"),
    ],
)
def test_a_wrong_name_lists_the_nearest(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        zoo.create_model(name, **overrides)


def test_listing_models_imports_nothing_heavy():
    import subprocess
    import sys

    program = "import sys, zoo; zoo.list_models(); assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
