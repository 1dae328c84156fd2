"""Schemes and a teacher from a YAML file, from start to end."""

from pathlib import Path

import torch
import yaml

import zoo
from tasks.__main__ import main
from zoo.moe import MoE


def config(text, folder, tiny, **model):
    pruning = {"class_path": "tasks.schemes.ExpertPruning", "init_args": {"every_n_steps": 1, "until_step": 2}}
    averaging = {"class_path": "tasks.schemes.ExpertAveraging", "init_args": {"rate": 0.1}}
    content = {
        "data": {"source": str(text), "sequence_length": 32, "batch_size": 4},
        "model": {"network": "language/mixtral_tiny", "overrides": tiny, **model},
        "trainer": {
            "max_steps": 3,
            "limit_val_batches": 1,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "default_root_dir": str(folder),
            "callbacks": [pruning, averaging],
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder / "config.yaml"


def test_fit_prunes_with_a_teacher_and_its_checkpoint_is_read(text, make, tmp_path, capsys):
    torch.manual_seed(0)
    teacher = zoo.create_model("language/mixtral_tiny", vocab_size=259, **make.tiny)
    zoo.save_pretrained(teacher, tmp_path / "teacher")
    more = {"teacher": {"pretrained": str(tmp_path / "teacher"), "weight": 0.5}, "export": str(tmp_path / "out")}
    path = config(text, tmp_path, make.tiny, **more)
    assert main(["language", "fit", "--config", str(path)]) in (0, None), capsys.readouterr().err
    exported = zoo.from_pretrained(tmp_path / "out")
    assert [m.router.num_experts for m in exported.modules() if isinstance(m, MoE)] == [1, 1]
    (checkpoint,) = Path(tmp_path).rglob("last.ckpt")
    assert not any("teacher" in name for name in torch.load(checkpoint, weights_only=False)["state_dict"])
    arguments = ["--config", str(path), "--ckpt_path", str(checkpoint), "--model.export=null"]
    assert main(["language", "validate", *arguments]) in (0, None), capsys.readouterr().err


def test_a_teacher_that_does_not_fit_is_an_error_before_training(text, make, tmp_path, capsys):
    teacher = zoo.create_model("language/mixtral_tiny", vocab_size=100, **make.tiny)
    zoo.save_pretrained(teacher, tmp_path / "teacher")
    path = config(text, tmp_path, make.tiny, teacher={"pretrained": str(tmp_path / "teacher")}, vocab_size=259)
    assert main(["language", "fit", "--config", str(path)]) == 2
    assert "teacher: its vocabulary has 100 tokens, the model's 259" in capsys.readouterr().err


def test_a_model_that_cannot_be_exported_without_its_experts_is_an_error_before_training(tmp_path, capsys):
    limoe = Path(__file__).parents[2] / "configs" / "vision_language" / "limoe_digits.yaml"
    pruning = {"class_path": "tasks.schemes.ExpertPruning", "init_args": {"every_n_steps": 1, "until_step": 2}}
    quiet = {"enable_progress_bar": False, "default_root_dir": str(tmp_path), "callbacks": [pruning]}
    trainer = {"max_steps": 2, "limit_val_batches": 1, "accelerator": "cpu", **quiet}
    (tmp_path / "pruned.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    run = ["vision_language", "fit", "--config", str(limoe), "--config", str(tmp_path / "pruned.yaml")]
    run += ["--data.pictures={train: 64, val: 16, test: 16}", "--data.batch_size=16"]
    assert main([*run, "--model.export", str(tmp_path / "out")]) == 2
    assert "export: the layout of vision_language/limoe_tiny cannot say" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.ckpt"))
    assert main(run) == 0
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    state = torch.load(checkpoint, weights_only=False)["state_dict"]
    assert {len(tensor) for name, tensor in state.items() if name.endswith("experts.down_proj")} == {1}
