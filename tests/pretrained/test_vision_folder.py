"""Original V-MoE checkpoints as timm models, and timm's own layout out of them and back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch import Tensor, nn
from vmoe_writer import write

import zoo
from zoo.moe import Capacity, MoE
from zoo.moe.routers import SoftRouter, TopKRouter
from zoo.pretrained.vmoe import Checkpoint

REFERENCE = Path(__file__).parents[1] / "reference"
GIVEN = sorted(path.with_suffix("") for path in (REFERENCE / "vmoe").glob("*.index"))
OPTIONS = sorted(path.with_suffix("") for path in (REFERENCE / "vmoe_options").glob("*.json"))
ROOMY, BPR, SOFT = (REFERENCE / "vmoe" / n for n in ("vmoe_last2_k2_roomy", "vmoe_last2_k2_bpr", "soft_moe_last2"))


def results(prefix: Path) -> dict[str, Tensor]:
    with np.load(f"{prefix}.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def logits(model: nn.Module, found: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(found["images"].permute(0, 3, 1, 2).contiguous())


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def arrays(prefix: Path) -> dict[str, Tensor]:
    return {key: leaf.read() for key, leaf in Checkpoint(prefix).leaves.items()}


def copied(prefix: Path, folder: Path, config: bool = True) -> Path:
    """A checkpoint copied elsewhere, with or without the original configuration."""
    for path in prefix.parent.glob(f"{prefix.name}.*"):
        if config or path.suffix != ".json":
            shutil.copy(path, folder / path.name)
    return folder / prefix.name


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("prefix", GIVEN, ids=lambda prefix: prefix.name)
def test_original_checkpoints_give_the_original_logits(prefix):
    found = results(prefix)
    model = zoo.from_pretrained(prefix)
    assert not model.training
    assert error(logits(model, found), found["logits"]) < (2e-2 if prefix == SOFT else 1e-5)


@pytest.mark.parametrize("prefix", OPTIONS, ids=lambda prefix: prefix.name)
def test_every_head_position_and_gate_goes_through_the_format(prefix, tmp_path):
    found = results(prefix)
    tree = {name.removeprefix("params/"): value for name, value in found.items() if name.startswith("params/")}
    write(tmp_path / prefix.name, tree, shards=3, parts=2)
    model = zoo.from_pretrained(tmp_path / prefix.name, config=f"{prefix}.json")
    soft = any(isinstance(module, SoftRouter) for module in model.modules())
    assert error(logits(model, found), found["logits"]) < (2e-2 if soft else 1e-4)


def test_arguments_say_what_an_original_configuration_would(tmp_path):
    prefix, found = copied(BPR, tmp_path, config=False), results(BPR)
    capacity = Capacity(0.5, multiple_of=4, drop="priority")
    model = zoo.from_pretrained(prefix, capacity=capacity, group_images=2)
    assert error(logits(model, found), found["logits"]) < 1e-5
    assert set(model.provenance["assumed"]) == {"k", "noise_std"}


def test_arguments_go_before_the_configuration():
    vanilla = REFERENCE / "vmoe/vmoe_last2_k2_vanilla"
    model = zoo.from_pretrained(vanilla, capacity={"factor": 4.0, "multiple_of": 4}, k=1, group_images=4)
    router = model.blocks[3].mlp.router
    assert (router.k, router.capacity.factor, router.group_sequences) == (1, 4.0, 4)
    assert router.losses.terms


def test_without_a_configuration_the_published_defaults_hold_and_are_named(tmp_path):
    model = zoo.from_pretrained(copied(ROOMY, tmp_path, config=False))
    router = model.blocks[2].mlp.router
    assert isinstance(router, TopKRouter)
    assert (router.k, router.group_sequences, router.noise_std) == (2, 8, 1 / 4)
    assert (router.capacity.factor, router.capacity.multiple_of) == (1.05, 4)
    assert set(model.provenance["assumed"]) == {"k", "capacity", "noise_std", "group_images"}
    assert model.provenance["assumed"]["k"] == 2
    assert model.provenance["arrays"]["moe_layers"] == [2, 3]
    soft = zoo.from_pretrained(copied(SOFT, tmp_path, config=False), img_size=32)
    assert error(logits(soft, results(SOFT)), results(SOFT)["logits"]) < 2e-2
    assert zoo.from_pretrained(tmp_path / SOFT.name).provenance["assumed"]["img_size"] == (224, 224)


def test_a_training_state_in_bfloat16_loads_as_bfloat16(tmp_path):
    tree = {f"params/{key}": value.bfloat16() for key, value in arrays(ROOMY).items()}
    write(tmp_path / "state", {**tree, "step": torch.tensor(3)}, shards=2)
    model = zoo.from_pretrained(tmp_path / "state", capacity=4.0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    wide = zoo.from_pretrained(tmp_path / "state", capacity=4.0, dtype="float32", group_images=2)
    expected = zoo.from_pretrained(ROOMY)
    for name, parameter in expected.named_parameters():
        assert torch.equal(wide.get_parameter(name), parameter.bfloat16().float()), name


def test_a_dense_vit_of_the_same_format_loads_too(tmp_path):
    tree = arrays(ROOMY)
    dense = {}
    for key, value in tree.items():
        if "/Moe/Mlp/" in key:
            dense[key.replace("Moe/Mlp", "Mlp")] = value[0]
        elif "/Router/" not in key:
            dense[key] = value
    write(tmp_path / "dense", dense)
    model = zoo.from_pretrained(tmp_path / "dense")
    assert not any(isinstance(module, MoE) for module in model.modules())
    assert torch.equal(model.blocks[3].mlp.fc1.weight, tree["Encoder/encoderblock_3/Moe/Mlp/Dense_0/kernel"][0].T)


def test_positions_are_resampled_to_another_image_size_and_the_class_tokens_kept(tmp_path):
    model = zoo.from_pretrained(ROOMY, img_size=(48, 40))
    stored = arrays(ROOMY)["Encoder/posembed_input/pos_embedding"]
    expected = resample_abs_pos_embed(stored, [6, 5], num_prefix_tokens=1)
    assert torch.equal(model.pos_embed, expected)
    assert torch.equal(model.pos_embed[:, 0], stored[:, 0])
    assert model(torch.randn(2, 3, 48, 40)).shape == (2, 10)
    zoo.save_pretrained(zoo.from_pretrained(ROOMY), tmp_path / "timm")
    assert torch.equal(zoo.from_pretrained(tmp_path / "timm", img_size=(48, 40)).pos_embed, expected)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, img_size=(48, 40))
    assert torch.equal(theirs.pos_embed, expected)


def test_patches_are_adapted_to_other_channels(tmp_path):
    model = zoo.from_pretrained(ROOMY, in_chans=1)
    kernel = arrays(ROOMY)["embedding/kernel"].permute(3, 2, 0, 1)
    assert torch.equal(model.patch_embed.proj.weight, adapt_input_conv(1, kernel))
    zoo.save_pretrained(model, tmp_path / "grey")
    assert torch.equal(zoo.from_pretrained(tmp_path / "grey").patch_embed.proj.weight, model.patch_embed.proj.weight)


@pytest.mark.parametrize("channels", [2, 3, 4, 6])
def test_a_model_of_grey_images_sees_the_same_in_the_same_value_of_several_channels(channels, tmp_path):
    grey = timm.create_model("vmoe_tiny_test", in_chans=1, num_classes=5).eval()
    torch.nn.init.normal_(grey.head.weight)
    zoo.save_pretrained(grey, tmp_path / "grey")
    several = zoo.from_pretrained(tmp_path / "grey", in_chans=channels)
    images = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(several(images.expand(-1, channels, -1, -1)), grey(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_patches_of_four_channels_are_adapted_as_timm_does(channels, tmp_path):
    four = timm.create_model("vmoe_tiny_test", in_chans=4, num_classes=5)
    zoo.save_pretrained(four, tmp_path / "four")
    kernel = four.patch_embed.proj.weight.detach()
    found = zoo.from_pretrained(tmp_path / "four", in_chans=channels).patch_embed.proj.weight
    if channels == 1:  # a value that is the same in all four
        torch.testing.assert_close(found, kernel.sum(1, keepdim=True))
    else:
        scaled = torch.cat([kernel, kernel], dim=1)[:, :channels] * (4 / channels)
        torch.testing.assert_close(found, scaled)


def test_another_number_of_classes_is_an_error_or_a_new_head(tmp_path):
    zoo.save_pretrained(zoo.from_pretrained(ROOMY), tmp_path / "timm")
    for source in (ROOMY, tmp_path / "timm"):
        with pytest.raises(ValueError, match=r"head has 10 classes, num_classes=7 was asked for; give new_head=True"):
            zoo.from_pretrained(source, num_classes=7)
        with pytest.raises(ValueError, match="new_head=True needs num_classes"):
            zoo.from_pretrained(source, new_head=True)
        model = zoo.from_pretrained(source, num_classes=7, new_head=True)
        assert model.head.weight.shape == (7, 32)
        assert torch.isfinite(model.head.weight).all()
        assert torch.equal(model.norm.weight, zoo.from_pretrained(ROOMY).norm.weight)
        assert zoo.from_pretrained(source, num_classes=10).num_classes == 10
        assert isinstance(zoo.from_pretrained(source, num_classes=0).head, nn.Identity)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tree: tree.pop("Encoder/encoderblock_1/LayerNorm_0/scale"),
            r"1 tensor \(blocks.1.norm1.weight\) missing",
        ),
        (
            lambda tree: tree.pop("Encoder/encoderblock_0/SelfAttention/key/kernel"),
            r"\(blocks.0.attn.qkv.weight\) missing",
        ),
        (
            lambda tree: tree.update({"Encoder/extra/kernel": torch.zeros(2)}),
            r"1 tensor \(Encoder/extra/kernel\) unknown",
        ),
        (
            lambda tree: tree.update({"head/bias": torch.zeros(3)}),
            r"head/bias has shape \[3\], .* head.bias of shape \[10\]",
        ),
        (
            lambda tree: tree.update({"Encoder/encoderblock_2/Moe/Router/dense/kernel": torch.zeros(32, 2, 2)}),
            r"Moe/Router/dense/kernel has shape \[32, 2, 2\]: an ensemble of routers",
        ),
        (lambda tree: tree.pop("embedding/kernel"), "no array embedding/kernel; not a checkpoint of a V-MoE"),
        (
            lambda tree: tree.pop("Encoder/encoderblock_2/Moe/Router/dense/kernel"),
            r"no array Encoder/encoderblock_2/Moe/Router/dense/kernel and no .*/mu",
        ),
    ],
)
def test_missing_surplus_and_misshapen_arrays_are_named(change, message, tmp_path):
    tree = arrays(ROOMY)
    change(tree)
    write(tmp_path / "broken", tree)
    with pytest.raises(ValueError, match=r"broken\.index: .*" + message):
        zoo.from_pretrained(tmp_path / "broken")


def test_a_missing_shard_or_index_is_named(tmp_path):
    prefix = copied(ROOMY, tmp_path)
    Path(f"{prefix}.data-00001-of-00002").unlink()
    with pytest.raises(FileNotFoundError, match=r"data-00001-of-00002: no such file; the checkpoint has 2 data shards"):
        zoo.from_pretrained(prefix)
    Path(f"{prefix}.index").unlink()
    with pytest.raises(FileNotFoundError, match=r"roomy\.index: no such file"):
        zoo.from_pretrained(prefix)


def test_a_configuration_that_is_none_is_refused(tmp_path):
    prefix = copied(ROOMY, tmp_path)
    Path(f"{prefix}.json").write_text('{"hidden_size": 32}')
    with pytest.raises(ValueError, match=r"roomy\.json: not a V-MoE configuration: it describes no encoder"):
        zoo.from_pretrained(prefix)
    with pytest.raises(ValueError, match="config: not a V-MoE configuration: it has no"):
        zoo.from_pretrained(prefix, config={"encoder": {}})


@pytest.mark.parametrize("prefix", GIVEN, ids=lambda prefix: prefix.name)
def test_what_is_saved_loads_in_zoo_and_in_timm_and_is_the_same_bytes_twice(prefix, tmp_path):
    model, found = zoo.from_pretrained(prefix), results(prefix)
    zoo.save_pretrained(model, tmp_path / "one")
    zoo.save_pretrained(zoo.from_pretrained(prefix), tmp_path / "two")
    zoo.save_pretrained(zoo.from_pretrained(tmp_path / "one"), tmp_path / "three")
    assert content(tmp_path / "one") == content(tmp_path / "two") == content(tmp_path / "three")
    expected = logits(model, found)
    assert torch.equal(logits(zoo.from_pretrained(tmp_path / "one"), found), expected)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'one'}", pretrained=True).eval()
    assert torch.equal(logits(theirs, found), expected)
    data = timm.data.resolve_model_data_config(theirs)
    assert (tuple(data["input_size"]), tuple(data["mean"])) == ((3, 32, 32), (0.5, 0.5, 0.5))


def test_timm_starts_a_new_head_on_what_was_saved(tmp_path):
    zoo.save_pretrained(zoo.from_pretrained(ROOMY), tmp_path / "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, num_classes=3)
    assert theirs.head.weight.shape == (3, 32)
    assert torch.equal(theirs.cls_token, zoo.from_pretrained(ROOMY).cls_token)


@pytest.mark.parametrize("name", ["vision/vmoe_tiny_test", "vision/soft_moe_tiny_test"])
def test_models_by_name_are_saved_with_what_was_changed_since(name, tmp_path):
    model = zoo.create_model(name, num_experts=3, global_pool="avg", class_token=False, representation_size=20).eval()
    model.set_input_size((24, 24))
    model.reset_classifier(5)
    zoo.save_pretrained(model, tmp_path / "saved")
    again = zoo.from_pretrained(tmp_path / "saved")
    x = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert again.blocks[3].mlp.router.num_experts == 3


@pytest.mark.parametrize("name", ["vision/swin_moe_tiny_test", "vision/convnext_moe_tiny_test"])
def test_other_backbones_are_saved_and_read_with_other_heads_and_channels(name, tmp_path):
    model = zoo.create_model(name, num_classes=5).eval()
    zoo.save_pretrained(model, tmp_path / "saved")
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    theirs = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(zoo.from_pretrained(tmp_path / "saved")(x), model(x))
        assert torch.equal(theirs(x), model(x))
    larger = zoo.from_pretrained(tmp_path / "saved", img_size=64)
    assert larger.pretrained_cfg["input_size"] == (3, 64, 64)
    assert larger(torch.randn(1, 3, 64, 64)).shape == (1, 5)
    grey = zoo.from_pretrained(tmp_path / "saved", in_chans=1, num_classes=3, new_head=True)
    other = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True, in_chans=1, num_classes=3)
    assert grey(x[:, :1]).shape == (2, 3)
    for (name, ours), expected in zip(grey.named_parameters(), other.parameters()):
        assert name.startswith("head.fc") or torch.equal(ours, expected), name


def test_gates_by_class_and_capacities_are_stored(tmp_path):
    options = {"router": TopKRouter, "capacity": Capacity(0.5, drop="priority"), "losses": {"z": 0.1}, "k": 1}
    zoo.save_pretrained(zoo.create_model("vision/vmoe_tiny_test", **options), tmp_path / "saved")
    router = zoo.from_pretrained(tmp_path / "saved").blocks[3].mlp.router
    assert router.capacity == options["capacity"]
    assert list(router.losses.terms) == ["z"]
    model = zoo.create_model("vision/vmoe_tiny_test", router=lambda dim, num_experts: TopKRouter(dim, num_experts))
    with pytest.raises(ValueError, match=r"argument router=<function .* cannot be stored"):
        zoo.save_pretrained(model, tmp_path / "function")
    assert not (tmp_path / "function").exists()


def test_a_model_that_was_changed_by_hand_is_refused(tmp_path):
    model = zoo.create_model("vision/vmoe_tiny_test")
    model.blocks[0].mlp.fc1 = nn.Linear(48, 60)
    with pytest.raises(ValueError, match=r"vmoe_tiny_test with this model's arguments has other tensors \(2 tensors"):
        zoo.save_pretrained(model, tmp_path / "changed")


def test_an_upcycled_timm_model_is_saved_and_read(tmp_path):
    dense = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4, num_classes=7)
    first = zoo.upcycle(dense, layers=[3], num_experts=2, noise=0.1)
    model = zoo.upcycle(first, layers=[1], num_experts=3, router="ExpertChoiceRouter", capacity=1).eval()
    zoo.save_pretrained(model, tmp_path / "sparse")
    again = zoo.from_pretrained(tmp_path / "sparse")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("xcit_nano_12_p8_224", {"depth": 2, "img_size": 32}),  # one number for the sides of a patch
        ("naflexvit_base_patch16_gap", {"depth": 2, "embed_dim": 48, "num_heads": 3}),  # patches go through a matrix
    ],
)
def test_upcycled_models_with_other_kinds_of_patches_are_saved_and_read(name, arguments, tmp_path):
    model = zoo.upcycle(timm.create_model(name, num_classes=5, **arguments), layers=[1], num_experts=2).eval()
    zoo.save_pretrained(model, tmp_path / "sparse")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(zoo.from_pretrained(tmp_path / "sparse")(x), model(x))


def test_a_timm_model_with_experts_put_in_by_name_is_saved_and_read(tmp_path):
    sizes = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}
    model = zoo.create_model("vision/vit_tiny_patch16_224", moe_layers=[1], num_experts=3, capacity=0.5, **sizes).eval()
    zoo.save_pretrained(model, tmp_path / "sparse")
    again = zoo.from_pretrained(tmp_path / "sparse")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert again.blocks[1].mlp.router.capacity == model.blocks[1].mlp.router.capacity


def test_nothing_is_overwritten_or_left_half_written(tmp_path, monkeypatch):
    model, target = zoo.create_model("vision/vmoe_tiny_test"), tmp_path / "saved"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty; give overwrite=True"):
        zoo.save_pretrained(model, target)
    zoo.save_pretrained(model, target, overwrite=True)
    assert set(content(target)) == {"notes.txt", "config.json", "model.safetensors"}
    before = content(target)

    def fails(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("zoo.pretrained.vision.write_file", fails)
    with pytest.raises(OSError, match="no space left"):
        zoo.save_pretrained(zoo.create_model("vision/vmoe_tiny_test"), target, overwrite=True)
    with pytest.raises(OSError, match="no space left"):
        zoo.save_pretrained(model, tmp_path / "new")
    assert content(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_damaged_folders_are_named(tmp_path):
    zoo.save_pretrained(zoo.from_pretrained(ROOMY), tmp_path / "saved")
    config, weights = tmp_path / "saved/config.json", tmp_path / "saved/model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated: tensor head.bias"):
        zoo.from_pretrained(tmp_path / "saved")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: no such file"):
        zoo.from_pretrained(tmp_path / "saved")
    weights.write_bytes(good)
    changed = json.loads(config.read_text())
    changed["architecture"] = "vmoe_giant"
    config.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"config\.json: architecture 'vmoe_giant' is none of timm's"):
        zoo.from_pretrained(tmp_path / "saved")
    changed["architecture"], changed["model_args"]["embed_dim"] = "vmoe_tiny_test", 64
    config.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"model\.safetensors: cls_token has shape \[1, 1, 32\], .* \[1, 1, 64\]"):
        zoo.from_pretrained(tmp_path / "saved")


def test_on_the_meta_device_no_array_is_read(tmp_path):
    prefix = copied(ROOMY, tmp_path)
    for number in (0, 1):
        shard = Path(f"{prefix}.data-0000{number}-of-00002")
        shard.write_bytes(b"\xc1" * shard.stat().st_size)
    with torch.device("meta"):
        model = zoo.from_pretrained(prefix)
    assert all(parameter.is_meta for parameter in model.parameters())


PROGRAM = """
import sys, zoo, timm

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024

warm, prefix = sys.argv[1:]
zoo.from_pretrained(warm)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # starts the peak anew
before = status("VmRSS")
model = zoo.from_pretrained(prefix)
print(status("VmHWM") - before)
"""


def test_peak_memory_is_near_the_checkpoints_size_when_arrays_are_cut_into_slices(tmp_path):
    tree = arrays(ROOMY)
    big = {}
    for key, value in tree.items():
        if "/Moe/Mlp/" in key:  # 4 experts of 32 x 64 become 192 of 32 x 1024
            shape = [192 if n == 0 else 1024 if size == 64 else size for n, size in enumerate(value.shape)]
            value = torch.randn(shape)
        elif key.endswith("Router/dense/kernel"):
            value = torch.randn(32, 192)
        elif "/Mlp/" in key:
            value = torch.randn([1024 if size == 64 else size for size in value.shape])
        big[key] = value
    size = sum(value.numel() * 4 for value in big.values())
    assert size > 100e6
    write(tmp_path / "big", big, shards=4, parts=2)
    command = [sys.executable, "-c", PROGRAM, str(ROOMY), str(tmp_path / "big")]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    assert peak < 1.2 * size
