"""Training by several processes on the command line: as torchrun or SLURM starts them, on one mesh and then on another.

Processes are copies of this one, which has imported everything; each runs the command line.
"""

from __future__ import annotations

import csv
import importlib
import logging
import os
import signal
import socket
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch import Callback
from torch import Tensor

import zoo
from tasks.__main__ import main
from zoo.parallel.strategy import _warn_of_restarts

CONFIG = Path(__file__).parents[2] / "configs" / "language" / "deepseek_v3_tiny.yaml"
STRATEGY = "zoo.parallel.ExpertParallelStrategy"
STEPS, MIDDLE, BATCH = 6, 3, 8


class Killed(Callback):
    """Ends process 1 as `kill -9` does, in the middle of a step."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == MIDDLE + 1:
            os.kill(os.getpid(), signal.SIGKILL)


class TimeEnds(Callback):
    """SLURM tells process 1 in the middle of a step that the job's time ends, and ends it with the next step."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == MIDDLE - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        if trainer.global_step == MIDDLE:
            os.kill(os.getpid(), signal.SIGKILL)


class Hung(Callback):
    """Process 1 stops answering."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 1:
            time.sleep(600)


class Poisoned(Callback):
    """A gradient of process 1's experts is not a number, once."""

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == MIDDLE and trainer.global_rank == trainer.world_size - 1:
            weight = pl_module.model.model.layers[1].mlp.experts.down_proj
            weight.grad.to_local()[0] = float("nan")


def arguments(text: str, folder: Path, share: int = 1, *more: str) -> list[str]:
    """The command line of a short run; a batch is split into so many shares."""
    small = {"num_hidden_layers": 2, "hidden_size": 32, "initializer_range": 0.2}
    model = [f"--model.overrides.{name}={value}" for name, value in small.items()]
    model += ["--model.losses={global_batch: 0.1}", "--model.warmup_steps=1", f"--model.schedule_steps={STEPS}"]
    data = ["--data.source", text, "--data.sequence_length=32", f"--data.batch_size={BATCH // share}"]
    trainer = [f"--trainer.max_steps={STEPS}", "--trainer.limit_val_batches=2", "--trainer.val_check_interval=3"]
    trainer += ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1"]
    trainer += ["--trainer.default_root_dir", str(folder), "--trainer.enable_model_summary=false"]
    return ["language", "fit", "--config", str(CONFIG), *model, *data, *trainer, *more]


def spread(**sizes: int) -> list[str]:
    """Options for a mesh of these sizes."""
    if not sizes:
        return ["--trainer.strategy=expert_parallel"]
    return [f"--trainer.strategy={STRATEGY}", *(f"--trainer.strategy.init_args.{n}={s}" for n, s in sizes.items())]


