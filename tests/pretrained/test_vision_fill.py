"""Weights read into models of other images, patches, windows and channels: what timm makes of the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed

import zoo
from zoo.pretrained.vmoe import Checkpoint

ROOMY = Path(__file__).parents[1] / "reference/vmoe/vmoe_last2_k2_roomy"
TINY = {"img_size": 32, "depth": 1}
SWIN = {"img_size": 64, "depths": (1, 1), "num_heads": (2, 2), "embed_dim": 16, "window_size": 4}


@pytest.mark.parametrize(
    ("name", "arguments", "other"),
    [
        ("vit_tiny_patch16_224", TINY, {"patch_size": 8}),
        ("vit_tiny_patch16_224", TINY, {"patch_size": 32, "img_size": 96, "in_chans": 1}),
        ("vit_tiny_patch16_224", {**TINY, "img_size": (32, 96)}, {"patch_size": 8}),
        ("vit_tiny_patch16_224", {**TINY, "img_size": 64}, {"img_size": (128, 32)}),  # as many patches as before
        ("deit_tiny_distilled_patch16_224", TINY, {"img_size": 64, "patch_size": 12}),
        ("eva02_tiny_patch14_224", {**TINY, "img_size": 28}, {"img_size": 56, "in_chans": 4}),
        ("beit_base_patch16_224", {**TINY, "embed_dim": 48, "num_heads": 2}, {"img_size": 64}),
        ("swin_tiny_patch4_window7_224", SWIN, {"patch_size": 2}),
        ("swin_tiny_patch4_window7_224", SWIN, {"window_size": 8}),
        ("swinv2_tiny_window8_256", SWIN, {"window_size": 8, "in_chans": 1}),
        ("tnt_s_patch16_224", TINY, {"img_size": 64}),
        ("mvitv2_tiny", {"img_size": 64}, {"img_size": 96}),
        ("convnext_atto", {}, {"in_chans": 5}),
        ("tresnet_m", {}, {}),  # a layer before the first convolution folds 16 pixels into channels
        ("tresnet_m", {}, {"in_chans": 1}),
        ("vmoe_tiny_test", {"representation_size": 24}, {"patch_size": 4}),
    ],
)
def test_a_folder_is_read_into_other_sizes_as_timm_reads_it(name, arguments, other, tmp_path):
    torch.manual_seed(0)
    saved = timm.create_model(name, num_classes=5, **arguments)
    for name_, parameter in saved.named_parameters():
        if "relative_position_bias_table" in name_:
            torch.nn.init.normal_(parameter)
    zoo.save_pretrained(saved, tmp_path / "saved")
    model = zoo.from_pretrained(tmp_path / "saved", **other)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True, num_classes=5, **other)
    expected = theirs.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


def test_an_original_checkpoint_is_read_into_other_patches_as_timm_resamples_them():
    stored = {key: leaf.read() for key, leaf in Checkpoint(ROOMY).leaves.items()}
    model = zoo.from_pretrained(ROOMY, patch_size=(4, 16))
    kernel = stored["embedding/kernel"].permute(3, 2, 0, 1)
    torch.testing.assert_close(model.patch_embed.proj.weight, resample_patch_embed(kernel, (4, 16)))
    positions = stored["Encoder/posembed_input/pos_embedding"]
    assert model.patch_embed.grid_size == (8, 2)  # as many patches as the 4 x 4 of the checkpoint
    expected = resample_abs_pos_embed(positions, [8, 2], [4, 4], num_prefix_tokens=1)
    assert torch.equal(model.pos_embed, expected)
    assert torch.equal(model.norm.weight, stored["Encoder/encoder_norm/scale"])


def test_patches_that_go_through_a_matrix_are_adapted(tmp_path):
    torch.manual_seed(0)
    small = {"depth": 1, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
    saved = timm.create_model("naflexvit_base_patch16_gap", **small).eval()
    zoo.save_pretrained(saved, tmp_path / "saved")
    grey = zoo.from_pretrained(tmp_path / "saved", in_chans=1)
    x = torch.randn(2, 1, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(grey(x), saved(x.expand(-1, 3, -1, -1)))
    oblong = timm.create_model("naflexvit_base_patch16_gap", patch_size=(8, 16), **small).eval()
    zoo.save_pretrained(oblong, tmp_path / "oblong")
    with torch.no_grad():
        found = zoo.from_pretrained(tmp_path / "oblong", in_chans=1)(x)
        torch.testing.assert_close(found, oblong(x.expand(-1, 3, -1, -1)))
    # A row of the matrix is a patch's height, width and colours, the last fastest.
    finer = zoo.from_pretrained(tmp_path / "saved", patch_size=8, in_chans=6)
    kernel = saved.embeds.proj.weight.view(48, 16, 16, 3).permute(0, 3, 1, 2)
    expected = resample_patch_embed(kernel, (8, 8)).repeat(1, 2, 1, 1) / 2  # six channels, twice the three
    torch.testing.assert_close(finer.embeds.proj.weight, expected.permute(0, 2, 3, 1).flatten(1))


def test_what_cannot_be_adapted_is_named(tmp_path):
    zoo.save_pretrained(timm.create_model("convnext_atto", num_classes=5), tmp_path / "saved")
    with pytest.raises(ValueError, match=r"stem\.0\.weight has shape \[40, 3, 4, 4\], .* \[40, 3, 8, 8\]"):
        zoo.from_pretrained(tmp_path / "saved", patch_size=8)
    zoo.save_pretrained(timm.create_model("samvit_base_patch16", num_classes=5, **TINY), tmp_path / "sam")
    with pytest.raises(ValueError, match=r"pos_embed has shape \[1, 2, 2, 768\], which does not fit"):
        zoo.from_pretrained(tmp_path / "sam", img_size=64)
