"""Conversations by name: a name is a label that gates and adapters go by, has a weight, and is evaluated by itself."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from PIL import Image

import zoo
from tasks.__main__ import main
from tasks.instruction import InstructionTask
from tasks.instruction_data import InstructionData

GATES = {
    "domain": {"class_path": "zoo.moe.routers.DomainRouter"},
    "task": {"class_path": "zoo.moe.routers.TaskRouter", "init_args": {"num_tasks": 2}},
}
WORDS = "words:60"


@pytest.fixture
def two(tmp_path: Path) -> dict[str, str]:
    """Two files of conversations, told apart by their answers; one shows a picture each, with pictures in a folder."""
    sources = {}
    for name, answer, number in (("count", "three digits", 40), ("talk", "good morning", 16)):
        folder = tmp_path / name
        folder.mkdir()
        Image.effect_noise((16, 16), 90).convert("RGB").save(folder / "a.png")
        records = []
        for i in range(number):
            shown = {"image": "a.png"} if name == "count" else {}
            question = ("<image>\n" if shown else "") + f"say {'again ' * (i % 4)}please"
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            records.append({"id": str(i), **shown, "conversations": turns})
        for split, part in (("train", records[:-8]), ("val", records[-8:-4]), ("test", records[-4:])):
            (folder / f"{split}.json").write_text(json.dumps(part))
        sources[name] = str(folder)
    return sources


def data_of(source: Any, **options: Any) -> InstructionData:
    return InstructionData(source, tokenizer=WORDS, chat_template="vicuna", batch_size=4, **options)


def trainer_of(tmp_path: Path, **options: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    defaults = {"accelerator": "cpu", "default_root_dir": tmp_path, "enable_checkpointing": False}
    return pl.Trainer(**{**quiet, **defaults, "limit_val_batches": 0, "log_every_n_steps": 1, **options})


class Watch(pl.Callback):
    """Which sources rows were said to be of, in batches and to gates, and what stood in them."""

    def __init__(self, label: str = "") -> None:
        self.label, self.told, self.rows = label, [], []

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        for router in (m for m in module.model.modules() if isinstance(m, zoo.moe.Router)):
            router.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, router: Any, args: Any, kwargs: Any) -> None:
        self.told.append(kwargs.get(self.label))

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.told = []
        tokenizer = trainer.datamodule.chat.tokenizer
        for row, source in zip(batch["input_ids"], batch["source"].tolist()):
            said = tokenizer.decode(row)
            assert ("three" in said, "morning" in said) == ((True, False), (False, True))[source]
            self.rows.append(source)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert self.told
        if self.label:
            assert all(torch.equal(told, batch["source"]) for told in self.told)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("label", GATES)
def test_gates_are_told_whose_conversation_each_row_is(label: str, pack: bool, two: Any, tmp_path: Path) -> None:
    watch = Watch(label)
    task = InstructionTask(router=GATES[label])
    data = data_of(two, pack=pack, length=96 if pack else None)
    trainer_of(tmp_path, max_steps=3, callbacks=[watch]).fit(task, data)
    assert set(watch.rows) == {0, 1}


def test_each_source_is_evaluated_by_itself(two: Any, tmp_path: Path) -> None:
    """Against an evaluation of the other alone."""
    torch.manual_seed(0)
    task = InstructionTask()
    [figures] = trainer_of(tmp_path, limit_val_batches=1.0).validate(task, data_of(two), verbose=False)
    for name, source in two.items():
        alone = data_of(source)
        alone.tokenizer = data_of(two).tokenizer  # words of both
        [own] = trainer_of(tmp_path, limit_val_batches=1.0).validate(task, alone, verbose=False)
        for figure in ("loss", "perplexity", "token_accuracy", "answers_right"):
            assert figures[f"val/{figure}/{name}"] == pytest.approx(own[f"val/{figure}"], rel=1e-5)
    # Four conversations each, but not as many tokens: the whole is no mean of the two.
    assert min(figures[f"val/loss/{n}"] for n in two) < figures["val/loss"] < max(figures[f"val/loss/{n}"] for n in two)


def test_weights_say_how_many_rows_are_of_each_source(two: Any, tmp_path: Path) -> None:
    watch, data = Watch(), data_of(two, weights={"talk": 3, "count": 1})
    trainer_of(tmp_path, max_epochs=1, max_steps=-1, callbacks=[watch]).fit(InstructionTask(), data)
    assert len(watch.rows) == 32 + 8
    assert sum(watch.rows) == 30


def cli(subcommand: str, *args: Any) -> int:
    fixed = ["--task=instruction", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    return main(["vision_language", subcommand, *fixed, *map(str, args)])


def test_adapters_by_label_from_the_command_line_and_questions_by_name(two: Any, tmp_path: Path, capsys: Any) -> None:
    given = ["--data.source", json.dumps(two), "--data.tokenizer", WORDS, "--data.chat_template=vicuna"]
    adapt = "[{adapt: {kind: MOELoRA, router: {num_tasks: 2}, targets: [q_proj, v_proj]}}]"
    given += ["--data.batch_size=4", "--model.network=vision_language/moe_llava_tiny", "--model.convert", adapt]
    given += ["--trainer.default_root_dir", tmp_path / "runs", "--model.lr=0.03"]
    limits = ["--trainer.max_steps=4", "--trainer.val_check_interval=4", "--trainer.check_val_every_n_epoch=null"]
    assert cli("fit", *given, *limits, "--data.weights", json.dumps({"count": 1, "talk": 1})) == 0
    logs = next((tmp_path / "runs" / "vision_language").iterdir())
    with (logs / "metrics.csv").open() as file:
        columns = next(csv.reader(file))
    assert {"val/answers_right/count", "val/loss/talk", "val/loss"} <= set(columns)
    last = logs / "checkpoints" / "last.ckpt"
    asked = {"count": ["say please"], "talk": ["say please"]}
    show = ["--data.show", f"[{tmp_path / 'count' / 'a.png'}]", "--data.questions", json.dumps(asked)]
    out = tmp_path / "answers.csv"
    assert cli("predict", *given, *show, "--ckpt_path", last, "--model.predictions", out) == 0
    with out.open() as file:
        assert [row["question"] for row in csv.DictReader(file)] == ["say please"] * 2
    capsys.readouterr()
    turned = ["--data.source", json.dumps(dict(reversed(two.items())))]
    assert cli("validate", *given, *turned, "--ckpt_path", last) != 0
    assert "trained on the sources ['count', 'talk'], in this order, got ['talk', 'count']" in capsys.readouterr().err


def test_questions_by_name_are_answered_as_that_source(two: Any, monkeypatch: Any, tmp_path: Path) -> None:
    told = []
    monkeypatch.setattr(
        "tasks.instruction.answer", lambda *args: told.append(args[-1]["moe_context"]["task"].tolist()) or "so"
    )
    task = InstructionTask(router=GATES["task"], predictions=str(tmp_path / "answers.csv"))
    asked = {"talk": ["say please", "say again"], "count": ["say please"]}
    data = data_of(two, show=[str(tmp_path / "count" / "a.png")], questions=asked)
    trainer_of(tmp_path).predict(task, data)
    assert told == [[1], [1], [0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": {}}, "source: expected conversations by name, got none"),
        ({"weights": {"count": 1}}, "weights: none for talk"),
        ({"source": "digits", "weights": {"count": 1}}, "weights: expected sources with names"),
        ({"images": {"cuont": "x"}}, "unknown source of images 'cuont'; did you mean count"),
        ({"source": "digits", "questions": {"count": ["x"]}}, "questions: given by name, but source has no names"),
        ({"questions": {"tlak": ["x"]}}, "unknown source of questions 'tlak'; did you mean talk"),
    ],
)
def test_names_are_checked(options: Any, message: str, two: Any) -> None:
    with pytest.raises(ValueError, match=message):
        data_of(**{"source": two, **options})


def test_a_source_with_a_weight_needs_text_to_train_on(two: Any) -> None:
    (Path(two["talk"]) / "train.json").unlink()
    with pytest.raises(ValueError, match=r"talk has no conversations to train on"):
        data_of(two, weights={"count": 1, "talk": 1}).check("fit")
    data_of(two, weights={"count": 1, "talk": 0}).check("fit")
    data_of(two).check("validate")
