"""A page about a language model's experts: the script that writes it, and what the demo leaves for its own."""

import json
import re
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


@pytest.fixture
def texts(tmp_path):
    """Two files that have no character in common."""
    paths = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for path, word in zip(paths, ("abcd", "1234")):
        path.write_text(word * 400)
    return paths


def test_a_page_about_texts_and_checkpoints(model, texts, tmp_path, capsys):
    state = zoo.from_pretrained(model).state_dict()
    turned = {key: -value if "router" in key else value for key, value in state.items()}  # the worst become the best
    assert turned.keys() == state.keys()
    for name, weights in (("turned", turned), ("same", state)):
        saved = {"state_dict": {f"model.{key}": value for key, value in weights.items()}}
        torch.save(saved, tmp_path / f"{name}.ckpt")
    out = tmp_path / "page.html"
    earlier = [tmp_path / "turned.ckpt", model, tmp_path / "same.ckpt"]
    analyse(model, *texts, "--out", out, "--length", 32, "--tokens", 320, "--earlier", *earlier)
    html = out.read_text()
    assert f"written to {out}" in capsys.readouterr().out
    for part in ("What decides the expert", "Early routing learning", "How experts relate", "<th>domain</th>"):
        assert part in html
    overlaps = [(float(y), int(x)) for y, x in re.findall(r": (\S+) at (\d)</title>", html)]
    layers = len(overlaps) // 4
    assert layers > 1
    for number in (2, 3, 4):  # the same weights choose the same
        assert overlaps.count((1.0, number)) == layers
    first = [y for y, x in overlaps if x == 1]
    assert len(first) == layers
    assert first[0] == 0
    assert max(first) < 1


def test_one_text_has_no_domain(model, texts, tmp_path):
    out = tmp_path / "page.html"
    analyse(model, texts[0], "--out", out, "--length", 32, "--tokens", 64)
    html = out.read_text()
    assert "<th>position</th>" in html
    assert "domain</th>" not in html
    assert "Early routing learning" not in html


def test_mistakes_are_one_line(model, texts, tmp_path, capsys):
    short, kept, bad = tmp_path / "short.txt", tmp_path / "kept.html", tmp_path / "bad.ckpt"
    short.write_text("abc")
    kept.write_text("mine")
    dense, out = tmp_path / "dense", tmp_path / "new.html"
    dense.mkdir()
    (dense / "config.json").write_text('{"model_type": "lama"}')
    torch.save({"state_dict": {"model.a": torch.zeros(1)}}, bad)
    text = texts[0]
    for args, told in (
        ([tmp_path / "none", text], "none: no such folder"),
        ([dense, text], "unknown language family"),
        ([model, tmp_path / "no.txt"], "there is no"),
        ([model, short], "short.txt has 3 tokens"),
        ([model, text, "--tokens", 100], "too few for one sequence of --length 128"),
        ([model, text, "--out", tmp_path / "no" / "page.html"], "there is no folder"),
        ([model, text, "--out", kept], "exists; nothing was changed"),
        ([model, text, "--earlier", tmp_path / "no.ckpt"], "there is no"),
        ([model, text, "--earlier", text], "one.txt is no checkpoint of Lightning"),
        ([model, text, "--earlier", bad], "a checkpoint is of another model"),
    ):
        with pytest.raises(SystemExit) as stop:
            analyse(*([] if "--out" in args else ["--out", out]), *args)
        assert stop.value.code == 2
        error = capsys.readouterr().err.splitlines()
        assert error[-1].startswith("error: ")
        assert told in error[-1]
        assert not any("Traceback" in line for line in error)
    assert kept.read_text() == "mine"
    assert not out.exists()


def test_a_model_without_experts_is_an_error(tmp_path, texts, capsys):
    """One of a family with experts, all of whose layers are dense."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from zoo.data import open_tokenizer

    tokenizer = open_tokenizer("bytes")
    sizes = {"vocab_size": tokenizer.vocab_size, "hidden_size": 16, "intermediate_size": 16, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen3MoeConfig(**sizes, **heads, num_hidden_layers=1, mlp_only_layers=[0])
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    with pytest.raises(SystemExit):
        analyse(tmp_path / "dense", texts[0], "--out", tmp_path / "new.html")
    assert "no layer with experts" in capsys.readouterr().err


def test_the_demo_watches_its_gates_and_leaves_a_document(make, tmp_path):
    """Its first layer is a hash: decided by the token, at every step as at the last."""
    from tasks.demo.language import _analysis
    from tasks.demo.recorder import Recorder

    router = [
        {"class_path": "zoo.moe.routers.HashRouter", "init_args": {"vocab_size": 259}},
        {"class_path": "zoo.moe.routers.TopKRouter", "init_args": {"k": 1}},
    ]
    task, data = make.task(router=router, lr=0.1), make.data()
    recorder = Recorder("moe", tmp_path, lambda: None, lambda: False, seconds=600)
    every = {"max_steps": 6, "val_check_interval": 2, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    make.trainer(callbacks=[recorder], **{**every, "limit_val_batches": 1}).fit(task, data)
    batches = list(data.val_dataloader())
    document = json.loads(json.dumps(_analysis(task, batches, tmp_path)))
    assert set(document["layers"]) == set(document["agreement"]) == {"layer 0", "layer 1"}
    assert document["layers"]["layer 0"]["keys"]["token id"]["explained"] == pytest.approx(1)
    assert document["layers"]["layer 0"]["keys"]["position"]["explained"] < 0.9
    assert document["agreement"]["layer 0"] == [[2, 1.0], [4, 1.0], [6, 1.0]]
    steps, overlaps = zip(*document["agreement"]["layer 1"])
    assert steps == (2, 4, 6)
    assert overlaps[0] < overlaps[-1] == 1
    assert len(document["layers"]["layer 1"]["similarity"]) == make.tiny["num_local_experts"]
