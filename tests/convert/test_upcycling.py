"""Sparse upcycling: the dense model's function, in experts."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import timm
import torch
import transformers
from converted_cases import error, experts_of, output
from timm.layers import GluMlp
from torch import nn

import zoo
from zoo.convert import upcycle_optimizer
from zoo.convert.dense_mlps import recognise
from zoo.moe import Capacity, MoE
from zoo.moe.routers import ExpertChoiceRouter

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "bos_token_id": 1, "eos_token_id": 2}
OPT = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
T5 = {"vocab_size": 64, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8}
# transformers' configuration and model, what its MLP is, and the activation the experts must get.
LANGUAGE = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**SIZES, **HEADS}, "swiglu"),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**SIZES, **HEADS}, "swiglu"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**SIZES, **HEADS, "head_dim": 8}, "swiglu"),
    "phi3 (one matrix)": ("Phi3Config", "Phi3ForCausalLM", {**SIZES, **HEADS}, "swiglu"),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**SIZES, **HEADS, "head_dim": 8}, "geglu_tanh"),
    "nemotron": ("NemotronConfig", "NemotronForCausalLM", {**SIZES, **HEADS}, "relu2"),
    "phi": ("PhiConfig", "PhiForCausalLM", {**SIZES, **HEADS}, "gelu_tanh"),
    "gpt2 (transposed)": ("GPT2Config", "GPT2LMHeadModel", GPT2, "gelu_tanh"),
    "opt (inside the layer)": ("OPTConfig", "OPTForCausalLM", {**OPT, "word_embed_proj_dim": 32}, "relu"),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {**GPT2, "rotary_dim": 4}, "gelu_tanh"),
    "bert (in two modules)": ("BertConfig", "BertForMaskedLM", {**SIZES, "num_attention_heads": 4}, "gelu"),
    "roberta": ("RobertaConfig", "RobertaForCausalLM", {**SIZES, "num_attention_heads": 4, "is_decoder": True}, "gelu"),
    "t5": ("T5Config", "T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}, "geglu_tanh"),
}
VISION = {
    "vit_tiny_patch16_224": ({"img_size": 48, "depth": 3, "embed_dim": 48}, "gelu"),
    "swin_tiny_patch4_window7_224": (
        {"img_size": 48, "window_size": 3, "embed_dim": 24, "depths": (2, 2, 2, 2)},
        "gelu",
    ),
    "vit_base_patch32_clip_quickgelu_224": (
        {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 4},
        "quick_gelu",
    ),
    "convnext_tiny": ({"dims": (16, 24, 32, 40), "depths": (2, 1, 1, 1)}, "gelu"),
    "eva02_tiny_patch14_224": ({"img_size": 28, "depth": 3, "embed_dim": 48}, "swiglu"),
    "vit_giant_patch14_dinov2": (
        {"img_size": 28, "depth": 3, "embed_dim": 48, "num_heads": 4, "mlp_ratio": 4},
        "swiglu",
    ),
}


def language(name: str) -> nn.Module:
    config, model, sizes, _ = LANGUAGE[name]
    return getattr(transformers, model)(getattr(transformers, config)(**sizes)).eval()


def vit(**options) -> nn.Module:
    sizes = {"img_size": 32, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **options}).eval()


@pytest.mark.filterwarnings("ignore:upcycle. dropout of only some units")
@pytest.mark.parametrize("name", LANGUAGE)
def test_an_upcycled_language_model_gives_the_dense_outputs(name):
    dense, ids = language(name), torch.randint(3, 64, (2, 9))
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # biases and norms too: nothing may be lost
    expected = output(dense, ids)
    sparse = zoo.upcycle(dense, layers="all", num_experts=4, k=3)
    assert {moe.experts.activation for moe in experts_of(sparse)} == {LANGUAGE[name][3]}
    assert len(experts_of(sparse)) == (4 if name == "t5" else 3)
    assert error(output(sparse, ids), expected) < 2e-6
    assert torch.equal(output(dense, ids), expected)
    assert not experts_of(dense)


@pytest.mark.parametrize("name", VISION)
def test_an_upcycled_timm_model_gives_the_dense_outputs(name):
    options, activation = VISION[name]
    dense = timm.create_model(name, num_classes=7, **options).eval()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    x = torch.randn(2, 3, options.get("img_size", 48), options.get("img_size", 48))
    sparse = zoo.upcycle(dense, layers="every-2", num_experts=3)
    assert {moe.experts.activation for moe in experts_of(sparse)} == {activation}
    assert error(output(sparse, x), output(dense, x)) < 5e-6


@pytest.mark.parametrize("gate_last", [True, False])
def test_gate_and_up_in_one_matrix_may_come_in_either_order(gate_last):
    dense = vit(depth=1, mlp_layer=functools.partial(GluMlp, act_layer=nn.SiLU, gate_last=gate_last))
    x = torch.randn(2, 3, 32, 32)
    assert error(output(zoo.upcycle(dense, layers="all", num_experts=2), x), output(dense, x)) < 2e-6


def test_our_own_dense_twin_can_be_upcycled():
    dense = zoo.create_model("language/mixtral_tiny", dense=True, num_hidden_layers=2).eval()
    sparse, ids = zoo.upcycle(dense, layers="all", num_experts=4), torch.randint(0, 200, (2, 9))
    assert error(sparse(ids).logits.detach(), dense(ids).logits.detach()) < 2e-6


def test_an_upcycled_decoder_generates_pickles_and_trains_under_checkpointing():
    dense = language("llama")
    sparse = zoo.upcycle(dense, layers="all", num_experts=4)
    ids = torch.randint(3, 64, (2, 5))
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(sparse.generate(ids, **options), dense.generate(ids, **options))
    again = pickle.loads(pickle.dumps(sparse))
    assert torch.equal(output(again, ids), output(sparse, ids))
    sparse.train().gradient_checkpointing_enable()
    sparse(ids, labels=ids).loss.backward()
    assert all(moe.experts.down_proj.grad.abs().sum() > 0 for moe in experts_of(sparse))
    assert all(moe.router.weight.grad.abs().sum() > 0 for moe in experts_of(sparse))


def test_one_expert_is_the_dense_model():
    dense, x = vit(depth=2), torch.randn(1, 3, 32, 32)
    sparse = zoo.upcycle(dense, layers=1, num_experts=1)
    assert sparse.blocks[1].mlp.router.k == 1
    assert error(output(sparse, x), output(dense, x)) < 2e-6


def test_the_chosen_layers_and_no_others_become_sparse():
    sparse = zoo.upcycle(vit(depth=6), layers="last-2", num_experts=2)
    assert [i for i, block in enumerate(sparse.blocks) if isinstance(block.mlp, MoE)] == [3, 5]


def test_a_pooling_heads_mlp_is_no_block():
    dense = timm.create_model("vit_base_patch16_siglip_224", img_size=32, embed_dim=48, depth=2, num_heads=4)
    sparse = zoo.upcycle(dense, layers="all", num_experts=2)
    assert [name for name, m in sparse.named_modules() if isinstance(m, MoE)] == ["blocks.0.mlp", "blocks.1.mlp"]


@pytest.mark.filterwarnings("ignore:upcycle. dropout of only some units")
def test_within_counts_the_layers_of_one_part_of_the_model():
    dense = language("t5")
    sparse = zoo.upcycle(dense, layers=[-1], num_experts=2, within="decoder")
    assert [n for n, m in sparse.named_modules() if isinstance(m, MoE)] == ["decoder.block.1.layer.2.DenseReluDense"]
    with pytest.raises(ValueError, match="no blocks with an MLP of known linear layers under 'decoder_'"):
        zoo.upcycle(dense, within="decoder_")


def test_weights_that_are_not_normalised_shrink_what_the_mlp_adds():
    dense = vit(depth=1)
    sparse = zoo.upcycle(dense, layers="all", num_experts=4, k=1, normalize=False, router_std=0.0)
    x = torch.randn(2, 5, dense.embed_dim)
    with torch.no_grad():
        assert error(sparse.blocks[0].mlp(x), dense.blocks[0].mlp(x) / 4) < 1e-6


def test_expert_choice_renormalises_and_leaves_unchosen_tokens_to_the_residual():
    dense = vit(depth=1)
    sparse = zoo.upcycle(dense, layers="all", num_experts=4, router="ExpertChoiceRouter", capacity=1)
    moe, x = sparse.blocks[0].mlp, torch.randn(1, 40, dense.embed_dim)
    assert isinstance(moe.router, ExpertChoiceRouter)
    with torch.no_grad(), zoo.moe.record(sparse) as step:
        y = moe(x)[0]
        chosen = step.routings["blocks.0.mlp"][0].dense().sum(-1) > 0
        expected = dense.blocks[0].mlp(x)[0] * chosen[:, None]
    assert 0 < chosen.sum() < 40
    assert error(y, expected) < 1e-5


def test_expert_choice_with_room_for_all_gives_the_dense_outputs():
    dense, x = vit(), torch.randn(2, 3, 32, 32)
    sparse = zoo.upcycle(dense, num_experts=4, router="ExpertChoiceRouter", capacity=Capacity(4.0))
    assert error(output(sparse, x), output(dense, x)) < 2e-6


def test_noise_has_the_asked_share_of_the_weights_spread():
    dense = vit(depth=1, embed_dim=192)
    torch.manual_seed(0)
    moe = zoo.upcycle(dense, layers="all", num_experts=4, noise=0.1).blocks[0].mlp
    weight = dense.blocks[0].mlp.fc1.weight
    added = (moe.experts.up_proj - weight).detach()
    assert added.std() == pytest.approx(0.1 * float(weight.detach().std()), rel=0.02)
    assert not torch.equal(added[0], added[1])


def test_the_router_starts_with_the_asked_spread():
    moe = zoo.upcycle(vit(depth=1), layers="all", num_experts=64, router_std=0.5).blocks[0].mlp
    assert float(moe.router.weight.detach().std()) == pytest.approx(0.5, rel=0.05)


@pytest.mark.filterwarnings("ignore:upcycle. dropout of only some units")
@pytest.mark.parametrize("name", ["llama", "gpt2 (transposed)"])
def test_granular_experts_are_chosen_together_and_give_the_dense_outputs(name):
    dense, ids = language(name), torch.randint(3, 64, (2, 9))
    sparse = zoo.upcycle(dense, layers="all", num_experts=3, k=2, granularity=4)
    moe = experts_of(sparse)[0]
    assert moe.router.num_experts == 12
    assert moe.experts.hidden_dim == 12
    assert error(output(sparse, ids), output(dense, ids)) < 5e-6


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="192 hidden units, which granularity=5 does not cut"):
        zoo.upcycle(vit(depth=1), layers="all", num_experts=2, granularity=5)


def test_dtype_mode_and_frozen_weights_carry_over():
    dense = vit(depth=2).to(torch.bfloat16).train()
    dense.blocks[0].mlp.requires_grad_(False)
    sparse = zoo.upcycle(dense, layers="all", num_experts=2)
    first, second = experts_of(sparse)
    assert {p.dtype for p in sparse.parameters()} == {torch.bfloat16}
    assert first.training
    assert second.experts.up_proj.requires_grad
    assert not first.experts.up_proj.requires_grad
    assert first.router.weight.requires_grad


def test_a_model_on_the_meta_device_takes_no_memory():
    with torch.device("meta"):
        dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=2))
    sparse = zoo.upcycle(dense, layers="all", num_experts=64)
    assert all(parameter.is_meta for parameter in sparse.parameters())
    assert experts_of(sparse)[0].experts.down_proj.shape == (64, 4096, 11008)


def test_checking_an_mlp_leaves_the_users_random_state_and_mode_alone():
    mlp = vit(depth=1).blocks[0].mlp.train()
    before = torch.get_rng_state()
    recognise("mlp", mlp).check()
    assert torch.equal(before, torch.get_rng_state())
    assert mlp.training
    assert mlp.act.training


def test_an_activation_the_experts_do_not_have_is_refused_by_name():
    with pytest.raises(ValueError, match=r"blocks.1.mlp has the activation Mish, .* they have relu, .*gelu"):
        zoo.upcycle(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, act_layer="mish"))


def test_a_norm_inside_the_mlp_is_refused_by_name():
    with pytest.raises(ValueError, match=r"blocks.1.mlp has a LayerNorm \(norm\); experts have none"):
        zoo.upcycle(vit(scale_mlp_norm=True))


def test_an_mlp_that_computes_something_else_is_refused():
    dense = vit(depth=2)
    dense.blocks[1].mlp.register_forward_hook(lambda module, args, y: 2 * y)
    with pytest.raises(ValueError, match=r"blocks.1.mlp \(Mlp\) computes something else than its layers fc1, fc2"):
        zoo.upcycle(dense)


def test_an_mlp_that_takes_more_than_tokens_is_refused():
    config = transformers.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=64)
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn takes more than tokens: .*'residual'"):
        zoo.upcycle(transformers.MptForCausalLM(config))


def test_a_model_without_mlps_and_one_that_is_sparse_already_are_refused():
    with pytest.raises(ValueError, match="ResNet has no blocks with an MLP"):
        zoo.upcycle(timm.create_model("resnet10t"))
    once = zoo.upcycle(vit(depth=2), layers=[0], num_experts=2)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp is a mixture of experts already"):
        zoo.upcycle(once, layers="all")
    assert len(experts_of(zoo.upcycle(once, layers=[1], num_experts=2))) == 2


def test_dropout_of_hidden_units_and_outputs_carries_over():
    dense = vit(proj_drop_rate=0.25, depth=1)
    sparse = zoo.upcycle(dense, layers="all", num_experts=2)
    assert experts_of(sparse)[0].experts.dropout == 0.25
    x = torch.randn(2, 3, 32, 32)
    assert error(output(sparse.eval(), x), output(dense.eval(), x)) < 2e-6


def test_dropout_of_only_some_units_is_left_out_with_a_warning():
    with pytest.warns(UserWarning, match=r"dropout of only some units inside the MLPs \(0.1\) is left out"):
        sparse = zoo.upcycle(language("gpt2 (transposed)"))
    assert experts_of(sparse)[0].experts.dropout == 0


def test_padding_neither_takes_capacity_nor_counts_in_losses():
    capacity = {"factor": 1.0, "drop": "choice"}
    sparse = zoo.upcycle(language("llama"), layers="all", num_experts=4, capacity=capacity, losses={"switch": 0.01})
    ids = torch.randint(3, 64, (1, 8))
    padded = torch.cat([torch.full((1, 8), 0), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 8), torch.ones(1, 8)], dim=1).long()
    sparse.train()
    with zoo.moe.record(sparse) as step:
        sparse(padded, attention_mask=mask)
    for (routing,) in step.routings.values():
        assert set(routing.token_index.tolist()) <= set(range(8, 16))


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        model(torch.randn(2, 3, 32, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)])
def test_optimizer_state_is_copied_and_tiled_over_the_experts(kind):
    dense = vit(depth=2).train()
    old = kind(dense.parameters())
    trained(dense, old)
    sparse = zoo.upcycle(dense, layers=[1], num_experts=3)
    groups = [{"params": [p for p in sparse.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    new = kind([*groups, {"params": [p for p in sparse.parameters() if p.dim() >= 2]}])
    upcycle_optimizer(old, dense, new, sparse)
    experts, mlp = sparse.blocks[1].mlp.experts, dense.blocks[1].mlp
    pairs = [(experts.up_proj, mlp.fc1.weight), (experts.down_proj_bias, mlp.fc2.bias)]
    for stacked, single in pairs:
        assert set(new.state[stacked]) == set(old.state[single])
        for key, value in old.state[single].items():
            found = new.state[stacked][key]
            tiled = isinstance(value, torch.Tensor) and value.dim()
            assert torch.equal(found, value.expand(3, *value.shape) if tiled else value)
    for key, value in old.state[dense.head.weight].items():
        assert torch.equal(new.state[sparse.head.weight][key], value)
        assert new.state[sparse.head.weight][key] is not value
    assert sparse.blocks[1].mlp.router.weight not in new.state
    trained(sparse, new)


def test_with_its_state_the_first_step_of_kept_weights_is_the_dense_models():
    dense = vit(depth=2)
    old = torch.optim.Adam(dense.parameters(), lr=1e-3)
    trained(dense, old)
    sparse = zoo.upcycle(dense, layers=[1], num_experts=2)
    new = torch.optim.Adam(sparse.parameters(), lr=1e-3)
    upcycle_optimizer(old, dense, new, sparse)
    x = torch.randn(2, 3, 32, 32)
    start = copy.deepcopy(dense.head.weight.detach())
    for model, optimizer in ((dense, old), (sparse, new)):
        model(x).square().mean().backward()
        optimizer.step()
    assert error(sparse.head.weight.detach() - start, dense.head.weight.detach() - start) < 1e-4


@pytest.mark.parametrize("name", ["opt (inside the layer)", "bert (in two modules)", "gptj", "phi3 (one matrix)"])
def test_optimizer_state_finds_mlps_of_every_layout(name):
    dense = language(name)
    old = torch.optim.Adam(dense.parameters())
    dense(torch.randint(3, 64, (2, 5))).logits.square().mean().backward()
    old.step()
    sparse = zoo.upcycle(dense, layers=[0], num_experts=2, granularity=2)
    new = torch.optim.Adam(sparse.parameters())
    upcycle_optimizer(old, dense, new, sparse)
    experts = experts_of(sparse)[0].experts
    ends = ("layers.0.fc2.weight", "layer.0.output.dense.weight", "0.mlp.fc_out.weight", "0.mlp.down_proj.weight")
    down = [p for n, p in dense.named_parameters() if n.endswith(ends)]
    moment = old.state[down[0]]["exp_avg"]
    assert torch.equal(new.state[experts.down_proj]["exp_avg"], torch.stack([moment[:, :24], moment[:, 24:]] * 2))


def test_optimizers_of_other_models_are_refused():
    dense, other = vit(depth=2), vit(depth=2, embed_dim=96)
    old = torch.optim.Adam(dense.parameters())
    trained(dense, old)
    sparse = zoo.upcycle(other, layers=[1], num_experts=2)
    with pytest.raises(ValueError, match="has another shape in the upcycled model"):
        upcycle_optimizer(old, dense, torch.optim.Adam(sparse.parameters()), sparse)


def test_timms_pretrained_weights_go_through_offline(tmp_path):
    source = vit(depth=2)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "custom_load": False, "num_classes": 7}
    dense = vit(depth=2, pretrained=True, pretrained_cfg_overlay=overlay)
    x = torch.randn(1, 3, 32, 32)
    assert error(output(zoo.upcycle(dense, num_experts=4), x), output(source, x)) < 2e-6


@pytest.mark.parametrize(
    ("name", "layers", "options", "relative"),
    [
        ("llama", "all", {}, "MixtralForCausalLM"),
        ("mistral", "all", {"k": 1}, "MixtralForCausalLM"),
        ("qwen3", [2], {}, "Qwen3MoeForCausalLM"),
        ("qwen3", "all", {"normalize": False, "k": 3}, "Qwen3MoeForCausalLM"),
    ],
)
def test_an_upcycled_model_is_saved_in_its_sparse_relatives_layout(name, layers, options, relative, tmp_path):
    dense = language(name)
    if name == "mistral":
        dense.config.sliding_window = 4  # shorter than the sequence
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    sparse = zoo.upcycle(dense, layers=layers, num_experts=4, noise=0.5, router_std=0.5, **options)
    expected, ids = output(sparse, ids := torch.randint(3, 64, (2, 9))), ids
    zoo.save_pretrained(sparse, tmp_path / "saved")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert type(theirs).__name__ == relative
    assert error(output(theirs, ids), expected) < 2e-5
    assert error(output(zoo.from_pretrained(tmp_path / "saved"), ids), expected) < 2e-5


@pytest.mark.filterwarnings("ignore:upcycle. dropout of only some units")
@pytest.mark.parametrize(
    ("name", "sizes", "layers", "options", "error", "message"),
    [
        ("llama", {}, [1], {}, ValueError, r"every layer must have experts, \[0, 2\] have none; give layers=\"all\""),
        (
            "llama",
            {},
            "all",
            {"normalize": False},
            ValueError,
            "normalize=False cannot be expressed in the Mixtral layout",
        ),
        ("llama", {}, "all", {"granularity": 2}, ValueError, "scale=2.0 cannot be expressed"),
        ("llama", {}, "all", {"router": "ExpertChoiceRouter"}, ValueError, "ExpertChoiceRouter cannot be expressed"),
        ("llama", {"attention_bias": True}, "all", {}, ValueError, r"self_attn.k_proj.bias \(16,\)/missing there"),
        ("gpt2 (transposed)", {}, "all", {}, TypeError, "GPT2LMHeadModel has no published layout"),
    ],
)
def test_what_no_layout_expresses_is_refused_and_not_written(name, sizes, layers, options, error, message, tmp_path):
    config, model, own, _ = LANGUAGE[name]
    dense = getattr(transformers, model)(getattr(transformers, config)(**{**own, **sizes}))
    sparse = zoo.upcycle(dense, layers=layers, num_experts=4, **options)
    for save in (zoo.save_pretrained, lambda model, folder: model.save_pretrained(folder)):
        with pytest.raises(error, match=message):
            save(sparse, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("name", ["vit_relpos_small_patch16_224", "swinv2_cr_tiny_224"])
def test_networks_of_positions_inside_attention_are_no_mlps_of_blocks(name):
    sizes = {"depth": 2, "embed_dim": 48, "num_heads": 4, "img_size": 32}
    small = {"depths": (1, 1), "embed_dim": 24, "num_heads": (2, 4), "img_size": 64}
    model = timm.create_model(name, num_classes=5, **(small if "swin" in name else sizes)).eval()
    x = torch.randn(2, 3, *([64] * 2 if "swin" in name else [32] * 2))
    sparse = zoo.upcycle(model, layers="all", num_experts=3)
    assert sum(isinstance(module, MoE) for module in sparse.modules()) == 2
    with torch.no_grad():
        assert torch.allclose(sparse(x), model(x), rtol=1e-4, atol=1e-6)


class ClampedMLP(torch.nn.Module):
    """As DeepSeek-V4's: gate and up are clamped before they meet."""

    def __init__(self, limit, told):
        super().__init__()
        self.gate_proj, self.up_proj = torch.nn.Linear(6, 10), torch.nn.Linear(6, 10)
        self.down_proj, self.act_fn, self.told = torch.nn.Linear(10, 6), torch.nn.functional.silu, limit
        if told:
            self.limit = limit

    def forward(self, x):
        gate, up = self.gate_proj(x).clamp(max=self.told), self.up_proj(x).clamp(-self.told, self.told)
        return self.down_proj(self.act_fn(gate) * up)


def test_the_clamps_of_an_mlp_are_those_of_its_experts():
    model = torch.nn.Sequential(*[torch.nn.ModuleDict({"mlp": ClampedMLP(7.0, True)}) for _ in range(2)])
    found = recognise("0.mlp", model[0]["mlp"])
    found.check()
    assert found.activation == "swiglu:7.0"
    sparse = zoo.upcycle(model, layers="all", num_experts=4, router={"name": "TopKRouter", "normalize": True})
    x = 50 * torch.randn(9, 6)
    with torch.no_grad():
        torch.testing.assert_close(sparse[0]["mlp"](x), model[0]["mlp"](x))


def test_clamps_that_an_mlp_does_not_tell_are_found_out():
    with pytest.raises(ValueError, match="computes something else than its layers gate_proj, up_proj, down_proj"):
        recognise("mlp", ClampedMLP(7.0, False)).check()
