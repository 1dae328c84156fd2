"""A run that stops and goes on ends bit for bit where one that never stopped does."""

import math
import os
import random
import signal

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tasks.averaging import RunningAverage
from tasks.callbacks import SaveLast
from tasks.schemes import ExpertAveraging

NOISY = {"class_path": "zoo.moe.routers.TopKRouter", "init_args": {"jitter": 0.1, "selection_bias": True}}


def state_of(task):
    """Parameters, buffers and optimizer state, by name."""
    state = {f"model.{k}": v.clone() for k, v in task.model.state_dict().items()}
    optimizer = task.optimizers(use_pl_optimizer=False).state_dict()["state"]
    for i, entries in optimizer.items():
        state.update({f"optimizer.{i}.{k}": v.clone() for k, v in entries.items()})
    return state


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def run(make, steps, ckpt_path=None, save_at=None, folder=None, data=None, task=None, **trainer):
    """Train to `steps`; with save_at keep a checkpoint of that step in `folder`."""
    pl.seed_everything(1 if ckpt_path is None else 999, verbose=False)
    arguments = {"overrides": {"attention_dropout": 0.1}, "router": make.noisy, "losses": {"switch": 0.1, "z": 0.01}}
    task = make.task(**{**arguments, **(task or {})})
    if save_at:
        saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=save_at, save_top_k=-1)
        trainer.update(callbacks=[*trainer.get("callbacks", []), saver], enable_checkpointing=True)
    trainer = make.trainer(max_steps=steps, gradient_clip_val=0.5, **trainer)
    trainer.fit(task, make.data(**(data or {})), ckpt_path=ckpt_path)
    assert trainer.global_step == steps
    return state_of(task)


# About a hundred training sequences: with 4 a batch an epoch has some 25 batches, with 30 it has 3.
@pytest.mark.parametrize(
    ("data", "trainer", "task"),
    [
        pytest.param({}, {}, {}, id="middle of an epoch"),
        pytest.param({"num_workers": 2}, {"accumulate_grad_batches": 2}, {}, id="accumulation and workers"),
        pytest.param({"batch_size": 30}, {}, {}, id="across epochs"),
        pytest.param({}, {"limit_val_batches": 2, "val_check_interval": 2}, {}, id="validation in between"),
        pytest.param({}, {"precision": "bf16-mixed"}, {"activation_checkpointing": True}, id="bf16 and recomputation"),
    ],
)
def test_resuming_is_exact(make, tmp_path, data, trainer, task):
    straight = run(make, 6, save_at=3, folder=tmp_path, data=data, task=task, **trainer)
    [checkpoint] = tmp_path.glob("*step=3.ckpt")
    assert_same(run(make, 6, ckpt_path=checkpoint, data=data, task=task, **trainer), straight)


def test_resuming_on_two_processes_is_exact(make, tmp_path):
    class Keep(pl.Callback):
        def __init__(self, name):
            self.name = name

        def on_fit_end(self, trainer, pl_module):
            if trainer.is_global_zero:
                torch.save(state_of(pl_module), tmp_path / self.name)

    def train(name, **arguments):
        seed = 1 if "ckpt_path" not in arguments else 999
        pl.seed_everything(seed, verbose=False)
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        callbacks = [Keep(name), saver]
        trainer = make.trainer(
            max_steps=4, strategy="ddp_fork", devices=2, callbacks=callbacks, enable_checkpointing=True
        )
        task = make.task(router=make.noisy, overrides={"attention_dropout": 0.1})
        trainer.fit(task, make.data(), **arguments)

    train("straight.pt")
    saved = torch.load(tmp_path / "step=2.ckpt")
    assert len(saved["exact_resume"]["random"]) == 2
    train("resumed.pt", ckpt_path=tmp_path / "step=2.ckpt")
    assert_same(torch.load(tmp_path / "resumed.pt"), torch.load(tmp_path / "straight.pt"))


@pytest.mark.parametrize(
    ("trainer", "callbacks"),
    [
        ({}, list),
        ({"accumulate_grad_batches": 2}, list),
        ({}, lambda: [RunningAverage(share=1.0, every_n_steps=1)]),
        ({}, lambda: [ExpertAveraging(0.1)]),
    ],
    ids=["plain", "accumulation", "average of weights", "experts merged at the end"],
)
def test_a_run_that_ended_can_be_made_longer(make, tmp_path, trainer, callbacks):
    task, last = {"schedule_steps": 6}, tmp_path / "checkpoints" / "last.ckpt"
    straight = run(make, 6, task=task, callbacks=callbacks(), **trainer)
    run(make, 3, task=task, callbacks=[*callbacks(), SaveLast(every_n_steps=2)], **trainer)
    assert torch.load(last)["global_step"] == 3
    assert_same(run(make, 6, ckpt_path=last, task=task, callbacks=callbacks(), **trainer), straight)


