"""scripts/compress.py runs as it stands, and reports the losses of what it read and wrote."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn import functional as F

import zoo
from tasks.language import LanguageData

SCRIPT = Path(__file__).parents[2] / "scripts" / "compress.py"


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["compress.py", *map(str, args)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def loss(model, data):
    """Nats a token of the validation split, each sequence's documents alone."""
    nats, tokens, rows = 0.0, 0, data.packed("val")
    for row in (rows[i] for i in range(len(rows))):
        starts = [i for i, p in enumerate(row["position_ids"].tolist()) if p == 0]
        for a, b in zip(starts, [*starts[1:], len(row["input_ids"])]):
            labels = row["labels"][a:b]
            with torch.no_grad():
                logits = model(row["input_ids"][None, a:b], use_cache=False).logits[0]
            nats += float(F.cross_entropy(logits.double(), labels, reduction="sum", ignore_index=-100))
            tokens += int((labels >= 0).sum())
    return nats / tokens


def test_prune_and_make_dense(make, text, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    data = LanguageData(str(text), sequence_length=32)
    model = zoo.create_model("language/mixtral_tiny", vocab_size=259, **make.tiny).eval()
    zoo.save_pretrained(model, tmp_path / "sparse")
    data.tokenizer.save_pretrained(tmp_path / "sparse")
    common = [tmp_path / "sparse", text, "--sequence-length", 32, "--batches", 3]
    run(monkeypatch, *common, "--keep", 2, "--dense", "average", "--weights", "usage", "--out", tmp_path / "dense")
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.startswith(("original", "pruned", "dense"))}
    assert list(rows) == ["original", "pruned", "dense"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert type(theirs).__name__ == "MistralForCausalLM"
    for name, made in (("original", model), ("dense", theirs)):
        size, nats = rows[name]
        assert int(size.replace(",", "")) == sum(p.numel() for p in made.parameters())
        assert float(nats) == pytest.approx(loss(made, data), abs=2e-4)
    run(monkeypatch, *common, "--drop-blocks", 1, "--out", tmp_path / "short")
    assert zoo.from_pretrained(tmp_path / "short").config.num_hidden_layers == 1
    with pytest.raises(SystemExit):
        run(monkeypatch, *common, "--out", tmp_path / "none")
