"""Processes that have the same data, as those of a tensor group do, count and write it once."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tasks.__main__ import main
from tasks.predictions import write_predictions

CONFIG = Path(__file__).parents[2] / "configs" / "vision_language" / "limoe_digits.yaml"
FIGURES = ("val/loss", "val/text_recall_1", "val/image_recall_1", "val/zero_shot_top1")
SHARES = {"two shares": [0, 1], "one share": [0, 0]}


def arguments(folder: Path) -> list[str]:
    """The command line of a short run, without anything random in it."""
    gate = "{name: TopKRouter, k: 2, noise: null, capacity: null}"
    model = [f"--model.router={gate}", "--model.overrides.embed_dim=32", "--model.overrides.depth=2"]
    data = ["--data.pictures={train: 256, val: 40, test: 20}", "--data.batch_size=32"]
    trainer = ["--trainer.max_steps=4", "--trainer.val_check_interval=4", "--trainer.accelerator=cpu"]
    trainer += ["--trainer.enable_progress_bar=false", "--trainer.default_root_dir", str(folder)]
    trainer += ["--trainer.log_every_n_steps=1", "--trainer.enable_model_summary=false"]
    return ["vision_language", "fit", "--config", str(CONFIG), *model, *data, *trainer]


def logged(folder: Path) -> dict[str, list[float]]:
    (file,) = folder.rglob("metrics.csv")
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    names = [name for name in rows[0] if name in FIGURES or name == "train/loss"]
    return {name: [float(row[name]) for row in rows if row[name]] for name in names}


def test_a_tensor_group_contrasts_and_finds_its_pairs_once(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    assert main([*arguments(tmp_path / "alone"), "--trainer.devices=1"]) == 0
    several = importlib.import_module("test_parallel_cli")
    several.start(2, [*arguments(tmp_path / "two"), *several.spread(tensor=2)])
    found, expected = logged(tmp_path / "two"), logged(tmp_path / "alone")
    assert len(expected["train/loss"]) == 4
    assert {"val/text_recall_1", "val/zero_shot_top1"} < expected.keys() == found.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-4), name


def write(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name, shares in SHARES.items():
        share = {"rank": shares[rank], "num_replicas": len(set(shares))}
        trainer = SimpleNamespace(world_size=2, is_global_zero=rank == 0, distributed_sampler_kwargs=share)
        rows: Any = [[{"image": 10 * batch + shares[rank]}] for batch in range(3)]
        write_predictions(f"{folder}/{name}.csv", trainer, rows)
    dist.destroy_process_group()


def test_predictions_are_written_once_a_share(tmp_path: Path) -> None:
    mp.start_processes(write, args=(str(tmp_path),), nprocs=2, start_method="fork")
    for name, expected in {"two shares": [0, 1, 10, 11, 20, 21], "one share": [0, 10, 20]}.items():
        with (tmp_path / f"{name}.csv").open() as file:
            assert [int(row["image"]) for row in csv.DictReader(file)] == expected
