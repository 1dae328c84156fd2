"""Texts by name: each name is a label that gates and adapters go by, and is evaluated by itself."""

from __future__ import annotations

import math
import runpy
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch.nn import functional as F

import zoo
from tasks.__main__ import main
from tasks.language import LanguageData, LanguageTask
from tasks.vision import VisionTask
from tasks.vision_data import VisionData

SCRIPT = Path(__file__).parents[2] / "scripts" / "generate.py"
GATES = {
    "domain": {"class_path": "zoo.moe.routers.DomainRouter"},
    "task": {"class_path": "zoo.moe.routers.TaskRouter", "init_args": {"num_tasks": 2}},
    "speaker": {"class_path": "zoo.moe.routers.LabelRouter", "init_args": {"label": "speaker"}},
    "cluster": {"class_path": "zoo.moe.routers.MoCLERouter", "init_args": {"num_clusters": 2}},
}


@pytest.fixture
def two(tmp_path):
    """Two folders of texts without a common letter, and unlike in length."""
    generator = torch.Generator().manual_seed(0)
    sources = {}
    for name, letters, count in (("low", "abcdef ", 30), ("high", "uvwxyz\n", 50)):
        folder = tmp_path / name
        folder.mkdir()
        for i in range(count):
            picks = torch.randint(len(letters), (20 + i,), generator=generator).tolist()
            (folder / f"{i}.txt").write_text("".join(letters[p] for p in picks))
        sources[name] = str(folder)
    return sources


def task_of(make, label="domain", **arguments):
    return make.task(router=GATES[label], **arguments)


@pytest.mark.parametrize("label", GATES)
def test_gates_are_told_whose_text_each_sequence_is(label, two, make):
    data, task = make.data(source=two), task_of(make, label)
    seen = []

    def look(module, args, kwargs):
        seen.append((args[0], kwargs[label]))

    class Watch(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            for module in pl_module.model.modules():
                if isinstance(module, zoo.moe.Router):
                    module.register_forward_pre_hook(look, with_kwargs=True)

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.ids = batch["input_ids"]

        def on_train_batch_end(self, trainer, pl_module, *args):
            assert len(seen) == 2  # one a layer
            for x, told in seen:
                assert told.shape == x.shape[:1] == self.ids.shape[:1]
                for source, row in zip(told.tolist(), self.ids):
                    letters = set(bytes(row[row < 256].tolist()).decode())
                    assert letters <= set(("abcdef ", "uvwxyz\n")[source])
            seen.clear()

    make.trainer(max_steps=4, callbacks=[Watch()]).fit(task, data)


def test_each_source_is_evaluated_by_itself(two, make):
    """Against a loop over documents that cuts them as the data module documents it."""
    data, task = make.data(source=two, batch_size=3), task_of(make)
    trainer = make.trainer(max_steps=2, limit_val_batches=1.0)
    trainer.fit(task, data)
    (found,) = trainer.validate(task, data, verbose=False)
    model, total = task.model.eval().double(), torch.zeros(3, dtype=torch.float64)
    for place, name in enumerate(two):
        one = LanguageData(two[name], sequence_length=32, batch_size=1)
        sums = torch.zeros(3, dtype=torch.float64)
        rows = one.packed("val")
        for row in (rows[i] for i in range(len(rows))):
            with torch.no_grad():
                logits = model(
                    row["input_ids"][None],
                    position_ids=row["position_ids"][None],
                    use_cache=False,
                    moe_context={"domain": place},
                ).logits[0]
            nats = F.cross_entropy(logits, row["labels"], reduction="none")
            text = row["target_bytes"] >= 0
            sums += torch.stack([nats.sum(), (row["labels"] >= 0).sum(), nats[text].sum()])
        length = sum(len(document) for document in one.corpus.documents("val"))
        assert found[f"val/loss/{name}"] == pytest.approx(float(sums[0] / sums[1]), rel=1e-5)
        assert found[f"val/bits_per_byte/{name}"] == pytest.approx(float(sums[2]) / math.log(2) / length, rel=1e-5)
        total += sums
    assert found["val/loss"] == pytest.approx(float(total[0] / total[1]), rel=1e-5)


@pytest.mark.parametrize("kind", ["MOELoRA", "MoCLE"])
def test_adapters_by_label_from_a_config(kind, two, make, tmp_path):
    """What a source does not reach does not learn: the embedding of a task that no text has."""
    zoo.save_pretrained(zoo.create_model("language/mixtral_tiny", vocab_size=259, **make.tiny), tmp_path / "base")
    router = {"MOELoRA": {"num_tasks": 3}, "MoCLE": {"num_clusters": 3, "temperature": 1.0}}[kind]
    said = {"kind": kind, "num_experts": 3, "rank": 2, "router": router}
    task = LanguageTask(pretrained=str(tmp_path / "base"), convert=[{"adapt": said}], lr=0.05, warmup_steps=0)
    drawn = {}

    class Watch(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            drawn.update({n: p.detach().clone() for n, p in pl_module.model.named_parameters() if p.requires_grad})

    trainer = make.trainer(max_steps=4, callbacks=[Watch()])
    trainer.fit(task, make.data(source=two))
    tables = {n: p for n, p in task.model.named_parameters() if n.endswith("_embedding")}
    assert tables
    for name, table in tables.items():
        decay = (table[2] / drawn[name][2]).detach()  # AdamW's alone
        assert torch.allclose(decay, decay[0].expand_as(decay), rtol=1e-4)
        moved = (table[:2] - decay[0] * drawn[name][:2]).abs().amax(1)
        assert (moved > 1e-3 * drawn[name][:2].abs().amax(1)).all()


def test_without_labels_such_gates_are_refused_before_training(two, make):
    data, task = make.data(), task_of(make)
    with pytest.raises(ValueError, match=r"DomainRouter goes by a label, 'domain': give data.source by name"):
        task.check(data)
    three = {**two, "third": next(iter(two.values()))}
    with pytest.raises(ValueError, match=r"TaskRouter goes by a label, 'task', of which it knows 2; data.source has 3"):
        task_of(make, "task").check(make.data(source=three))
    vision = VisionTask("vision/vmoe_tiny_test", router={"name": "DomainRouter"})
    with pytest.raises(ValueError, match=r"DomainRouter goes by a label, .* VisionData has none"):
        vision.check(VisionData())


def test_names_of_sources_are_checked(two, make):
    with pytest.raises(ValueError, match="source: expected texts by name, got none"):
        LanguageData({})
    with pytest.raises(ValueError, match=r"unknown source of prompts 'lw'; did you mean low\?"):
        LanguageData(two, prompts={"lw": ["ab"]})
    state = make.data(source=two).state_dict()
    with pytest.raises(ValueError, match=r"trained on the sources \['low', 'high'\], in this order, got \['high'"):
        make.data(source=dict(reversed(two.items()))).load_state_dict(state)
    for other in ({"tokenizer": state["tokenizer"]}, {**state, "sources": []}):  # of a run without names
        make.data(source=two).load_state_dict(other)
    make.data().load_state_dict(state)


def test_the_command_line_trains_resumes_and_continues_prompts_by_source(two, make, tmp_path, capsys):
    said = {
        "seed_everything": 0,
        "data": {"source": two, "sequence_length": 32, "batch_size": 4},
        "model": {
            "network": "language/mixtral_tiny",
            "overrides": make.tiny,
            "router": GATES["domain"],
            "max_new_tokens": 30,
            "lr": 0.01,
            "warmup_steps": 0,
            "schedule": "constant",
        },
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "limit_val_batches": 2},
    }
    (tmp_path / "it.yaml").write_text(yaml.safe_dump(said, sort_keys=False))

    def run(folder, subcommand, *args):
        root = ["--config", str(tmp_path / "it.yaml"), "--trainer.default_root_dir", str(tmp_path / folder)]
        assert main(["language", subcommand, *root, *map(str, args)]) == 0
        return max((tmp_path / folder).rglob("last.ckpt"), key=lambda path: path.stat().st_mtime)

    states = []
    for folder, steps in (("whole", [30]), ("parts", [15, 30])):
        checkpoint = None
        for number in steps:
            more = [] if checkpoint is None else ["--ckpt_path", checkpoint]
            checkpoint = run(folder, "fit", "--trainer.max_steps", number, "--data.batch_size=8", *more)
        states.append(torch.load(checkpoint, weights_only=True)["state_dict"])
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    capsys.readouterr()
    prompts = "{low: [ab], high: [uv]}"
    run("whole", "predict", "--ckpt_path", checkpoint, "--data.prompts", prompts, "--model.temperature=0")
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("ab", "uv"))]
    assert len(told) == 2
    assert told[0][2:] != told[1][2:]


