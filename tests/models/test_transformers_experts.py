"""The experts interface of transformers on our kernels: every family, against transformers' own eager experts."""

from __future__ import annotations

import copy
import importlib
import inspect
import re
import subprocess
import sys

import pytest
import torch
from tiny_families import experts_classes, tiny_model
from torch import nn
from torch.nn.utils import parametrize
from transformers import GptOssConfig, MixtralConfig, MixtralForCausalLM, NemotronHConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import zoo
from zoo.models import transformers_experts
from zoo.models.transformers_experts import activation_of, experts_forward

FAMILIES = list(experts_classes())


def run(model: nn.Module, implementation: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits (or the last hidden states of a model without a head) and every parameter's gradient."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    torch.manual_seed(1)
    tokens = torch.randint(0, 64, (2, 9))
    takes = inspect.signature(model.forward).parameters
    # The talker of Qwen3-Omni has no token embedding of its own.
    talker = "Talker" in type(model).__name__
    inputs = {"inputs_embeds": torch.randn(2, 9, 32)} if talker else {"input_ids": tokens}
    out = model(**inputs, **({"use_cache": False} if "use_cache" in takes or "kwargs" in takes else {}))
    result = out.logits if getattr(out, "logits", None) is not None else out.last_hidden_state
    weight = torch.randn(result.shape, generator=torch.Generator().manual_seed(2))
    (result * weight).sum().backward()
    return result.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-12)).item()


def documented_as_unsupported() -> set[str]:
    line = next(p for p in transformers_experts.__doc__.split("\n\n") if p.startswith("Not supported"))
    return {
        word.strip(" .\n")
        for entry in re.sub(r"\(.*?\)", "", line.split(":", 1)[1], flags=re.DOTALL).split(";")
        for word in entry.split(",")
    }


@pytest.mark.parametrize(("family", "module", "experts"), FAMILIES, ids=[name for _, _, name in FAMILIES])
def test_every_family_equals_eager_or_says_why_not(family, module, experts):
    torch.manual_seed(0)
    model = tiny_model(family, module, experts).train()
    theirs, their_grads = run(model, "eager")
    if family in documented_as_unsupported():
        with pytest.raises(ValueError, match=rf"{experts} with experts_implementation='zoo'"):
            run(model, "zoo")
        return
    ours, our_grads = run(model, "zoo")
    assert torch.isfinite(theirs).all()
    assert error(ours, theirs) < 1e-5
    assert our_grads.keys() == their_grads.keys()
    for name, grad in our_grads.items():
        assert error(grad, their_grads[name]) < 1e-4 or (grad - their_grads[name]).abs().max() < 1e-6, name


def test_the_sweep_finds_the_families_the_interface_is_known_for():
    assert {"mixtral", "gpt_oss", "nemotron_h", "deepseek_v3", "qwen3_vl_moe", "jamba"} <= {f for f, _, _ in FAMILIES}
    assert len(FAMILIES) >= 50


def mixtral_experts(**config) -> MixtralExperts:
    experts = MixtralExperts(MixtralConfig(hidden_size=8, intermediate_size=6, num_local_experts=4, **config))
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    return experts


def test_an_expert_id_beyond_the_last_means_no_expert():
    experts = mixtral_experts()
    x, weight = torch.randn(7, 8, requires_grad=True), torch.rand(7, 2)
    index = torch.randint(0, 5, (7, 2))
    weight = weight.masked_fill(index == 4, 0.0).requires_grad_()
    experts.config._experts_implementation = "eager"
    theirs = experts(x, index.clamp(max=3), weight)
    grads = list(torch.autograd.grad(theirs.sum(), (x, weight, *experts.parameters())))
    grads[1] = grads[1].masked_fill(index == 4, 0.0)
    for experts._is_expert_parallel in (False, True):
        ours = experts_forward(experts, x, index, weight)
        torch.testing.assert_close(ours, theirs)
        for a, b in zip(torch.autograd.grad(ours.sum(), (x, weight, *experts.parameters())), grads):
            torch.testing.assert_close(a, b)


def test_an_experts_module_that_does_not_say_whether_it_is_spread_runs(monkeypatch):
    # As in transformers 5.17.
    experts = mixtral_experts()
    x, index, weight = torch.randn(7, 8), torch.randint(0, 4, (7, 2)), torch.rand(7, 2)
    expected = experts_forward(experts, x, index, weight)
    for holder in (experts, type(experts)):
        if "_is_expert_parallel" in vars(holder):
            monkeypatch.delattr(holder, "_is_expert_parallel")
    assert not hasattr(experts, "_is_expert_parallel")
    torch.testing.assert_close(experts_forward(experts, x, index, weight), expected)


def test_no_tokens_give_no_output():
    empty = experts_forward(
        mixtral_experts(), torch.zeros(0, 8), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2)
    )
    assert empty.shape == (0, 8)


