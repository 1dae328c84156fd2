"""Adapters trained by several processes on the command line: their checkpoints hold no frozen weights either."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_parallel_cli import BATCH, last, logged, same, spread, start, text
from torch.distributed.checkpoint import FileSystemReader

import zoo
from zoo.convert.adapting import adapter_state

__all__ = ["text"]
WAYS = {
    "parts": [*spread(expert=2)],
    "one file": [*spread(expert=2), "--trainer.strategy.init_args.save_distributed_checkpoint=false"],
    "ddp": ["--trainer.strategy=ddp"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_local_experts": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    zoo.save_pretrained(zoo.create_model("language/mixtral_tiny", vocab_size=259, **sizes, **heads), folder)
    return folder


def arguments(text: str, base: Path, folder: Path, share: int, steps: int) -> list[str]:
    model = [f"--model.pretrained={base}", "--model.convert=[{adapt: {kind: MoELoRA, num_experts: 3, rank: 2}}]"]
    model += ["--model.lr=0.02", "--model.warmup_steps=0", "--model.schedule=constant"]
    data = ["--data.source", text, "--data.sequence_length=32", f"--data.batch_size={BATCH // share}"]
    trainer = [f"--trainer.max_steps={steps}", "--trainer.limit_val_batches=2", f"--trainer.val_check_interval={steps}"]
    trainer += ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1"]
    trainer += ["--trainer.check_val_every_n_epoch=null", "--trainer.callbacks+=tasks.callbacks.SaveLast"]
    return ["language", "fit", *model, *data, *trainer, "--trainer.default_root_dir", str(folder)]


@pytest.fixture(scope="module")
def whole(text: str, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that does not stop, of two processes that have all of the model each."""
    folder = tmp_path_factory.mktemp("whole")
    start(2, [*arguments(text, base, folder, 2, 4), *WAYS["ddp"], "--model.export", str(folder / "model")])
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_a_run_goes_on_from_what_learns(way: str, text: str, base: Path, whole: Path, tmp_path: Path) -> None:
    start(2, [*arguments(text, base, tmp_path, 2, 2), *WAYS[way]])
    saved = Path(last(tmp_path))
    wanted = {f"model.{name}" for name in adapter_state(zoo.from_pretrained(whole / "model"))}
    if way == "parts":
        names = FileSystemReader(saved).read_metadata().state_dict_metadata
        assert {n.removeprefix("model.") for n in names if n.startswith("model.")} == wanted
    else:
        assert torch.load(saved, weights_only=True)["state_dict"].keys() == wanted
    on = [*arguments(text, base, tmp_path / "on", 2, 4), *WAYS[way], "--ckpt_path", str(saved)]
    start(2, [*on, "--model.export", str(tmp_path / "model")])
    assert logged(tmp_path / "on", "val/loss") == pytest.approx(logged(whole, "val/loss"), rel=1e-5)
    same(*(adapter_state(zoo.from_pretrained(folder / "model")) for folder in (tmp_path, whole)))
