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
