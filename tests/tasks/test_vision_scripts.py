"""The example scripts run as they stand, one on what the other made."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import zoo

SCRIPTS = Path(__file__).parents[2] / "scripts"


def run(monkeypatch, name, *args):
    monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
    runpy.run_path(str(SCRIPTS / name), run_name="__main__")


@pytest.fixture
def pictures(tmp_path):
    """Two classes of twelve images each, black and white."""
    for name, value in (("black", 0), ("white", 255)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (40, 36), (value, value, abs(value - 5 * i))).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def test_finetune_then_classify_and_plot(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    zoo.save_pretrained(zoo.create_model("vision/vmoe_tiny_test", num_classes=5), "first")
    run(monkeypatch, "finetune_vision.py", "first", pictures, "--out", "second", "--steps", 20, "--batch-size", 8)
    capsys.readouterr()
    run(monkeypatch, "classify_images.py", "second", pictures, "--batch-size", 5)
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 24
    right = sum(Path(path).parent.name == found for path, found, _ in rows)
    assert right > 16  # black and white are not hard to tell apart
    assert all(0.5 <= float(chance) <= 1 for _, _, chance in rows)

    run(monkeypatch, "plot_capacity.py", "second", pictures, "--factors", 0.25, 1.0, "--choices", 1, 2)
    shown = capsys.readouterr().out
    assert shown.count("batch priority") == 4
    assert (tmp_path / "capacity.svg").read_text().startswith("<svg xmlns")


def test_classify_and_plot_with_a_model_that_has_no_patches(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    zoo.save_pretrained(zoo.create_model("vision/convnext_moe_tiny_test", num_classes=2), "convolutional")
    run(monkeypatch, "classify_images.py", "convolutional", pictures)
    assert len(capsys.readouterr().out.splitlines()) == 24
    run(monkeypatch, "plot_capacity.py", "convolutional", pictures, "--factors", 0.5)
    assert capsys.readouterr().out.count("batch priority") == 1


def test_upcycle_a_timm_model(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--steps", 2, "--batch-size", 8, "--image-size", 32, "--experts", 4, "--scratch"]
    run(monkeypatch, "upcycle_timm.py", "test_vit", pictures, "--out", "sparse", *options)
    model = zoo.from_pretrained("sparse")
    assert sum(isinstance(module, zoo.moe.MoE) for module in model.modules()) == 2
    assert model.pretrained_cfg["label_names"] == ["black", "white"]
