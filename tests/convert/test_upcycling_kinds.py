"""Upcycling with residual experts, and with numbers of experts that differ by layer."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import transformers
from torch import nn

import zoo
from zoo.convert import upcycle_optimizer
from zoo.moe import MoE, ResidualExperts

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "bos_token_id": 1, "eos_token_id": 2}


def llama(kind: str = "Llama") -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(**SIZES, **HEADS)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def gpt2() -> nn.Module:
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, **drops)).eval()


def vit(**options) -> nn.Module:
    sizes = {"img_size": 32, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **options}).eval()


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(x)
    return getattr(found, "logits", found)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def moes(model: nn.Module) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


@pytest.mark.parametrize("make", [llama, gpt2, vit])
def test_residual_experts_start_as_the_dense_model(make):
    dense = make()
    x = torch.randn(2, 3, 32, 32) if make is vit else torch.randint(3, 64, (2, 9))
    sparse = zoo.upcycle(dense, layers="all", num_experts=3, residual=True)
    assert all(isinstance(moe.experts, ResidualExperts) for moe in moes(sparse))
    assert error(output(sparse, x), output(dense, x)) < 2e-6
    assert all(not p.any() for n, p in moes(sparse)[0].experts.named_parameters() if n.startswith("residual_"))


def test_noise_is_in_the_residuals_and_frozen_weights_stay_frozen():
    dense = vit(embed_dim=192).bfloat16()
    dense.blocks[0].mlp.requires_grad_(False)
    first, second = moes(zoo.upcycle(dense, layers=[0, 1], num_experts=4, residual=True, noise=0.1))
    assert torch.equal(second.experts.core_up_proj, dense.blocks[1].mlp.fc1.weight)
    spread = float(second.experts.residual_up_proj.detach().float().std())
    assert spread == pytest.approx(0.1 * float(dense.blocks[1].mlp.fc1.weight.detach().float().std()), rel=0.02)
    assert not any(p.requires_grad for p in first.experts.parameters())
    assert all(p.requires_grad and p.dtype == torch.bfloat16 for p in second.experts.parameters())


def test_optimizer_state_goes_to_the_core():
    dense = vit(depth=2)
    old = torch.optim.AdamW(dense.parameters())
    dense(torch.randn(2, 3, 32, 32)).square().mean().backward()
    old.step()
    sparse = zoo.upcycle(dense, layers=[1], num_experts=3, residual=True)
    new = torch.optim.AdamW(sparse.parameters())
    upcycle_optimizer(old, dense, new, sparse)
    experts, mlp = sparse.blocks[1].mlp.experts, dense.blocks[1].mlp
    assert torch.equal(new.state[experts.core_up_proj]["exp_avg"], old.state[mlp.fc1.weight]["exp_avg"])
    assert experts.residual_up_proj not in new.state


@torch.no_grad()
def stir(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(("kind", "layers"), [("Llama", "all"), ("Qwen3", [1])])
def test_residual_experts_are_saved_as_plain_ones(kind, layers, tmp_path):
    sparse = stir(zoo.upcycle(llama(kind), layers=layers, num_experts=3, residual=True))
    ids = torch.randint(3, 64, (2, 9))
    zoo.save_pretrained(sparse, tmp_path / "saved")
    for read in (transformers.AutoModelForCausalLM.from_pretrained, zoo.from_pretrained):
        assert error(output(read(tmp_path / "saved").eval(), ids), output(sparse, ids)) < 2e-5


def test_a_family_with_residual_experts_is_made_and_saved(tmp_path):
    model = stir(zoo.create_model("language/mixtral_tiny", experts="ResidualExperts", num_hidden_layers=2).eval())
    ids = torch.randint(3, 64, (2, 9))
    zoo.save_pretrained(model, tmp_path / "saved")
    assert error(output(zoo.from_pretrained(tmp_path / "saved"), ids), output(model, ids)) < 2e-5


def test_a_timm_model_with_residual_experts_reads_back_with_them(tmp_path):
    sparse, x = stir(zoo.upcycle(vit(), num_experts=[2, 4], residual=True)), torch.randn(2, 3, 32, 32)
    zoo.save_pretrained(sparse, tmp_path / "saved")
    again = zoo.from_pretrained(tmp_path / "saved")
    assert error(output(again, x), output(sparse, x)) < 2e-6
    assert [type(m.experts).__name__ for m in moes(again)] == ["ResidualExperts"] * 2


def test_residual_vision_models_are_made_by_name():
    model = zoo.create_model("vision/vmoe_tiny_test", num_classes=3, experts="ResidualExperts")
    x = torch.randn(2, 3, 32, 32)
    model(x).square().sum().backward()
    copy.deepcopy(model)(x)
    assert moes(model)[0].experts.residual_down_proj.grad is not None


def test_a_pyramid_has_more_experts_in_deeper_layers():
    dense, ids = llama(), torch.randint(3, 64, (2, 9))
    sparse = zoo.upcycle(dense, layers="all", num_experts=[2, 4, 8], noise=0.0)
    assert [moe.experts.num_experts for moe in moes(sparse)] == [2, 4, 8]
    assert [moe.router.weight.shape[0] for moe in moes(sparse)] == [2, 4, 8]
    assert error(output(sparse, ids), output(dense, ids)) < 2e-6
    assert {moe.router.k for moe in moes(zoo.upcycle(dense, layers=[0, 2], num_experts=(1, 4)))} == {1}


def test_a_pyramid_goes_to_folders_that_can_say_it(tmp_path):
    with pytest.raises(ValueError, match=r"all layers need the same experts and k, found \(E, F, k\) = \[\(2, 48, 2\)"):
        zoo.save_pretrained(zoo.upcycle(llama(), layers="all", num_experts=[2, 4, 4]), tmp_path / "llama")
    assert not (tmp_path / "llama").exists()
    sparse, x = stir(zoo.upcycle(vit(), num_experts=[2, 4])), torch.randn(2, 3, 32, 32)
    zoo.save_pretrained(sparse, tmp_path / "vit")
    assert error(output(zoo.from_pretrained(tmp_path / "vit"), x), output(sparse, x)) < 2e-6


def test_numbers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="num_experts has 3 numbers for 2 layers"):
        zoo.upcycle(vit(), num_experts=[2, 2, 2])
    for wrong in (0, [2, 0], []):
        with pytest.raises(ValueError, match="must be at least 1"):
            zoo.upcycle(vit(), num_experts=wrong)
    with pytest.raises(ValueError, match="k must be between 1 and num_experts=2, got 3"):
        zoo.upcycle(vit(), num_experts=[4, 2], k=3)
    with pytest.raises(ValueError, match="residual experts share a whole copy, which granularity=2 would cut"):
        zoo.upcycle(vit(), residual=True, granularity=2)
    with pytest.raises(ValueError, match=r"drops 0.25 of its units, which residual experts cannot"):
        zoo.upcycle(vit(proj_drop_rate=0.25), residual=True)
    with pytest.raises(ValueError, match=r"num_experts: expected one number, got \[2, 4\]; zoo.upcycle takes one a"):
        zoo.create_model("vision/vit_tiny_patch16_224", moe_layers="last-2", num_experts=[2, 4])
