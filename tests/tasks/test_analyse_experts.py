"""The script that writes a page about a language model's experts."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

import zoo

SCRIPT = Path(__file__).parents[2] / "scripts" / "analyse_experts.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with an untrained model on bytes."""
    from zoo.data import open_tokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = open_tokenizer("bytes")
    made = zoo.create_model("language/mixtral_tiny", vocab_size=tokenizer.vocab_size)
    zoo.save_pretrained(made, folder)
    tokenizer.save_pretrained(folder)
    return folder


def analyse(*args):
    argv, sys.argv = sys.argv, [str(SCRIPT), *map(str, args)]
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        sys.argv = argv


def test_a_page_about_texts_and_checkpoints(model, tmp_path, capsys):
    for name, word in (("one", "abc "), ("two", "12. ")):
        (tmp_path / f"{name}.txt").write_text(word * 400)
    state = zoo.from_pretrained(model).state_dict()
    torch.save({"state_dict": {f"model.{key}": value for key, value in state.items()}}, tmp_path / "same.ckpt")
    out = tmp_path / "page.html"
    texts = [tmp_path / "one.txt", tmp_path / "two.txt"]
    analyse(model, *texts, "--out", out, "--length", 32, "--earlier", tmp_path / "same.ckpt", model)
    html = out.read_text()
    assert f"written to {out}" in capsys.readouterr().out
    for part in ("What decides the expert", "Early routing learning", "How experts relate", "<th>text</th>"):
        assert part in html
    assert html.count(": 1 at 1</title>") == html.count(": 1 at 3</title>") > 0  # the same weights choose the same


def test_mistakes_are_one_line(model, tmp_path, capsys):
    short = tmp_path / "short.txt"
    short.write_text("abc")
    kept = tmp_path / "kept.html"
    kept.write_text("mine")
    for args, told in (
        ([model, tmp_path / "no.txt"], "there is no text"),
        ([model, short, "--out", tmp_path / "new.html"], "too few for one sequence of --length 128"),
        ([model, short, "--out", kept], "exists; nothing was changed"),
    ):
        with pytest.raises(SystemExit):
            analyse(*args)
        assert told in capsys.readouterr().err
    assert kept.read_text() == "mine"
    assert not (tmp_path / "new.html").exists()
