"""Checkpoints of one file on the command line: what one process wrote, or a mesh gathered, other meshes go on with."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from test_parallel_cli import CONFIG, MIDDLE, alone, arguments, last, logged, same, spread, start, text, weights

from tasks.__main__ import main
from zoo.parallel import Mesh, Sizes, parallelize
from zoo.parallel import checkpoint as store

__all__ = ["alone", "text"]
GATHERED = "--trainer.strategy.init_args.save_distributed_checkpoint=false"


@pytest.fixture(scope="module")
def halves(text: str, alone: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checkpoints of the first half of the same run: by one process without a strategy, and gathered from two."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("plain", "gathered", "parts")}
    torch.set_num_threads(1)
    half = f"--trainer.max_steps={MIDDLE}"
    assert main([*arguments(text, folders["plain"]), "--trainer.devices=1", half]) == 0
    start(2, [*arguments(text, folders["gathered"], 2), *spread(expert=2), GATHERED, half])
    start(1, [*arguments(text, folders["parts"]), *spread(), half])
    return {kind: last(folder) for kind, folder in folders.items()}


@pytest.mark.parametrize("kind", ["plain", "gathered"])
@pytest.mark.parametrize(("sizes", "share"), [({"expert": 2}, 2), ({"tensor": 2}, 1)], ids=str)
def test_another_mesh_goes_on_with_one_file(
    kind: str,
    sizes: dict[str, int],
    share: int,
    text: str,
    alone: Path,
    halves: dict[str, str],
    tmp_path: Path,
) -> None:
    assert Path(halves[kind]).is_file()
    args = [*arguments(text, tmp_path, share), *spread(**sizes), "--ckpt_path", halves[kind]]
    start(2, [*args, "--model.export", str(tmp_path / "model")])
    assert logged(tmp_path, "val/loss") == pytest.approx(logged(alone, "val/loss")[1:], rel=1e-5)
    same(weights(tmp_path / "model"), weights(alone / "model"))
    for group in range(3):  # each group learns at the schedule's rate from its first step on
        assert logged(tmp_path, f"lr-AdamW/pg{group + 1}")[1:] == logged(alone, "lr-AdamW/pg1")[MIDDLE + 1 :]


def test_one_process_goes_on_with_what_a_mesh_gathered_without_its_strategy(
    text: str, alone: Path, halves: dict[str, str], tmp_path: Path
) -> None:
    args = [*arguments(text, tmp_path), "--trainer.devices=1", "--ckpt_path", halves["gathered"]]
    assert main([*args, "--model.export", str(tmp_path / "model")]) == 0
    assert logged(tmp_path, "val/loss") == pytest.approx(logged(alone, "val/loss")[1:], rel=1e-5)
    same(weights(tmp_path / "model"), weights(alone / "model"))
    for group in range(2):
        assert logged(tmp_path, f"lr-AdamW/pg{group + 1}")[1:] == logged(alone, "lr-AdamW/pg1")[MIDDLE + 1 :]


def test_parts_without_a_strategy_that_reads_them_are_one_line(
    text: str,
    halves: dict[str, str],
    tmp_path: Path,
    capsys: Any,
) -> None:
    args = [*arguments(text, tmp_path), "--trainer.devices=1", "--ckpt_path", halves["parts"]]
    assert main(args) == 2
    assert "is a checkpoint in parts, which trainer.strategy expert_parallel reads" in capsys.readouterr().err


def test_texts_are_generated_by_one_process(
    text: str,
    halves: dict[str, str],
    tmp_path: Path,
    capsys: Any,
) -> None:
    small = ["--model.overrides.num_hidden_layers=2", "--model.overrides.hidden_size=32", "--model.max_new_tokens=3"]
    data = ["--data.source", text, "--data.prompts=[def f, return]", "--trainer.accelerator=cpu"]
    args = ["language", "predict", "--config", str(CONFIG), *small, *data, "--ckpt_path", halves["parts"]]
    args += ["--trainer.default_root_dir", str(tmp_path), "--trainer.enable_progress_bar=false"]
    assert main([*args, *spread(expert=2), "--trainer.devices=2"]) == 2
    assert "predict: 2 processes with a model in parts cannot generate texts" in capsys.readouterr().err
    start(1, [*args, *spread()])


def test_a_recommendation_run_goes_on_from_parts_with_learnt_weights_of_tasks(tmp_path: Path, capsys: Any) -> None:
    importlib.import_module("tasks.recommendation")  # once, before the processes begin
    config = CONFIG.parents[1] / "recommendation" / "demo.yaml"
    args = ["recommendation", "fit", "--config", str(config), "--data.options={rows: 400}", "--trainer.callbacks=null"]
    args += ["--model.schedule_steps=6", "--trainer.val_check_interval=3", "--trainer.accelerator=cpu"]
    args += ["--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1", "--model.weighting=uncertainty"]

    def figures(folder: Path) -> list[float]:
        with (folder / "recommendation" / "version_0" / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        names = ("val/rmse/task_1", "train/weight/task_1", "train/weight/task_2")
        return [float(row[name]) for name in names for row in rows if row.get(name)]

    whole, half, rest = (tmp_path / name for name in ("whole", "half", "rest"))
    root = "--trainer.default_root_dir"
    start(1, [*args, root, str(whole), "--data.batch_size=32", "--trainer.max_steps=6"])
    start(2, [*args, root, str(half), "--data.batch_size=16", *spread(expert=2), "--trainer.max_steps=3"])
    saved = half / "recommendation" / "version_0" / "checkpoints" / "last.ckpt"
    on = [*args, "--data.batch_size=16", *spread(shard=2), "--trainer.max_steps=6", "--ckpt_path", str(saved)]
    start(2, [*on, root, str(rest)])
    found = [a for pair in zip(grouped(figures(half)), grouped(figures(rest))) for part in pair for a in part]
    assert found == pytest.approx(figures(whole), rel=1e-4)
    mistaken = [*on, root, str(tmp_path), "--model.weighting=gradnorm", "--trainer.devices=2"]
    assert main(mistaken) == 2
    assert "gradnorm compares gradients at whole shared parameters" in capsys.readouterr().err


def grouped(figures: list[float]) -> list[list[float]]:
    """An evaluation, and two weights at each of three steps."""
    return [figures[:1], figures[1:4], figures[4:]]


def other_groups(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
    net = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(2)))
    plain = torch.optim.AdamW([{"params": [p]} for p in net.parameters()])
    file = Path(folder) / "it.ckpt"
    torch.save({"state_dict": net.state_dict(), "optimizer_states": [plain.state_dict()]}, file)
    model = parallelize(net, Mesh(Sizes()))
    fewer = torch.optim.AdamW(list(model.parameters())[:3])
    with pytest.raises(ValueError, match=r"it.ckpt: its optimizer has groups of \[1, 1, 1, 1\] .* not those of \[3\]"):
        store.load_file(file, model, [fewer])
    torch.distributed.destroy_process_group()


def test_an_optimizer_of_other_parameters_is_named(tmp_path: Path) -> None:
    mp.start_processes(other_groups, args=(str(tmp_path),), nprocs=1, start_method="fork")
