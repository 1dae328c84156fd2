"""Other experts, attention experts, mixture of depths and convolutional experts in vision models, by name."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import Tensor
from torch.nn import functional as F

import zoo
from zoo.moe import DeepMoE, NeuronExperts, PatchMoE, ZeroComputationExperts

MOA = {"name": "MoA", "num_experts": 5, "router": {"name": "TopKRouter", "k": 2, "losses": {"switch": 0.01}}}
MOH = {"name": "MoH", "num_shared_heads": 1, "k": 1}
PEER = {"experts": "NeuronExperts", "num_experts": 16, "router": {"name": "ProductKeyRouter", "k": 3, "heads": 2}}
ZERO = {"experts": "ZeroComputationExperts", "num_experts": 6, "router": {"name": "MoEPlusPlusRouter", "k": 2}}
CHOOSE_THREE = {"name": "PatchRouter", "patches": 3}
PATCHES = {"name": "PatchMoE", "layers": "layer3.1.conv2", "num_experts": 4, "router": CHOOSE_THREE}
VIT = {"img_size": 32, "embed_dim": 24, "num_heads": 3, "depth": 2, "num_classes": 5}
# Which model, with what, and the names of the layers whose decisions are seen.
MODELS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "MoE++": ("vmoe_tiny_test", ZERO, ["blocks.3.mlp"]),
    "PEER": ("vmoe_tiny_test", PEER, ["blocks.3.mlp"]),
    "MoA": ("vmoe_tiny_test", {"attention": {**MOA, "layers": [0]}}, ["blocks.0.attn.attention", "blocks.3.mlp"]),
    "MoH of timm's": (
        "vit_tiny_patch16_224",
        {**VIT, "attention": {**MOH, "layers": "every-2"}, "moe_layers": [0], "num_experts": 4},
        ["blocks.0.mlp", "blocks.1.attn.attention"],
    ),
    "SwitchHead": (
        "soft_moe_tiny_test",
        {"attention": {"name": "SwitchHead", "num_experts": 3, "layers": [-1]}},
        ["blocks.3.attn.attention.value", "blocks.3.attn.attention.output", "blocks.3.mlp"],
    ),
    "depth": (
        "vmoe_tiny_test",
        {"mixture_of_depths": {"capacity": 0.5}},
        ["blocks.1.depth", "blocks.3.depth", "blocks.3.depth.block.mlp"],
    ),
    "DeepMoE": (
        "resnet10t",
        {"num_classes": 5, "convolutions": {"name": "DeepMoE", "layers": ["layer1.*.conv?"]}},
        ["backbone.layer1.0.conv1", "backbone.layer1.0.conv2"],
    ),
    "PatchMoE": ("resnet18", {"num_classes": 5, "convolutions": PATCHES}, ["layer3.1.conv2"]),
}
every_model = pytest.mark.parametrize(("name", "options", "layers"), MODELS.values(), ids=MODELS.keys())


def make(name: str, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return zoo.create_model(f"vision/{name}", **options)


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 32)


@every_model
def test_layers_are_put_in_train_and_are_stored(name: str, options: Any, layers: list[str], tmp_path: Any) -> None:
    model = make(name, **options).train()
    for parameter in model.parameters():  # the published initialisation of the head is zero
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    with zoo.moe.record(model) as step:
        loss = model(images(3)).square().mean()
    assert list(step.routings) == layers
    assert all(len(calls) == 1 for calls in step.routings.values())
    (loss + sum(step.losses().values())).backward()
    gates = {n: p for n, p in model.named_parameters() if ".router." in n}
    for gate, parameter in gates.items():
        if gate != "blocks.3.mlp.router.residual_weight":  # the first gate hears no layer below
            assert parameter.grad is not None, gate
            assert parameter.grad.abs().max() > 0, gate
    model.eval()
    zoo.save_pretrained(model, tmp_path / "model")
    again = zoo.from_pretrained(tmp_path / "model")
    x = images()
    assert torch.equal(again(x), model(x))
    assert getattr(again, "changed", {}) == getattr(model, "changed", {})


def test_experts_are_of_the_kind_asked_for_and_mlps_among_them_copies() -> None:
    zero = make("vmoe_tiny_test", **ZERO).blocks[3].mlp.experts
    assert type(zero) is ZeroComputationExperts
    assert (zero.mlp.num_experts, zero.mlp.activation, zero.mlp.b_in is not None) == (2, "gelu_tanh", True)
    assert torch.equal(zero.mlp.w_in[0], zero.mlp.w_in[1])
    neurons = make("vmoe_tiny_test", **PEER).blocks[3].mlp.experts
    assert (type(neurons), tuple(neurons.w_in.shape)) == (NeuronExperts, (16, 1, 32))
    with pytest.raises(ValueError, match="experts: those of vit_tiny_patch16_224 are copies"):
        make("vit_tiny_patch16_224", **VIT, moe_layers=[0], experts="NeuronExperts")


def test_depth_runs_a_block_on_the_chosen_tokens_of_each_image() -> None:
    model = make("vit_tiny_patch16_224", **VIT, mixture_of_depths={"capacity": 0.5, "layers": [1]}).double().eval()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    router, block = model.blocks[1].depth.router, model.blocks[1].depth.block
    expected = x.clone()
    for b in range(2):
        scores = x[b] @ router.weight[0]
        chosen = scores.topk(3).indices.sort().values
        expected[b, chosen] += scores[chosen, None] * (block(x[b : b + 1, chosen])[0] - x[b, chosen])
    torch.testing.assert_close(model.blocks[1](x), expected)


def test_attention_sees_all_tokens_and_starts_with_as_many_heads() -> None:
    model = make("vit_tiny_patch16_224", **VIT, attention=MOH).eval()
    attention = model.blocks[0].attn.attention
    assert (attention.num_heads, attention.head_dim, attention.causal) == (3, 8, False)
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(model.blocks[0].attn(x), attention(x))
    assert (model.blocks[0].attn(x) - model.blocks[0].attn(torch.cat([x[:, :4], x[:, :1]], 1)))[:, 0].abs().max() > 0


def test_patch_experts_are_convolutions_of_the_patches_they_choose() -> None:
    spec = {**PATCHES, "layers": ["layer1.0.conv2"], "patch_size": 4, "router": {"name": "PatchRouter", "patches": 2}}
    model = make("resnet18", convolutions=spec).eval()
    layer, x = model.layer1[0].conv2, torch.randn(1, 64, 8, 8)
    assert isinstance(layer, PatchMoE)
    assert {tuple(conv.weight.shape) for conv in layer.experts} == {(16, 64, 3, 3)}
    y = layer(x)
    assert y.shape == (1, 64, 8, 8)
    patches = [x[:, :, i : i + 4, j : j + 4] for i in (0, 4) for j in (0, 4)]
    scores = torch.cat([p.reshape(1, -1) for p in patches]) @ layer.router.weight.T
    for e, conv in enumerate(layer.experts):
        best = scores[:, e].topk(2)
        for n, (i, j) in enumerate((i, j) for i in (0, 4) for j in (0, 4)):
            part = y[:, 16 * e : 16 * (e + 1), i : i + 4, j : j + 4]
            chosen = (best.indices == n).nonzero().flatten()
            if not len(chosen):
                assert not part.any()
                continue
            weight = best.values.softmax(0)[chosen[0]]
            torch.testing.assert_close(part, weight * F.conv2d(patches[n], conv.weight, conv.bias, padding=1))


def test_a_deep_moe_is_still_the_classifier_that_timm_knows() -> None:
    model = make("resnet10t", num_classes=5, convolutions="DeepMoE")
    assert isinstance(model, DeepMoE)
    assert (model.num_classes, model.pretrained_cfg["architecture"]) == (5, "resnet10t")
    model.set_grad_checkpointing(False)
    model.reset_classifier(3)
    assert model(images()).shape == (2, 3)
    labels = torch.tensor([1, 2])
    assert model.classifier.out_features == 3
    x = images()
    model(x)
    expected = F.cross_entropy(model.classifier(model.embedding(x)), labels)
    torch.testing.assert_close(model.embedding_loss(labels), expected)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = model.nothing


def test_features_of_a_deep_moe_are_gated_by_the_images_they_are_of() -> None:
    model = make("resnet10t", num_classes=5, convolutions="DeepMoE").eval()
    before, x = images(), images()
    with torch.no_grad():
        expected = model(x)
        model(before)
        torch.testing.assert_close(model.forward_head(model.forward_features(x)), expected)
        model(before)
        last, _ = model.forward_intermediates(x)
        torch.testing.assert_close(model.forward_head(last), expected)


@pytest.mark.parametrize(("name", "layers"), [("resnet10t", "layer*.conv1"), ("convnext_atto", "stages.*.conv_dw")])
def test_a_deep_moe_has_the_blocks_of_its_backbone(name: str, layers: str) -> None:
    model = make(name, convolutions={"name": "DeepMoE", "layers": [layers]})
    found = group_parameters(model, model.group_matcher(), reverse=True)
    expected = group_parameters(model.backbone, model.backbone.group_matcher(), reverse=True)
    assert len(set(expected.values())) > 3
    assert {name: found[f"backbone.{name}"] for name in expected} == expected
    assert found["embedding.0.weight"] == max(found.values())


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("resnet10t", {"attention": MOH}, "attention: expected a timm VisionTransformer, got ResNet"),
        ("resnet10t", {"mixture_of_depths": {}}, "mixture_of_depths: expected a timm VisionTransformer, got ResNet"),
        ("resnet10t", {"convolutions": "DepMoE"}, "unknown convolutions 'DepMoE'; did you mean DeepMoE"),
        ("resnet10t", {"convolutions": {"name": "DeepMoE", "layer": "x"}}, "argument of DeepMoE 'layer'; did you mean"),
        ("resnet10t", {"convolutions": {"name": "PatchMoE", "num_experts": 2}}, "PatchMoE needs layers and router"),
        ("resnet10t", {"convolutions": {**PATCHES, "layers": "blocks.*"}}, "no convolution matches .*'blocks"),
        ("resnet18", {"convolutions": {**PATCHES, "layers": "layer4.0.conv1"}}, "256 to 512 channels with stride 2"),
        ("vit_tiny_patch16_224", {**VIT, "mixture_of_depths": {"layers": [2]}}, "no block 2 among 2 blocks"),
    ],
)
def test_a_mistake_is_named(name: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make(name, **options)


def test_masks_that_a_layer_cannot_have_are_refused() -> None:
    model = make("vit_tiny_patch16_224", **VIT, attention={**MOH, "layers": [0]}, mixture_of_depths={"layers": [1]})
    assert isinstance(model, timm.models.VisionTransformer)
    x = torch.randn(1, 5, 24)
    with pytest.raises(ValueError, match="see all tokens"):
        model.blocks[0].attn(x, is_causal=True)
    with pytest.raises(ValueError, match="no attention masks"):
        model.blocks[1](x, is_causal=True)
