"""WideNet: one attention, gate and set of experts for all blocks, norms of each block's own."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import timm
import torch
import transformers
from torch import nn

import zoo
from zoo.models import count_parameters
from zoo.moe import MoE
from zoo.parallel import Sizes, parallelize

LLAMA = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


def stir(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def vit(**options) -> nn.Module:
    sizes = {"img_size": 32, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7}
    return stir(timm.create_model("vit_tiny_patch16_224", **{**sizes, **options}).eval())


def widenet() -> nn.Module:
    options = {"num_classes": 3, "moe_layers": "all", "num_experts": 4, "depth": 3, "qk_norm": True}
    return stir(zoo.create_model("vision/vmoe_tiny_test", share_depth=True, **options).eval())


def by_depth(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a ViT gives whose block runs again and again, with other norms each time."""
    block = copy.deepcopy(model.blocks[0])
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    for own in model.blocks:
        block.norm1, block.norm2 = own.norm1, own.norm2
        if hasattr(own.attn.q_norm, "weight"):
            block.attn.q_norm, block.attn.k_norm = own.attn.q_norm, own.attn.k_norm
        x = block(x)
    return model.forward_head(model.norm(x))


def test_a_widenet_is_one_block_with_other_norms_each_time():
    images = torch.randn(2, 3, 32, 32)
    for model in (widenet(), zoo.share_depth(zoo.upcycle(vit(), layers="all", num_experts=3, noise=0.5))):
        moes = [module for module in model.modules() if isinstance(module, MoE)]
        assert len({id(moe) for moe in moes}) == 3
        assert len({id(moe.experts.down_proj) for moe in moes}) == len({id(moe.router.weight) for moe in moes}) == 1
        assert len({id(block.norm1.weight) for block in model.blocks}) == 3
        with torch.no_grad():
            assert torch.allclose(model(images), by_depth(model, images), rtol=1e-5, atol=1e-6)


def test_gradients_are_the_sum_over_depth():
    shared = widenet()
    apart, x = copy.deepcopy(shared), torch.randn(2, 3, 32, 32)
    for block in apart.blocks:
        for module in block.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.detach().clone()))
    shared(x).square().sum().backward()
    apart(x).square().sum().backward()
    summed = sum(block.mlp.experts.up_proj.grad for block in apart.blocks)
    assert torch.allclose(shared.blocks[2].mlp.experts.up_proj.grad, summed, rtol=1e-4, atol=1e-6 * summed.abs().max())
    optimizer = torch.optim.AdamW(shared.parameters())
    optimizer.step()
    assert shared.blocks[0].attn.qkv.weight is shared.blocks[2].attn.qkv.weight


def test_depth_costs_norms_alone():
    deep = zoo.create_model("vision/vmoe_tiny_test", depth=6, moe_layers="all", share_depth=True)
    flat = zoo.create_model("vision/vmoe_tiny_test", depth=1, moe_layers="all", share_depth=False)
    norms = 5 * 4 * 32
    assert [a - b for a, b in zip(count_parameters(deep), count_parameters(flat))] == [norms, norms]


def test_a_folder_reads_back_shared(tmp_path):
    images = torch.randn(2, 3, 32, 32)
    for number, model in enumerate((widenet(), zoo.share_depth(zoo.upcycle(vit(), layers="all", num_experts=3)))):
        zoo.save_pretrained(model, tmp_path / str(number))
        again = zoo.from_pretrained(tmp_path / str(number))
        assert again.blocks[0].mlp.experts.down_proj is again.blocks[2].mlp.experts.down_proj
        with torch.no_grad():
            assert torch.allclose(again(images), model(images), rtol=1e-5, atol=1e-6)


def test_a_language_model_shares_too_and_generates_with_a_cache(tmp_path):
    dense = stir(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval())
    before = copy.deepcopy(dense.state_dict())
    sparse = zoo.upcycle(dense, layers="all", num_experts=3, noise=0.5)
    shared, ids = zoo.share_depth(sparse), torch.randint(3, 64, (2, 9))
    layers = shared.model.layers
    assert all(layer.mlp.experts.down_proj is layers[0].mlp.experts.down_proj for layer in layers)
    assert all(layer.self_attn.q_proj.weight is layers[0].self_attn.q_proj.weight for layer in layers)
    assert len({id(layer.input_layernorm.weight) for layer in layers}) == 3
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2]
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with_cache = shared.generate(ids, **options)
    assert torch.equal(with_cache, shared.generate(ids, use_cache=False, **options))
    zoo.save_pretrained(shared, tmp_path / "saved")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, shared(ids).logits, rtol=1e-4, atol=1e-5)
    shared.train().gradient_checkpointing_enable()
    shared(input_ids=ids, labels=ids).loss.backward()
    assert layers[2].mlp.experts.down_proj.grad.abs().sum() > 0