@pytest.mark.parametrize(
    ("act", "name"), [("silu", "swiglu"), ("gelu", "geglu"), ("gelu_pytorch_tanh", "geglu_tanh"), ("relu", "reglu")]
)
def test_the_activation_is_found_by_what_it_computes(act, name):
    assert activation_of(mixtral_experts(hidden_act=act)) == name


@pytest.mark.parametrize("act", ["quick_gelu", "tanh", "relu2", "laplace"])
def test_an_activation_without_a_kernel_raises(act):
    with pytest.raises(ValueError, match="is none of swiglu"):
        activation_of(mixtral_experts(hidden_act=act))


def test_plain_experts_are_found_too():
    config = NemotronHConfig(hidden_size=8, moe_intermediate_size=6, n_routed_experts=4, mlp_hidden_act="relu2")
    assert activation_of(NemotronHExperts(config)) == "relu2"


def gpt_oss_experts() -> GptOssExperts:
    experts = GptOssExperts(GptOssConfig(hidden_size=8, intermediate_size=6, num_local_experts=4, head_dim=4))
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=2.0)
    return experts


@pytest.mark.parametrize("limit", [0.3, 5.0, 7.5, 1e6])
def test_another_limit_is_found_and_computed(limit):
    experts = gpt_oss_experts()
    assert activation_of(experts) == "swiglu_clamped"
    x, index, weight = torch.randn(7, 8), torch.randint(0, 4, (7, 2)), torch.rand(7, 2)
    before = experts_forward(experts, x, index, weight)
    experts.limit = limit
    assert activation_of(experts) == f"swiglu_clamped:{limit}"
    experts.config._experts_implementation = "eager"
    ours = experts_forward(experts, x, index, weight)
    torch.testing.assert_close(ours, experts(x, index, weight), rtol=1e-4, atol=1e-4)
    assert limit > 7 or not torch.allclose(ours, before, rtol=1e-2)


def test_another_slope_than_ours_is_refused_and_never_computed():
    experts = gpt_oss_experts()
    experts.alpha = 1.5
    with pytest.raises(ValueError, match=r"limit=7\.0, alpha=1\.5|alpha=1\.5, limit=7\.0"):
        activation_of(experts)


def test_a_layout_flag_that_does_not_fit_the_gate_is_refused():
    experts = mixtral_experts()
    experts.is_concatenated = False
    with pytest.raises(ValueError, match="is none of"):
        activation_of(experts)


def test_unknown_parameters_and_quantised_weights_are_refused():
    experts = mixtral_experts()
    experts.slope = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="slope"):
        activation_of(experts)
    experts = mixtral_experts().requires_grad_(False).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="float8"):
        experts_forward(experts, torch.zeros(1, 8), torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2))


class LowRank(nn.Module):
    """What peft's LoRA makes of the weights of stacked experts."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(weight.shape[0], 2, weight.shape[2]))
        self.b = nn.Parameter(torch.randn(weight.shape[0], weight.shape[1], 2))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.b @ self.a


def test_parametrized_weights_are_what_their_parametrizations_make_of_them():
    experts = mixtral_experts()
    for name in ("gate_up_proj", "down_proj"):
        parametrize.register_parametrization(experts, name, LowRank(getattr(experts, name)))
    experts.double()  # gradients of a product's factors are sums that may cancel
    x, index, weight = torch.randn(7, 8).double(), torch.randint(0, 4, (7, 2)), torch.rand(7, 2).double()
    experts.config._experts_implementation = "eager"
    theirs = experts(x, index, weight)
    ours = experts_forward(experts, x, index, weight)
    torch.testing.assert_close(ours, theirs)
    parameters = list(experts.parameters())
    assert len(parameters) == 6
    for a, b in zip(torch.autograd.grad(ours.sum(), parameters), torch.autograd.grad(theirs.sum(), parameters)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("called_before", [True, False])
def test_a_compiled_model_has_one_graph_and_the_same_logits(called_before):
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=4,
    )
    model = MixtralForCausalLM._from_config(config, experts_implementation="zoo")
    tokens = torch.randint(0, 64, (2, 9))
    if called_before:
        model(tokens)
    # torch 2.11 can only split the graph of a model that was not called before.
    one_graph = called_before or torch.__version__ >= (2, 12)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=one_graph)
    torch.testing.assert_close(compiled(tokens, use_cache=False).logits, model(tokens).logits)


def test_importing_zoo_before_transformers_is_enough():
    program = """
import sys, zoo
assert not {"torch", "transformers"} & set(sys.modules)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
assert "zoo" in ALL_EXPERTS_FUNCTIONS.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_importing_zoo_after_transformers_is_enough():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    del ALL_EXPERTS_FUNCTIONS._global_mapping["zoo"]
    importlib.reload(zoo)
    assert ALL_EXPERTS_FUNCTIONS["zoo"] is experts_forward
