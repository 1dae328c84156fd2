"""Adapted models in the training task, and the script that compares them."""

import runpy
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import zoo
from tasks.language import LanguageData, LanguageTask
from zoo.convert.adapting import adapter_state, base_state

SCRIPT = Path(__file__).parents[2] / "scripts" / "adapt_language.py"


def llama():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=259, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes))


@pytest.mark.parametrize("kind", ["MixLoRA", "AdaMix"])
def test_the_task_trains_adapters_with_their_losses_and_exports_them(kind, text, tmp_path):
    pl.seed_everything(0)
    base = llama()
    made = zoo.adapt(base, kind)
    before = {name: tensor.clone() for name, tensor in adapter_state(made).items()}
    task = LanguageTask(
        made, lr=0.05, warmup_steps=0, schedule="constant", export=str(tmp_path / "out"), activation_checkpointing=True
    )
    data = LanguageData(str(text), sequence_length=32, batch_size=4)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_steps=3, limit_val_batches=1, gradient_clip_val=1.0, **options)
    trainer.fit(task, data)
    assert any("switch" in name for name in trainer.logged_metrics) == (kind == "MixLoRA")
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in base_state(task.model).items())
    assert not all(torch.equal(tensor, before[name]) for name, tensor in adapter_state(task.model).items())
    again = zoo.from_pretrained(tmp_path / "out", base=base)
    assert all(torch.equal(tensor, task.model.state_dict()[name]) for name, tensor in adapter_state(again).items())


@pytest.mark.parametrize("kind", ["MOELoRA", "AdaMix"])
def test_a_mixture_is_held_against_a_lora_of_its_size(kind, tmp_path, monkeypatch, capsys):
    source = tmp_path / "text"
    source.mkdir()
    for domain in ("first", "second"):
        for i in range(4):
            (source / f"{domain}{i}.txt").write_text(f"{domain} domain says {i} " * 40)
    monkeypatch.chdir(tmp_path)
    domains = [str(source / f"{domain}*") for domain in ("first", "second")]
    options = ["--kind", kind, "--steps", "2", "--base-steps", "2", "--length", "16", "--batch", "2"]
    monkeypatch.setattr(
        sys, "argv", ["adapt_language.py", *options, "--consistency", "0.1", "--out", "out", "--domains", *domains]
    )
    runpy.run_path(str(SCRIPT), run_name="__main__")
    rows = [line.rsplit(maxsplit=3) for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[0] for row in rows] == ["frozen", "one LoRA", kind]
    one, many = (int(row[1].replace(",", "")) for row in rows[1:])
    assert abs(one - many) < 0.5 * many
    assert (tmp_path / "out" / "adapters.safetensors").is_file()


def test_adapters_beside_whole_mlps_may_be_exported(make, tmp_path):
    """The arguments are checked before training: no published layout has a place for them, but their folder has."""
    convert = [{"adapt": {"kind": "LLaVA-MoLE", "num_experts": 2}}]
    task, data = make.task(convert=convert, vocab_size=259, export=str(tmp_path / "out")), make.data()
    task.check(data)
    make.trainer(max_steps=1).fit(task, data)
    assert (tmp_path / "out" / "adapters.safetensors").is_file()


def test_gates_that_hear_what_tasks_do_not_tell_are_refused_before_training(make):
    with pytest.raises(ValueError, match="the gates of MoR1E hear intuition of each sample, and tasks tell"):
        make.task(convert=[{"adapt": {"kind": "MoR1E"}}])


ADAPTED = {"kind": "MoELoRA", "num_experts": 3, "rank": 2}


@pytest.mark.parametrize("way", ["read", "made"])
def test_adapters_beside_few_bits_from_a_config(way, make, tmp_path):
    """Read in few bits, or made so; trained, stopped and resumed; exported, and read beside what they stand beside."""
    sparse = zoo.create_model("language/mixtral_tiny", vocab_size=259, **make.tiny).eval()
    zoo.save_pretrained(sparse, tmp_path / "base")
    made = [{"quantise": {"format": "int8"}}] if way == "made" else []
    said = {
        "pretrained": str(tmp_path / "base"),
        "overrides": {"quantise": "int8"} if way == "read" else {},
        "convert": [*made, {"adapt": ADAPTED}],
        "lr": 0.05,
        "warmup_steps": 0,
        "schedule": "constant",
    }
    found = []
    for stops in (False, True):
        checkpoint, out = None, str(tmp_path / f"out{stops}")
        pl.seed_everything(0)
        if stops:
            trainer, checkpoint = make.trainer(max_steps=2), tmp_path / "stopped.ckpt"
            trainer.fit(LanguageTask("language/mixtral_tiny", **said), make.data())
            trainer.save_checkpoint(checkpoint)
        task = LanguageTask("language/mixtral_tiny", **said, export=out)
        make.trainer(max_steps=4).fit(task, make.data(), ckpt_path=checkpoint)
        base = zoo.quantise(sparse, "int8")
        assert all(torch.equal(t, base.state_dict()[n]) for n, t in base_state(task.model).items())
        again = zoo.from_pretrained(out)
        assert all(torch.equal(t, task.model.state_dict()[n]) for n, t in again.state_dict().items())
        found.append(adapter_state(again))
    assert any(n.endswith("lora.b") and t.any() for n, t in found[0].items())
    assert all(torch.equal(t, found[1][n]) for n, t in found[0].items())