def process(rank: int, world: int, port: int, args: list[str], slurm: bool = False) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    place: dict[str, Any] = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if slurm:
        place |= {"SLURM_NTASKS": world, "SLURM_NTASKS_PER_NODE": world, "SLURM_NNODES": 1, "SLURM_JOB_NAME": "train"}
        place |= {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": 0, "SLURM_JOB_ID": 4242}
    else:
        place |= {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        place |= {"TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in place.items()})
    status = main([*args, f"--trainer.devices={world}"])
    if status:
        raise SystemExit(status)


def start(world: int, args: list[str], slurm: bool = False) -> None:
    """Run the command line in so many processes; raises what one of them did."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(process, args=(world, port, args, slurm), nprocs=world, start_method="fork")


def last(folder: Path, version: int = 0) -> str:
    return str(folder / "language" / f"version_{version}" / "checkpoints" / "last.ckpt")


def logged(folder: Path, figure: str, version: int = 0) -> list[float]:
    with (folder / "language" / f"version_{version}" / "metrics.csv").open() as file:
        return [float(row[figure]) for row in csv.DictReader(file) if row.get(figure)]


def weights(folder: Path) -> dict[str, Tensor]:
    return zoo.from_pretrained(folder).state_dict()


def same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-4) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = float((found[name] - value).abs().max())
        assert error <= tolerance * float(value.abs().max()), name


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "corpus.txt"
    file.write_text("\n\n".join(f"def f{i}(x):\n    return x * {i} + {i * i % 97}\n" * 6 for i in range(120)))
    return str(file)


@pytest.fixture(scope="module")
def alone(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by one process, without interruption, without a strategy."""
    folder = tmp_path_factory.mktemp("alone")
    torch.set_num_threads(1)
    assert main([*arguments(text, folder), "--trainer.devices=1", "--model.export", str(folder / "model")]) == 0
    return folder


@pytest.fixture(scope="module")
def half(text: str, alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first half of the same run, by two processes with half of the experts each, as SLURM starts them."""
    folder = tmp_path_factory.mktemp("half")
    start(2, [*arguments(text, folder, 2), *spread(expert=2), f"--trainer.max_steps={MIDDLE}"], slurm=True)
    return folder


def test_two_processes_go_as_one(alone: Path, half: Path) -> None:
    assert logged(half, "val/loss") == pytest.approx(logged(alone, "val/loss")[:1], rel=1e-5)
    assert logged(half, "val/load_max/model.layers.1.mlp") == logged(alone, "val/load_max/model.layers.1.mlp")[:1]
    assert sorted(p.name for p in Path(last(half)).iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "__1_0.distcp",
        "meta.pt",
    ]


@pytest.mark.parametrize(
    ("world", "sizes", "share"), [(1, {}, 1), (2, {"tensor": 2}, 1), (2, {"replicate": 2}, 2)], ids=str
)
def test_a_run_goes_on_on_another_mesh(
    world: int, sizes: dict[str, int], share: int, text: str, alone: Path, half: Path, tmp_path: Path
) -> None:
    args = [*arguments(text, tmp_path, share), *spread(**sizes), "--ckpt_path", last(half)]
    start(world, [*args, "--model.export", str(tmp_path / "model")])
    assert logged(tmp_path, "val/loss") == pytest.approx(logged(alone, "val/loss")[1:], rel=1e-5)
    same(weights(tmp_path / "model"), weights(alone / "model"))


def test_a_killed_process_ends_the_run_and_a_restart_goes_on(text: str, alone: Path, tmp_path: Path) -> None:
    every = ["--trainer.callbacks+=tasks.callbacks.SaveLast", "--trainer.callbacks.init_args.every_n_steps=1"]
    args = [*arguments(text, tmp_path, 2), *spread(expert=2), "--ckpt_path=auto"]
    args += ["--trainer.strategy.init_args.background_checkpoints=true"]
    kill = ["--trainer.callbacks+=test_parallel_cli.Killed"]
    with pytest.raises(mp.ProcessExitedException, match="process 1 terminated with signal SIGKILL"):
        start(2, [*args, *every, *kill])
    start(2, [*args, "--model.export", str(tmp_path / "model")])
    # It went on, and did not begin anew; the checkpoint of its last step may not have been whole yet.
    assert len(logged(tmp_path, "train/loss", 1)) in (STEPS - MIDDLE - 1, STEPS - MIDDLE)
    same(weights(tmp_path / "model"), weights(alone / "model"))


def test_a_job_whose_time_ends_is_saved_after_its_step_and_queued_again(
    text: str, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "bin" / "scontrol"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/queued\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent), prepend=os.pathsep)
    args = [*arguments(text, tmp_path, 2), *spread(expert=2)]
    with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
        start(2, [*args, "--trainer.callbacks+=test_parallel_cli.TimeEnds"], slurm=True)
    assert (tmp_path / "queued").read_text() == "requeue 4242\n"
    start(2, [*args, "--model.export", str(tmp_path / "model")], slurm=True)
    assert len(logged(tmp_path, "train/loss", 1)) == STEPS - MIDDLE
    same(weights(tmp_path / "model"), weights(alone / "model"))


def test_a_process_that_hangs_ends_the_run(text: str, tmp_path: Path) -> None:
    args = [*arguments(text, tmp_path, 2), *spread(expert=2), "--trainer.strategy.init_args.timeout=0:00:04"]
    with pytest.raises(mp.ProcessRaisedException, match=r"(?i)process 0 terminated[\s\S]*timed? ?out"):
        start(2, [*args, "--trainer.callbacks+=test_parallel_cli.Hung"])


def test_a_gradient_that_is_no_number_is_named_and_stops_the_run(text: str, tmp_path: Path) -> None:
    args = [*arguments(text, tmp_path, 2), *spread(expert=2), "--trainer.callbacks+=test_parallel_cli.Poisoned"]
    with pytest.raises(mp.ProcessRaisedException, match=r"step 4: the gradient of \S+experts.down_proj .* process 1"):
        start(2, args)


def test_a_step_with_such_a_gradient_is_left_out(text: str, tmp_path: Path) -> None:
    args = [*arguments(text, tmp_path, 2), *spread(expert=2), "--trainer.callbacks+=test_parallel_cli.Poisoned"]
    start(2, [*args, "--model.non_finite=skip", "--model.export", str(tmp_path / "model")])
    assert all(value.isfinite().all() for value in weights(tmp_path / "model").values())
    assert len(logged(tmp_path, "train/loss")) == STEPS


def test_sizes_that_do_not_make_the_world_stop_a_run_before_it_begins(text: str, tmp_path: Path, capfd: Any) -> None:
    with pytest.raises(mp.ProcessExitedException, match="exit code 2"):
        start(2, [*arguments(text, tmp_path, 2), *spread(expert=3)])
    assert "2 processes cannot be split as expert 3" in capfd.readouterr().err


def test_an_average_of_whole_weights_is_refused(text: str, tmp_path: Path, capsys: Any) -> None:
    args = [*arguments(text, tmp_path), *spread(), "--trainer.callbacks+=tasks.averaging.RunningAverage"]
    assert main([*args, "--trainer.devices=1"]) == 2
    assert "RunningAverage averages whole weights, and ExpertParallelStrategy" in capsys.readouterr().err


OTHERS = {
    "vision": ("vision/vmoe_digits.yaml", "val/top1", ["--model.overrides.embed_dim=16"]),
    "vision_language": (
        "vision_language/limoe_digits.yaml",
        "val/zero_shot_top1",
        ["--data.pictures={val: 20, test: 9}"],
    ),
    "recommendation": (
        "recommendation/demo.yaml",
        "val/rmse/task_1",
        ["--data.options={rows: 400}", "--trainer.callbacks=null"],
    ),
}


@pytest.mark.parametrize("domain", OTHERS)
def test_other_domains_train_and_export_too(domain: str, tmp_path: Path) -> None:
    config, figure, small = OTHERS[domain]
    importlib.import_module(f"tasks.{domain}")  # once, before the processes begin
    args = [domain, "fit", "--config", str(CONFIG.parents[1] / config), *small, *spread(expert=2)]
    args += ["--trainer.max_steps=3", "--trainer.val_check_interval=3", "--trainer.accelerator=cpu"]
    args += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    args += ["--trainer.default_root_dir", str(tmp_path), "--model.export", str(tmp_path / "model")]
    args += ["--data.batch_size=16", "--trainer.limit_val_batches=2"]
    start(2, args)
    with (tmp_path / domain / "version_0" / "metrics.csv").open() as file:
        (reached,) = [float(row[figure]) for row in csv.DictReader(file) if row.get(figure)]
    assert 0 <= reached < (100 if "rmse" in figure else 1.01)
    model = zoo.from_pretrained(tmp_path / "model")
    assert all(value.isfinite().all() for value in model.state_dict().values())
    if domain == "vision":
        assert model.pretrained_cfg["label_names"] == list("0123456789")


@pytest.mark.parametrize(
    ("shared", "restarts", "told"), [("True", "3", True), ("False", "3", False), ("True", "0", False)]
)
def test_restarts_that_would_hang_are_warned_of(monkeypatch, recwarn, shared: str, restarts: str, told: bool) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    _warn_of_restarts()
    assert [("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in str(w.message)) for w in recwarn] == [True] * told