def test_the_script_that_continues_prompts_tells_adapters_the_task(two, make, tmp_path, monkeypatch, capsys):
    zoo.save_pretrained(zoo.create_model("language/mixtral_tiny", vocab_size=259, **make.tiny), tmp_path / "base")
    adapter = {"kind": "MOELoRA", "num_experts": 3, "rank": 2, "router": {"num_tasks": 2}}
    options = {"lr": 0.2, "warmup_steps": 0, "schedule": "constant", "export": str(tmp_path / "out")}
    task = LanguageTask(pretrained=str(tmp_path / "base"), convert=[{"adapt": adapter}], **options)
    make.trainer(max_steps=20).fit(task, make.data(source=two))

    def lines(label):
        argv = ["generate.py", str(tmp_path / "out"), "ab", "--temperature=0", "--tokens=30", "--label", label]
        monkeypatch.setattr(sys, "argv", argv)
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    assert lines("0") != lines("1")
    with pytest.raises(SystemExit):
        lines("2")
    assert "TaskMixtureRouter: task must lie in 0..1, got 2..2" in capsys.readouterr().err


def test_weights_say_how_much_of_the_training_text_is_of_each_source(two, make):
    data, task = make.data(source=two, weights={"high": 3, "low": 1}), task_of(make)
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.extend(zip(batch["source"].tolist(), batch["input_ids"].tolist()))

    make.trainer(max_epochs=1, max_steps=-1, limit_val_batches=1, callbacks=[Watch()]).fit(task, data)
    whole = len(data.packed("train"))
    assert whole == len(make.data(source=two).packed("train"))
    assert whole - data.batch_size < len(seen) <= whole
    share = sum(source for source, _ in seen) / len(seen)
    assert abs(share - 0.75) <= data.batch_size / len(seen)
    for source, ids in seen:
        assert set(bytes(i for i in ids if i < 256).decode()) <= set(("abcdef ", "uvwxyz\n")[source])
    # Evaluation is of all there is.
    assert len(data.packed("val")) == len(make.data(source=two).packed("val"))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"low": 1}, "weights: none for high; expected one of each source"),
        ({"low": 1, "hihg": 1}, "unknown source of weights 'hihg'; did you mean high"),
        ({"low": -1, "high": 1}, "weights: expected numbers from 0, got -1 for low"),
        ({"low": math.nan, "high": 1}, "weights: expected numbers from 0, got nan for low"),
        ({"low": 0, "high": 0}, "weights: expected one above 0, all are 0"),
    ],
)
def test_weights_are_checked(weights, message, two, make):
    with pytest.raises(ValueError, match=message):
        make.data(source=two, weights=weights)
    with pytest.raises(ValueError, match="weights: expected sources with names"):
        make.data(source=two["low"], weights=weights)
