"""Conversions that look at data, and checkpoints: what is in one is not looked for again."""

import inspect

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

import zoo
from tasks import conversions
from tasks.__main__ import main
from tasks.averaging import RunningAverage
from tasks.language import LanguageTask

SPLIT = {"num_experts": 4, "calibrate": 1}
SAID = {
    "experts": [{"prune": {"keep": 2, "calibrate": 1}}],
    "layers": [{"prune": {"drop_layers": 1, "layers": [1], "calibrate": 1}}],
    "merged": [{"to_dense": {"weights": "usage", "scale": "usage", "calibrate": 1}}],
    "used": [{"to_dense": {"method": {"expert": "used"}, "calibrate": 1}}],
    "co-activation": ["to_dense", {"split": {**SPLIT, "method": "coactivation"}}],
    "importance": ["to_dense", {"split": {**SPLIT, "method": "importance", "shared": 2, "expert_dim": 5, "k": 1}}],
    "foretold": ["to_dense", {"split": {**SPLIT, "router": "MoEficationRouter"}}],
    "in turn": [{"prune": {"keep": 3, "calibrate": 1}}, {"prune": {"keep": [1, 2], "by": "counts", "calibrate": 2}}],
}


def no_data(*args):
    raise AssertionError("a conversion looked at data")


def test_every_conversion_that_looks_at_data_says_how_it_is_made_again():
    named = {name: getattr(zoo, name) for name in conversions.CONVERSIONS}
    looks = {n for n, function in named.items() if conversions.CALIBRATE in inspect.signature(function).parameters}
    assert looks == {n for n, function in named.items() if hasattr(function, "again")}
    assert looks >= {"prune", "split", "to_dense"}


@pytest.mark.filterwarnings("ignore:prune. .* keeps 1 of")
@pytest.mark.parametrize("kind", SAID)
@pytest.mark.parametrize("subcommand", ["validate", "fit"])
def test_what_a_checkpoint_has_is_not_looked_for_again(kind, subcommand, make, monkeypatch):
    task, trainer = make.task(convert=SAID[kind]), make.trainer(max_steps=2)
    trainer.fit(task, make.data(batch_size=2))
    path = trainer.default_root_dir + "/kept.ckpt"
    trainer.save_checkpoint(path)
    monkeypatch.setattr(conversions, "_losses", no_data)
    torch.manual_seed(1)
    again, data = make.task(convert=SAID[kind]), make.data(batch_size=2)
    trainer = make.trainer(max_steps=2, limit_val_batches=1)
    again.check_run(trainer, data, subcommand, path)  # as the command line does
    getattr(trainer, subcommand)(again, data, ckpt_path=path)
    state = torch.load(path)["state_dict"]
    assert state.keys() == {f"model.{name}" for name in again.model.state_dict()}
    assert all(torch.equal(value, state[f"model.{name}"]) for name, value in again.model.state_dict().items())
    ids = torch.randint(259, (2, 16))
    with torch.no_grad():
        assert torch.equal(again.model.eval()(ids).logits, task.model.eval()(ids).logits)


@pytest.mark.filterwarnings("ignore:prune. .* keeps 1 of")
@pytest.mark.parametrize("kind", SAID)
def test_a_checkpoint_is_a_model_again_without_trainer_or_data(kind, make, tmp_path, monkeypatch):
    task, trainer = make.task(convert=SAID[kind]), make.trainer(max_steps=1)
    trainer.fit(task, make.data(batch_size=2))
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    monkeypatch.setattr(conversions, "_losses", no_data)
    torch.manual_seed(1)
    again = LanguageTask.load_from_checkpoint(tmp_path / "kept.ckpt")
    state, found = task.state_dict(), again.state_dict()
    assert state.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in state.items())
    ids = torch.randint(259, (2, 16))
    with torch.no_grad():
        assert torch.equal(again.model.eval()(ids).logits, task.model.eval()(ids).logits)


def test_the_command_line_validates_a_checkpoint_without_calibrating(make, text, tmp_path, monkeypatch, capsys):
    model = {"network": "language/mixtral_tiny", "overrides": make.tiny, "convert": SAID["experts"]}
    trainer = {"max_steps": 1, "accelerator": "cpu", "enable_progress_bar": False, "limit_val_batches": 1}
    data = {"source": str(text), "sequence_length": 32, "batch_size": 4}
    said = {"model": model, "data": data, "trainer": {**trainer, "default_root_dir": str(tmp_path)}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(said))
    assert main(["language", "fit", "--config", str(tmp_path / "config.yaml")]) == 0
    [checkpoint] = tmp_path.glob("language/version_0/checkpoints/last.ckpt")
    monkeypatch.setattr(conversions, "_losses", no_data)
    for subcommand, figure in (("validate", "val/bits_per_byte"), ("test", "test/bits_per_byte")):
        capsys.readouterr()
        more = ["--trainer.limit_test_batches=1"] if subcommand == "test" else []
        arguments = ["--config", str(tmp_path / "config.yaml"), "--ckpt_path", str(checkpoint), *more]
        assert main(["language", subcommand, *arguments]) == 0
        assert figure in capsys.readouterr().out


@pytest.mark.parametrize("average", [RunningAverage, lambda: EMAWeightAveraging(decay=0.5)])
def test_a_pruned_run_with_averaged_weights_goes_on(average, make, tmp_path, monkeypatch):
    """Other data would keep another layer: the average goes on from the checkpoint's, for the checkpoint's layers."""
    first = []
    similar = lambda model, calibrate, names: {name: float(i == len(first)) for i, name in enumerate(names)}  # noqa: E731
    monkeypatch.setattr("zoo.convert.pruning.layer_similarity", similar)
    convert = [{"prune": {"drop_layers": 1, "calibrate": 1}}]

    def fit(path=None):
        callback, saver = average(), ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        task = make.task(convert=convert, schedule_steps=4)
        trainer = make.trainer(max_steps=4, callbacks=[callback, saver], enable_checkpointing=True)
        pl.seed_everything(len(first), verbose=False)
        trainer.fit(task, make.data(batch_size=2), ckpt_path=path)
        assert trainer.global_step == 4
        models = {"trained": task.model, "average": callback._average_model.module.model}
        return {f"{kind}.{name}": t for kind, model in models.items() for name, t in model.state_dict().items()}

    straight = fit()
    first.append(1)
    resumed = fit(tmp_path / "step=2.ckpt")
    assert straight.keys() == resumed.keys()
    assert not any("layers.0.mlp.experts" in name for name in resumed)
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())


class Own:
    """Something that only those who trust a checkpoint read."""


def test_decisions_are_read_from_a_file_or_a_folder_of_parts(tmp_path):
    kept = {0: {"experts": {"layers.0.mlp": [1, 3]}}, 2: {}}
    checkpoint = {"state_dict": {"weight": torch.zeros(3)}, conversions.DECIDED: kept}
    torch.save(checkpoint, tmp_path / "file.ckpt")
    (tmp_path / "parts.ckpt").mkdir()
    torch.save(checkpoint, tmp_path / "parts.ckpt" / "meta.pt")
    assert conversions.decided_in(tmp_path / "file.ckpt") == conversions.decided_in(tmp_path / "parts.ckpt") == kept
    torch.save({"state_dict": {}}, tmp_path / "none.ckpt")
    torch.save({**checkpoint, "own": Own()}, tmp_path / "own.ckpt")
    assert conversions.decided_in(tmp_path / "none.ckpt") == conversions.decided_in(tmp_path / "own.ckpt") == {}