def test_ctrl_c_ends_the_step_and_leaves_a_checkpoint_that_continues_exactly(make, tmp_path, capsys):
    class PressCtrlC(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 4:  # the first of the two micro-batches of step 3
                os.kill(os.getpid(), signal.SIGINT)

    window, last = {"accumulate_grad_batches": 2}, tmp_path / "checkpoints" / "last.ckpt"
    straight = run(make, 6, **window)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(AssertionError):  # fewer steps than asked for
        run(make, 6, callbacks=[PressCtrlC(), SaveLast()], **window)
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopped after step 3" in capsys.readouterr().out
    assert torch.load(last)["global_step"] == 3
    assert [p.name for p in last.parent.iterdir()] == ["last.ckpt"]
    assert_same(run(make, 6, ckpt_path=last, **window), straight)


def test_a_run_without_logs_keeps_the_checkpoint_of_the_one_before(make, tmp_path):
    folder = tmp_path / "checkpoints"
    for steps, names in ((1, ["last.ckpt"]), (2, ["last-v1.ckpt", "last.ckpt"])):
        run(make, steps, callbacks=[SaveLast()])
        assert sorted(p.name for p in folder.iterdir()) == names
    assert [torch.load(folder / name)["global_step"] for name in ("last.ckpt", "last-v1.ckpt")] == [1, 2]
    # One that goes on from a checkpoint replaces it.
    run(make, 3, ckpt_path=folder / "last.ckpt", callbacks=[SaveLast()])
    assert sorted(p.name for p in folder.iterdir()) == ["last-v1.ckpt", "last.ckpt"]
    assert [torch.load(folder / name)["global_step"] for name in ("last.ckpt", "last-v1.ckpt")] == [3, 2]


def test_a_second_ctrl_c_ends_the_run_at_once(make):
    saver = SaveLast()
    saver._interrupt(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        saver._interrupt(signal.SIGINT, None)


@pytest.mark.parametrize(
    "gate", [NOISY, {"name": "SkyworkRouter", "capacity": {"factor": 0.6}, "decay": 0.5}, {"name": "ReMoERouter"}]
)
def test_a_checkpoint_inside_an_accumulation_window_keeps_its_gradients_and_counts(make, tmp_path, gate):
    class SaveAfter(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 4:  # the second of the three micro-batches of step 2
                trainer.save_checkpoint(tmp_path / "inside.ckpt")

    # A gate that counts since its last step: what it counted before the checkpoint must not be lost.
    window, task = {"accumulate_grad_batches": 3}, {"router": gate, "losses": {"z": 0.01}}
    straight = run(make, 4, callbacks=[SaveAfter()], task=task, **window)
    assert_same(run(make, 4, ckpt_path=tmp_path / "inside.ckpt", task=task, **window), straight)


def test_all_generators_continue(make, tmp_path):
    drawn = []

    class Draw(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))

    run(make, 6, save_at=3, folder=tmp_path, callbacks=[Draw()])
    straight, drawn[:] = drawn[:], []
    [checkpoint] = tmp_path.glob("*step=3.ckpt")
    run(make, 6, ckpt_path=checkpoint, callbacks=[Draw()])
    # The checkpoint is written after step 3's own draws.
    assert drawn == straight[3:]


def test_another_tokenizer_is_refused(make, tmp_path):
    run(make, 1, save_at=1, folder=tmp_path)
    [checkpoint] = tmp_path.glob("*.ckpt")
    with pytest.raises(ValueError, match="trained with another tokenizer"):
        run(make, 2, ckpt_path=checkpoint, data={"tokenizer": "bpe:270"}, task={"vocab_size": 300})


def test_a_resumed_run_goes_by_its_own_learning_rate_decay_and_betas(make, tmp_path):
    """The reference: AdamW's own state, and the schedule in closed form, at the step where the first run stopped."""
    seen = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            [optimizer] = trainer.optimizers
            seen.append([{k: group[k] for k in ("lr", "weight_decay", "betas")} for group in optimizer.param_groups])

    options = {"schedule": "cosine", "min_lr_ratio": 0.25}
    run(make, 3, save_at=3, folder=tmp_path, task={**options, "lr": 1e-2, "schedule_steps": 8})
    [checkpoint] = tmp_path.glob("*step=3.ckpt")
    told = {**options, "lr": 3e-3, "schedule_steps": 6, "weight_decay": 0.5, "betas": (0.7, 0.8)}
    moved = run(make, 5, ckpt_path=checkpoint, task=told, callbacks=[Look()])
    assert moved["optimizer.0.step"] == 5  # the moments are the checkpoint's
    for step, groups in zip((3, 4), seen, strict=True):
        rate = 3e-3 * (0.25 + 0.75 * (1 + math.cos(math.pi * (step - 2) / (6 - 2))) / 2)
        assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
        for group in groups:
            assert group["betas"] == (0.7, 0.8)
            assert group["lr"] == pytest.approx(rate, rel=1e-12)
