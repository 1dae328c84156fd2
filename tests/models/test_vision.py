"""Our V-MoEs where a timm user looks: they behave as any of timm's vision transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn

import zoo
from zoo.models.vision import MODELS
from zoo.moe import record
from zoo.moe.routers import SoftRouter

TINY = ("vmoe_tiny_test", "soft_moe_tiny_test")


def make(name: str = "vmoe_tiny_test", **overrides: Any) -> Any:
    """A model whose head is not zero, as that of a new one is, so that logits tell images apart."""
    model = timm.create_model(name, **{"num_classes": 5, **overrides})
    if isinstance(getattr(model, "head", None), nn.Linear):
        nn.init.normal_(model.head.weight)
    return model


def images(batch: int = 3, size: int = 32, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, size, size)


@pytest.mark.parametrize("name", TINY)
def test_a_model_that_drops_nothing_is_exported_as_one_graph(name: str) -> None:
    model, x = make(name).eval(), images()
    with torch.no_grad():
        assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize("how", [{}, {"capacity": {"factor": 0.5}}, {"router": "ExpertChoiceRouter"}])
@pytest.mark.parametrize("name", ["vmoe_tiny_test", "convnext_moe_tiny_test", "swin_moe_tiny_test"])
def test_one_graph_serves_any_number_of_images_in_groups_of_one(name: str, how: dict, tmp_path: Path) -> None:
    """Whatever capacity drops; each image as if it were alone."""
    zoo.save_pretrained(make(name, **how), tmp_path / "model")
    model = zoo.from_pretrained(tmp_path / "model", group_images=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch = {0: torch.export.Dim("batch")}
    with torch.no_grad():
        graph = torch.export.export(model, (images(),), dynamic_shapes=(batch,)).module()
        for number in (1, 2, 11):
            x = images(number)
            alone = torch.cat([model(image) for image in x.split(1)])
            torch.testing.assert_close(graph(x), alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["vmoe_tiny_test", "convnext_moe_tiny_test", "swin_moe_tiny_test"])
def test_a_graph_for_any_number_of_images_needs_groups_that_do_not_hang_on_it(name: str) -> None:
    batch = {0: torch.export.Dim("batch")}
    with pytest.raises(ValueError, match="group_images=1 of a vision model"):
        torch.export.export(make(name).eval(), (images(),), dynamic_shapes=(batch,))


def test_timm_and_zoo_list_the_same_models() -> None:
    assert set(timm.list_models("*moe*")) >= set(MODELS)
    assert zoo.list_models("vision/*") == sorted(f"vision/{name}" for name in MODELS)
    assert timm.is_model("vmoe_base_patch16_224")


def test_names_may_have_the_tags_of_timm() -> None:
    sizes = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}
    model = zoo.create_model("vision/vit_tiny_patch16_224.augreg_in21k", moe_layers=[1], num_experts=2, **sizes)
    assert model.pretrained_cfg["tag"] == "augreg_in21k"
    assert model.blocks[1].mlp.experts.num_experts == 2
    ours = zoo.create_model("vision/vmoe_tiny_test.untrained", moe_layers=[0], num_experts=3)
    assert ours.blocks[0].mlp.experts.num_experts == 3
    with pytest.raises(RuntimeError, match="nobodys"):
        zoo.create_model("vision/vit_tiny_patch16_224.nobodys")


def test_zoo_may_be_imported_first_and_listing_imports_neither_torch_nor_timm() -> None:
    """In this file timm came first."""
    program = (
        "import sys, zoo; zoo.list_models('vision/*'); assert not {'torch', 'timm'} & set(sys.modules); import timm; "
        "assert timm.list_models('vmoe_small*') == ['vmoe_small_patch32_224'], timm.list_models('*moe*')"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", TINY)
def test_features_logits_and_heads(name: str) -> None:
    model, x = make(name).eval(), images()
    tokens = 16 + model.num_prefix_tokens
    features = model.forward_features(x)
    assert features.shape == (3, tokens, 32)
    torch.testing.assert_close(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (3, 32)
    assert model.get_classifier() is model.head
    model.reset_classifier(7)
    assert model(x).shape == (3, 7)
    model.reset_classifier(0)
    assert model(x).shape == (3, model.head_hidden_size)
    model.reset_classifier(6, "avg")
    assert model(x).shape == (3, 6)


@pytest.mark.parametrize("name", TINY)
def test_intermediate_layers_and_feature_extraction(name: str) -> None:
    model, x = make(name).eval(), images()
    blocks: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, out: blocks.append(out)) for block in model.blocks]
    final = model.forward_features(x)
    for hook in hooks:
        hook.remove()
    last, intermediates = model.forward_intermediates(x, indices=[1, 3], output_fmt="NLC")
    torch.testing.assert_close(last, final)
    for found, block in zip(intermediates, (blocks[1], blocks[3])):
        torch.testing.assert_close(found, block[:, model.num_prefix_tokens :])
    (grid,) = model.get_intermediate_layers(x, 1, reshape=True)
    torch.testing.assert_close(grid.flatten(2).mT, blocks[3][:, model.num_prefix_tokens :])
    extractor = make(name, features_only=True, out_indices=(0, 3)).eval()
    assert [tuple(f.shape) for f in extractor(x)] == [(3, 32, 4, 4)] * 2
    assert extractor.feature_info.channels() == [32, 32]


@pytest.mark.parametrize("name", TINY)
def test_image_size_and_patches_may_be_set_and_changed(name: str) -> None:
    model = make(name, img_size=48).eval()
    assert model(images(size=48)).shape == (3, 5)
    model.set_input_size((24, 64))
    assert model(torch.randn(2, 3, 24, 64)).shape == (2, 5)
    free = make(name, dynamic_img_size=True).eval()
    assert free(torch.randn(2, 3, 40, 16)).shape == (2, 5)
    assert make(name, in_chans=1, patch_size=4)(images(channels=1)).shape == (3, 5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_sincos_positions_follow_the_image(dynamic: bool) -> None:
    """The formula of MoCo v3 as google-research/vmoe has it, one patch and one frequency at a time."""
    model = make(pos_embed="sincos2d", dynamic_img_size=dynamic).eval()
    if not dynamic:
        model.set_input_size((16, 24))
    x = torch.randn(2, 3, 16, 24)
    patches = nn.functional.conv2d(x, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=8)
    expected = patches.flatten(2).mT.clone()
    for n in range(6):
        row, column = divmod(n, 3)
        for d in range(8):
            omega = 10_000 ** (-d / 7)
            for offset, (function, place) in enumerate(
                [(torch.sin, column), (torch.cos, column), (torch.sin, row), (torch.cos, row)]
            ):
                expected[:, n, offset * 8 + d] += function(torch.tensor(place * omega))
    found = model._pos_embed(model.patch_embed(x))
    torch.testing.assert_close(found[:, 1:], expected)
    torch.testing.assert_close(found[:, :1], model.cls_token.expand(2, -1, -1))
    assert "pos_embed" not in model.state_dict()


def test_data_configuration_is_that_of_the_published_models() -> None:
    config = resolve_model_data_config(make())
    assert (config["input_size"], config["mean"], config["std"]) == ((3, 32, 32), (0.5,) * 3, (0.5,) * 3)
    assert create_transform(**config)(torch.zeros(3, 50, 40)).shape == (3, 32, 32)
    with torch.device("meta"):
        full = zoo.create_model("vision/vmoe_small_patch32_224")
    assert resolve_model_data_config(full)["input_size"] == (3, 224, 224)


@pytest.mark.parametrize("name", TINY)
def test_layer_decay_and_weight_decay_groups(name: str) -> None:
    model = make(name)
    scales = {}
    names = {id(p): n for n, p in model.named_parameters()}
    for group in param_groups_layer_decay(
        model, weight_decay=0.1, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay()
    ):
        scales.update({names[id(p)]: (group["lr_scale"], group["weight_decay"]) for p in group["params"]})
    assert len(scales) == len(names)
    moe = next(n for n in names.values() if n.endswith("experts.up_proj"))
    layer = moe.split(".")[1]
    assert scales[moe] == (scales[f"blocks.{layer}.attn.qkv.weight"][0], 0.1)
    assert scales[f"{moe}_bias"][1] == 0
    assert scales["blocks.0.attn.qkv.weight"][0] < scales["head.weight"][0] == 1
    decayed = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())[1]["params"]
    soft = isinstance(model.blocks[3].mlp.router, SoftRouter)
    assert (f"blocks.{layer}.mlp.router.weight" in {names[id(p)] for p in decayed}) is not soft


@pytest.mark.parametrize("name", TINY)
def test_gradient_checkpointing_changes_nothing_and_counts_losses_once(name: str) -> None:
    model, x = make(name).train(), images()
    found = []
    for on in (False, True):
        model.set_grad_checkpointing(on)
        model.zero_grad()
        torch.manual_seed(0)  # the routers draw noise, which the second pass must repeat
        with record(model) as step:
            logits = model(x)
            loss = logits.square().sum() + sum(step.losses().values())
        loss.backward()
        assert [len(calls) for calls in step.routings.values()] == [1]
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for parameter, grad in found[0].items():
        torch.testing.assert_close(found[1][parameter], grad, msg=parameter)


@pytest.mark.parametrize("name", TINY)
def test_compiled_model_is_the_same(name: str) -> None:
    torch._dynamo.reset()
    model, x = make(name).eval(), images()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), model(x))


@pytest.mark.parametrize("name", TINY)
def test_state_round_trip_and_the_meta_device(name: str) -> None:
    options = {"pos_embed": "sincos2d", "init_values": 1e-4}
    model, x = make(name, **options).eval(), images()
    with torch.device("meta"):
        empty = make(name, **options).eval()
    empty.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*empty.parameters(), *empty.buffers()):
            tensor.fill_(torch.nan)
    empty.init_weights()
    assert not [n for n, t in (*empty.named_parameters(), *empty.named_buffers()) if t.isnan().any()]
    empty.load_state_dict(model.state_dict())
    torch.testing.assert_close(empty(x), model(x))


def test_initial_weights_are_those_of_the_original() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vmoe_tiny_test", embed_dim=64, num_classes=9, num_experts=8)
    experts = model.blocks[3].mlp.experts
    assert torch.equal(experts.up_proj[0], experts.up_proj[7])  # one draw for all, as with flax's split_rngs=False
    bound = (6 / (64 + 256)) ** 0.5  # Xavier
    for weight in (experts.up_proj, experts.down_proj, model.blocks[0].mlp.fc1.weight):
        assert 0.98 * bound < weight.abs().max() <= bound
    assert 0.9 * (6 / 128) ** 0.5 < model.blocks[0].attn.qkv.weight.abs().max() <= (6 / 128) ** 0.5
    assert model.blocks[3].mlp.router.weight.std().item() == pytest.approx(64**-0.5, rel=0.15)
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(192**-0.5, rel=0.05)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.head.weight.abs().max() == 0
    torch.testing.assert_close(model.head.bias, torch.full((9,), 9.0).log().neg())
    assert model.cls_token.abs().max() == 0
    apart = make(shared_init=False, num_experts=8).blocks[3].mlp.experts
    assert not torch.equal(apart.up_proj[0], apart.up_proj[7])
    other = make(weight_init="jax").blocks[0].attn.qkv.weight  # timm's own modes, with the fused matrix as one
    assert other.abs().max() <= (6 / (32 + 96)) ** 0.5


@pytest.mark.parametrize("mode", ["", "jax"])
def test_a_start_that_shrinks_with_depth_shrinks_experts_too(mode: str) -> None:
    plain, shrunk = (
        (torch.manual_seed(3), timm.create_model("vmoe_tiny_test", weight_init=mode, fix_init=fix).state_dict())[1]
        for fix in (False, True)
    )
    for name, value in plain.items():
        block = int(name.split(".")[1]) if name.startswith("blocks.") else 0
        shrinks = name.endswith(("attn.proj.weight", "mlp.fc2.weight", "experts.down_proj"))
        scale = (2 * (block + 1)) ** 0.5 if shrinks else 1.0
        torch.testing.assert_close(shrunk[name], value / scale, msg=name)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make()(images(size=40)), r"expected images \[B, 3, H, W\] of 32x32, got \[3, 3, 40, 40\]"),
        (lambda: make()(images(channels=1)), r"got \[3, 1, 32, 32\]"),
        (lambda: make(img_size=4), "has no patch"),
        (lambda: make(capacity={"factor": 0.01, "rounding": "floor"})(images(1)), "expected at least 1"),
        (lambda: make(moe_layers=[4]), "no block 4 among 4 blocks"),
        (lambda: make(moe_layers=[]), "at least one block"),
        (lambda: make(moe_layers="last-9"), "4 blocks do not have"),
        (lambda: make(router="TopRouter"), "unknown router 'TopRouter'; did you mean"),
        (lambda: make(router={"name": "TopKRouter", "kk": 1}), "unknown argument of TopKRouter 'kk'"),
        (lambda: make(scale_mlp_norm=True), "blocks.3.mlp has a LayerNorm"),
        (lambda: make(act_layer="hard_swish"), "Hardswish, which the experts do not have"),
        (lambda: make(num_experts=[4]), "num_experts: expected one number"),
        (lambda: make(pos_embed="sincos"), "unknown pos_embed 'sincos'; did you mean sincos2d"),
        (lambda: make(k=5), "k must be between 1 and num_experts=4"),
        (lambda: make(embed_dim=34, num_heads=2, pos_embed="sincos2d"), "multiple of 4"),
        (lambda: zoo.create_model("vision/vmoe_small_patch32_24"), "did you mean vision/vmoe_small_patch32_224"),
        (lambda: zoo.create_model("vision/vit_tiny_patch16_22"), "vision/vit_tiny_patch16_224"),
    ],
)
def test_what_does_not_fit_is_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
