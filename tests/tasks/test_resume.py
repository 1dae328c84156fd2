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


class StopAt(pl.Callback):
    """As Ctrl-C, early stopping or a limit of time do."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step >= self.step


class Seen(pl.Callback):
    """Rows of each epoch, by what Lightning calls it."""

    def __init__(self):
        self.rows = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows.setdefault(trainer.current_epoch, []).extend(batch["input_ids"].tolist())


EACH = {"every_n_train_steps": 3, "save_top_k": -1, "filename": "at"}


@pytest.mark.parametrize(
    ("trainer", "saver"),
    [
        ({"callbacks": lambda folder: [StopAt(5), SaveLast()]}, "checkpoints/last.ckpt"),
        ({"max_epochs": 1, "callbacks": lambda folder: [SaveLast()]}, "checkpoints/last.ckpt"),
        ({"max_epochs": 1, "callbacks": lambda folder: [ModelCheckpoint(folder, filename="at")]}, "at.ckpt"),
        ({"callbacks": lambda folder: [StopAt(4), ModelCheckpoint(folder, **EACH)]}, "at.ckpt"),
        ({"max_steps": 3, "callbacks": lambda folder: [SaveLast()]}, "checkpoints/last.ckpt"),
        ({"limit_train_batches": 2, "callbacks": lambda folder: [StopAt(4), SaveLast()]}, "checkpoints/last.ckpt"),
        ({"limit_train_batches": 2, "callbacks": lambda folder: [StopAt(3), SaveLast()]}, "checkpoints/last.ckpt"),
    ],
    ids=["middle", "end", "saved at the end", "saved after the last batch", "steps", "limited", "limited, middle"],
)
@pytest.mark.parametrize("goal", [{"max_epochs": 4}, {"max_epochs": 4, "max_steps": 100}])
def test_epochs_go_on_where_they_were(make, tmp_path, trainer, saver, goal):
    """An epoch of three batches, or of two; the reference is a run that never stopped."""
    fixed = {"limit_train_batches": trainer["limit_train_batches"]} if "limit_train_batches" in trainer else {}

    def fit(callbacks, path=None, **options):
        pl.seed_everything(1 if path is None else 999, verbose=False)
        task, seen = make.task(router=make.noisy, schedule_steps=12), Seen()
        keeps = any(isinstance(c, ModelCheckpoint) for c in callbacks)
        options = {"enable_checkpointing": keeps, "callbacks": [seen, *callbacks], **fixed, **options}
        options["limit_val_batches"] = 1  # at the end of each epoch
        run = make.trainer(**options)
        run.fit(task, make.data(batch_size=30), ckpt_path=path)
        return state_of(task), seen.rows, run.current_epoch

    straight, rows, epochs = fit([], **goal)
    assert [len(part) for part in rows.values()] == [30 * fixed.get("limit_train_batches", 3)] * 4
    fit(trainer["callbacks"](tmp_path), **{**goal, **{n: v for n, v in trainer.items() if n.startswith("max_")}})
    resumed, rest, ended = fit([], tmp_path / saver, **goal)
    assert ended == epochs == 4
    assert all(part == rows[epoch][-len(part) :] for epoch, part in rest.items())
    assert list(rest) == list(rows)[-len(rest) :]
    assert_same(resumed, straight)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_another_batch_size_repeats_and_skips_nothing(make, tmp_path, size):
    """The rest of the epoch's rows, in their order, as far as they fill batches."""
    whole, rest = Seen(), Seen()
    run(make, 20, data={"batch_size": 4}, callbacks=[whole])
    run(make, 5, save_at=5, folder=tmp_path, data={"batch_size": 4})
    [checkpoint] = tmp_path.glob("*step=5.ckpt")
    trainer = make.trainer(max_epochs=1, callbacks=[rest])  # the schedule asks how long an epoch is
    trainer.fit(make.task(router=make.noisy), make.data(batch_size=size), ckpt_path=checkpoint)
    rows = len(make.data().packed("train")) - 20
    assert len(rest.rows[0]) == rows // size * size
    assert rest.rows[0][:40] == whole.rows[0][20:60]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"sequence_length": 16}, r"sequence_length was 32 and is 16"),
        ({"seed": 3}, r"seed was 0 and is 3; their epoch begins anew"),
    ],
)
def test_a_place_among_other_rows_is_not_gone_on_from(make, tmp_path, data, message):
    fresh, resumed = Seen(), Seen()
    run(make, 5, save_at=5, folder=tmp_path)
    [checkpoint] = tmp_path.glob("*step=5.ckpt")
    run(make, 2, data=data, callbacks=[fresh])
    with pytest.warns(UserWarning, match=message):
        run(make, 7, ckpt_path=checkpoint, data=data, callbacks=[resumed])
    assert resumed.rows == fresh.rows