def test_blocks_of_other_shapes_keep_weights_of_their_own():
    swin = zoo.create_model("vision/swin_moe_tiny_test", num_classes=3)
    shared = zoo.share_depth(swin)
    assert len(shared.layers[1].blocks) == 2
    assert shared.layers[1].blocks[0].attn.qkv.weight is shared.layers[1].blocks[1].attn.qkv.weight
    assert shared.layers[0].blocks[0].attn.qkv.weight is not shared.layers[1].blocks[0].attn.qkv.weight
    shared(torch.randn(1, 3, 32, 32))
    with torch.device("meta"):
        assert all(p.is_meta for p in zoo.share_depth(timm.create_model("vit_tiny_patch16_224")).parameters())


def test_towers_and_their_parts_are_told_apart():
    config = transformers.T5Config(vocab_size=64, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8)
    shared = zoo.share_depth(transformers.T5ForConditionalGeneration(config))
    encoder, decoder = shared.encoder.block, shared.decoder.block
    assert encoder[0].layer[0].SelfAttention.q.weight is encoder[1].layer[0].SelfAttention.q.weight
    assert decoder[0].layer[1].EncDecAttention.q.weight is decoder[1].layer[1].EncDecAttention.q.weight
    assert encoder[0].layer[0].SelfAttention.q.weight is not decoder[0].layer[0].SelfAttention.q.weight
    ernie = zoo.share_depth(zoo.create_model("vision_language/ernie4_5_vl_tiny"))
    text, seen = (part.experts for part in ernie.model.language_model.layers[1].mlp.parts)
    assert text.down_proj is not seen.down_proj
    with pytest.raises(ValueError, match="blocks of VisionTransformerMoE share weights; train it with ddp"):
        parallelize(widenet(), SimpleNamespace(sizes=Sizes(shard=2)))


def test_what_cannot_share_is_refused():
    with pytest.raises(ValueError, match="Linear has no two blocks with the same weights"):
        zoo.share_depth(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"no two blocks with the same weights under 'blocks\.0'"):
        zoo.share_depth(vit(), within="blocks.0")


CONVERSIONS = {
    "upcycle": lambda model, run: stir(zoo.upcycle(model, layers="all", num_experts=3)),
    "split": lambda model, run: zoo.split(model, num_experts=4, method="random"),
    "mix": lambda model, run: zoo.mix([model, stir(copy.deepcopy(model))]),
    "to_dense": lambda model, run: zoo.to_dense(
        stir(zoo.share_depth(zoo.upcycle(model, layers="all", num_experts=3))), weights="usage", calibrate=run
    ),
}


@pytest.mark.parametrize("name", CONVERSIONS)
@pytest.mark.filterwarnings("ignore:save_pretrained. blocks shared their weights until")
def test_what_a_conversion_gave_each_block_is_not_lost_in_a_folder(name, tmp_path):
    images = torch.randn(2, 3, 32, 32)
    made = CONVERSIONS[name](zoo.share_depth(vit()), lambda m: [m(images).sum()])
    zoo.save_pretrained(made, tmp_path / "saved")
    with torch.no_grad():
        assert torch.allclose(zoo.from_pretrained(tmp_path / "saved")(images), made(images), rtol=1e-5, atol=1e-6)


def test_layers_that_share_experts_are_pruned_and_grown_together():
    images = torch.randn(4, 3, 32, 32)
    model = widenet()
    moes = [module for module in model.modules() if isinstance(module, MoE)]
    weight, total = moes[0].router.weight.detach().double(), torch.zeros(4, dtype=torch.float64)

    def add(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        total.add_((args[0].flatten(0, -2).double() @ weight.T).softmax(-1).sum(0))

    handles = [moe.register_forward_pre_hook(add) for moe in moes]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    best = total.topk(2).indices.sort().values
    pruned = zoo.prune(model, keep=2, calibrate=lambda m: [m(images).sum()])
    found = [module for module in pruned.modules() if isinstance(module, MoE)]
    assert all(torch.equal(moe.experts.down_proj, moes[0].experts.down_proj[best]) for moe in found)
    assert len({id(moe.experts.down_proj) for moe in found}) == 1
    with pytest.raises(ValueError, match=r"must keep the same experts, got \[1, 2\] and \[0, 1\]"):
        zoo.prune(model, experts=[[0, 1], [1, 2], [0, 1]])
    for freeze in (True, False):
        grown = zoo.grow(model, num_new=2, init="random", freeze_old=freeze)
        more = [module for module in grown.modules() if isinstance(module, MoE)]
        assert all({*moe.parameters()} == {*more[0].parameters()} for moe in more)


def test_any_family_is_saved_with_shared_weights(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3, "vocab_size": 64}
    config = transformers.MiniMaxM2Config(**sizes, num_attention_heads=4, num_key_value_heads=4, num_local_experts=4,
                                          num_experts_per_tok=2, head_dim=8, rotary_dim=8)  # fmt: skip
    transformers.MiniMaxM2ForCausalLM(config).save_pretrained(tmp_path / "theirs")
    model = zoo.share_depth(stir(zoo.from_pretrained(tmp_path / "theirs")))
    zoo.save_pretrained(model, tmp_path / "shared")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "shared").eval()
    ids = torch.randint(64, (2, 9))
    with torch.no_grad():
        assert torch.allclose(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
