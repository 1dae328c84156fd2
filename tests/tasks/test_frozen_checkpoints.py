"""Checkpoints of models whose frozen weights are in files that they were read from hold the rest alone."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file

import zoo
from tasks.averaging import RunningAverage
from tasks.language import LanguageTask
from tasks.training import Task

ADAPTED = {"adapt": {"kind": "MoELoRA", "num_experts": 3, "rank": 2, "dropout": 0.1}}
LEARNING = {"lr": 0.05, "warmup_steps": 0, "schedule": "constant"}


@pytest.fixture
def base(make, tmp_path):
    """A folder with a tiny sparse model."""
    zoo.save_pretrained(zoo.create_model("language/mixtral_tiny", vocab_size=259, **make.tiny), tmp_path / "base")
    return tmp_path / "base"


def adapted(folder, **arguments):
    return LanguageTask(pretrained=str(folder), **{"convert": [ADAPTED], **LEARNING, **arguments})


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def read(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("bits", [None, "int8"])
def test_a_run_goes_on_with_what_learns_alone(averaged, bits, base, make, tmp_path):
    """Bit for bit as one that never stopped; every tensor kept is one that differs from the files' or is new."""
    overrides = {} if bits is None else {"quantise": bits}
    callbacks = [lambda: RunningAverage(every_n_steps=1)] if averaged else []
    found = []
    for stops in (False, True):
        pl.seed_everything(0)
        checkpoint = None
        if stops:
            checkpoint = tmp_path / "stopped.ckpt"
            trainer = make.trainer(max_steps=2, callbacks=[c() for c in callbacks])
            trainer.fit(adapted(base, overrides=overrides), make.data())
            trainer.save_checkpoint(checkpoint)
        task = adapted(base, overrides=overrides)
        trainer = make.trainer(max_steps=4, callbacks=[c() for c in callbacks])
        trainer.fit(task, make.data(), ckpt_path=checkpoint)
        found.append(task.model.state_dict())
    assert equal(*found)
    kept = read(checkpoint)
    stored = load_file(base / "model.safetensors")
    parts = ["state_dict", "current_model_state"] if averaged else ["state_dict"]
    for part in parts:
        assert kept[part].keys() == {
            f"model.{name}" for name in found[0] if "_proj.lora." in name or "_proj.router." in name
        }
        assert not {name.removeprefix("model.") for name in kept[part]} & stored.keys()
    again = LanguageTask.load_from_checkpoint(checkpoint, map_location="cpu")
    whole = again.model.state_dict()
    assert all(torch.equal(value, whole[name.removeprefix("model.")]) for name, value in kept["state_dict"].items())
    assert found[0].keys() == whole.keys()
    frozen = [name for name in whole if f"model.{name}" not in kept["state_dict"]]
    assert all(torch.equal(whole[name], found[0][name]) for name in frozen)


def test_evaluation_reads_it_and_says_when_the_frozen_weights_are_others(base, make, tmp_path):
    trainer = make.trainer(max_steps=2, limit_val_batches=2)
    task = adapted(base)
    trainer.fit(task, make.data())
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    (wanted,) = trainer.validate(task, make.data(), verbose=False)
    (found,) = make.trainer(limit_val_batches=2).validate(
        adapted(base), make.data(), ckpt_path=tmp_path / "it.ckpt", verbose=False
    )
    assert found["val/loss"] == wanted["val/loss"]
    zoo.save_pretrained(zoo.create_model("language/mixtral_tiny", vocab_size=259, **make.tiny), tmp_path / "other")
    with pytest.warns(UserWarning, match="trained beside other frozen weights"):
        make.trainer().validate(adapted(tmp_path / "other"), make.data(), ckpt_path=tmp_path / "it.ckpt", verbose=False)


def test_what_learns_must_be_there(base, make, tmp_path):
    trainer = make.trainer(max_steps=1)
    trainer.fit(adapted(base), make.data())
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    checkpoint = read(tmp_path / "it.ckpt")
    name = next(iter(checkpoint["state_dict"]))
    del checkpoint["state_dict"][name]
    torch.save(checkpoint, tmp_path / "less.ckpt")
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{name}"\.'):
        make.trainer(max_steps=2).fit(adapted(base), make.data(), ckpt_path=tmp_path / "less.ckpt")


@pytest.mark.parametrize(
    "arguments",
    [
        {
            "convert": [{"upcycle": {"layers": "all", "num_experts": 2}}, ADAPTED]
        },  # gates of its own, which stay as drawn
        {"router": {"class_path": "zoo.moe.routers.XMoERouter", "init_args": {"k": 1}}},
    ],
    ids=["upcycled", "another gate"],
)
def test_frozen_weights_that_no_file_has_are_kept(arguments, make, tmp_path):
    dense = {"upcycled": True} if "convert" in arguments else {}
    tiny = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    if dense:
        from transformers import LlamaConfig, LlamaForCausalLM

        LlamaForCausalLM(LlamaConfig(**tiny, **heads)).save_pretrained(tmp_path / "base")
    else:
        zoo.save_pretrained(zoo.create_model("language/mixtral_tiny", **{**make.tiny, **tiny}), tmp_path / "base")
    task, trainer = adapted(tmp_path / "base", **arguments), make.trainer(max_steps=1)
    trainer.fit(task, make.data())
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    state = {name.removeprefix("model."): value for name, value in read(tmp_path / "it.ckpt")["state_dict"].items()}
    assert equal(state, task.model.state_dict())


def test_reads_what_was_written_whole(base, make, tmp_path, monkeypatch):
    """A checkpoint with all weights, as of a run before they were left out, is read as ever."""
    monkeypatch.setattr(Task, "left_out", lambda task: set())
    trainer = make.trainer(max_steps=2)
    task = adapted(base)
    trainer.fit(task, make.data())
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    monkeypatch.undo()
    assert len(read(tmp_path / "whole.ckpt")["state_dict"]) == len(task.model.state_dict())
    again = LanguageTask.load_from_checkpoint(tmp_path / "whole.ckpt")
    assert equal(again.model.state_dict(), task.model.state_dict())
