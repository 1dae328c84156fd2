"""The script that cuts dense models runs as it stands, and says what is so."""

import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
import transformers
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "scripts" / "split_dense.py"
SHORT = ["--experts", 4, "--batches", 2, "--batch-size", 2]


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["split_dense.py", *map(str, args)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def table(shown):
    head, *rows = shown.splitlines()
    assert head.split()[2:] == ["25%", "50%", "75%", "100%", "of", "neurons"]
    return {(row[:14].strip(), row[14:33].strip()): [float(value) for value in row[33:].split()] for row in rows}


@pytest.fixture
def llama(tmp_path):
    sizes = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.mul_(4)
    model.save_pretrained(tmp_path / "llama")
    transformers.ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_folder_of_transformers_with_text(llama, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 4, encoding="utf-8")
    run(monkeypatch, llama, "--text", tmp_path / "text.txt", "--length", 16, *SHORT)
    found = table(capsys.readouterr().out)
    methods, gates = ("random", "cluster", "coactivation"), ("EMoERouter", "MoEficationRouter", "ground truth")
    assert list(found) == [(method, gate) for method in methods for gate in gates]
    for errors in found.values():
        assert errors[-1] == 0  # all experts are the model
        assert 0 < errors[2] < errors[0]
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, llama, "--text", tmp_path / "text.txt", "--length", 1024, *SHORT)
    assert "expected at least 4096 tokens for 2 batches, got 169" in capsys.readouterr().err


def test_a_timm_model_with_images_and_with_random_ones(tmp_path, monkeypatch, capsys):
    for i in range(4):
        Image.new("RGB", (40, 36), (60 * i, 255 - 60 * i, 128)).save(tmp_path / f"{i}.png")
    assert timm.is_model("test_vit")
    for data in ([], ["--images", tmp_path]):
        run(monkeypatch, "test_vit", "--scratch", "--methods", "cluster", "--layers", "last-1", *data, *SHORT)
        found = table(capsys.readouterr().out)
        assert {method for method, _ in found} == {"cluster"}
        assert all(errors[-1] < 1e-3 < errors[0] for errors in found.values())
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, "test_vit", "--scratch", "--images", tmp_path, *SHORT[:-1], 100)
    assert "expected at least 200 images for 2 batches, got 4" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(monkeypatch, "test_vit", "--scratch", "--batches", 1)
