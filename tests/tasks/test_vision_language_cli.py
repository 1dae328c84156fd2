"""`zoo vision_language ...` from start to end, in one process, on tiny models and drawn digits."""

from __future__ import annotations

import csv
import io
import json
import math
import runpy
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import zoo
from tasks.__main__ import main
from tasks.instruction import InstructionTask
from tasks.modalities import ModalityShares
from tasks.vision_language import ContrastiveTask, VisionLanguageData
from zoo.data import open_tokenizer
from zoo.data.captions import NUMBERS, digit_scenes
from zoo.data.tokenizer import learn_words
from zoo.moe import record, telemetry

CONFIGS = Path(__file__).parents[2] / "configs" / "vision_language"
DIGITS = CONFIGS / "limoe_digits.yaml"
SMALL = "{train: 512, val: 40, test: 60}"


def cli(subcommand: str, *args: Any) -> int:
    return main(["vision_language", subcommand, "--config", str(DIGITS), *map(str, args)])


def quick(folder: Path, steps: int = 3) -> list[Any]:
    """Arguments that make the tiny config quick."""
    trainer = [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}", "--trainer.accelerator=cpu"]
    smaller = ["--data.pictures", SMALL, "--data.batch_size=64", "--model.overrides.embed_dim=32"]
    return [*trainer, "--trainer.enable_progress_bar=false", "--trainer.default_root_dir", folder, *smaller]


def evaluations(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row.get("val/zero_shot_top1")]


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_names_a_model_and_its_losses(config: Path) -> None:
    text = config.read_text()
    assert text.startswith("# ")  # what it is, and what it takes
    model = yaml.safe_load(text)["model"]
    if "network" not in model:
        start = model["pretrained"]
        if not isinstance(start, dict):  # what another config exports
            before = yaml.safe_load((CONFIGS / f"{Path(start).stem}.yaml").read_text())["model"]
            assert before["export"] == start
        InstructionTask(**model | {"export": None})
        return
    with torch.device("meta"):
        built: Any = zoo.create_model(model["network"], losses=model.get("losses"), **model.get("overrides", {}))
    if "b16" in config.stem:
        assert sum(p.numel() for p in built.parameters()) / 1e6 == pytest.approx(990, rel=1e-3)
    else:
        assert sum(p.numel() for p in built.parameters()) < 2e6


def test_fit_validate_test_predict_and_classify(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny LIMoE learns what digits are called, far above chance, and says so of images in files."""
    options = [*quick(tmp_path, 100), "--model.lr=5e-3", "--model.warmup_steps=10", "--data.digits=[1,1]"]
    options += ["--data.grid=1", "--model.overrides.patch_size=2", "--model.image_size=8"]
    export = tmp_path / "exported"
    assert cli("fit", *options, "--trainer.val_check_interval=50", "--model.export", export) == 0
    assert "512 train, 40 val, 60 test pictures with texts" in capsys.readouterr().out
    folder = tmp_path / "vision_language" / "version_0"
    rows = evaluations(folder)
    assert len(rows) == 2
    last = {name.removeprefix("val/"): float(value) for name, value in rows[-1].items() if value and "val/" in name}
    assert last["zero_shot_top1"] > 0.5  # chance is 0.1
    assert last["text_recall_1"] > 0.5
    assert last["zero_shot_top1"] <= last["zero_shot_top5"] <= 1
    assert 1 <= last["used_text/blocks.1.mlp"] <= 8
    kept = json.loads((folder / "modalities.json").read_text())
    assert kept["step"] == 100
    for kinds in kept["layers"].values():
        assert set(kinds) == {"image", "text"}
        assert all(sum(figures["share"]) == pytest.approx(1) for figures in kinds.values())
    assert main(["report", str(folder)]) == 0
    assert "class recognised by name" in capsys.readouterr().out

    checkpoint = folder / "checkpoints" / "last.ckpt"
    for subcommand in ("validate", "test"):
        assert cli(subcommand, *options, "--ckpt_path", checkpoint) == 0
        assert "zero_shot_top1" in capsys.readouterr().out

    scenes = digit_scenes(grid=1, digits=(1, 1), pictures={"test": 40})["test"]
    (tmp_path / "in").mkdir()
    for i in range(40):
        scenes.load(i).save(tmp_path / "in" / f"{i:02}.png")
    written = tmp_path / "out" / "found.csv"
    where = ["--data.images", f"[{tmp_path / 'in'}]", "--model.predictions", written]
    assert cli("predict", *options, *where, "--ckpt_path", checkpoint) == 0
    with written.open() as file:
        found = list(csv.DictReader(file))
    assert [Path(row["path"]).name for row in found] == [f"{i:02}.png" for i in range(40)]
    right = sum(row["class"] == scenes.texts(i)[0] for i, row in enumerate(found))
    assert right > 0.4 * len(found)
    capsys.readouterr()
    assert cli("predict", *options, *where, "--ckpt_path", checkpoint) == 2
    assert "exists; name another file" in capsys.readouterr().err

    model, tokenizer = zoo.from_pretrained(export), open_tokenizer(str(export))
    assert model.vocab_size == tokenizer.vocab_size
    again = [*options, "--model.pretrained", export, "--data.tokenizer", export]
    assert cli("validate", *again) == 0
    assert rows[-1]["val/zero_shot_top1"] in capsys.readouterr().out

    script = Path(__file__).parents[2] / "scripts" / "zero_shot_classify.py"
    classes = [f"{'an' if number == 'eight' else 'a'} {number}" for number in NUMBERS]
    monkeypatch.setattr(sys, "argv", [script.name, str(export), str(tmp_path / "in"), "--classes", *classes])
    runpy.run_path(str(script), run_name="__main__")
    said = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [path for path, _, _ in said] == [row["path"] for row in found]
    assert sum(name == scenes.texts(i)[0] for i, (_, name, _) in enumerate(said)) > 0.4 * len(said)


def test_shares_are_told_apart_by_modality() -> None:
    model = zoo.create_model("vision_language/limoe_tiny", capacity={"tokens": 7, "drop": "priority"}).eval()
    for routed in ("together", "apart"):
        model.routed = routed
        shares, ids = ModalityShares(), torch.randint(64, (3, 5))
        mask = torch.arange(5) < torch.tensor([[2], [5], [1]])
        with record(model) as step:
            model(torch.randn(3, 1, 16, 16), ids, mask)
        shares.update(step, model.call_labels(3, 3, 5))
        for name, kinds in shares.compute().items():
            calls = step.routings[name]
            met = [telemetry.kept_per_token(routing) for routing in calls]
            if routed == "together":
                both = met[0].view(3, 21)
                kept = {"image": both[:, :16], "text": both[:, 16:]}
            else:
                kept = dict(zip(("image", "text"), met))
            for kind, asked in (("image", 48), ("text", 8)):
                assert kinds[kind]["drop_rate"] == pytest.approx(1 - float(kept[kind].sum()) / asked)
                entropy = -sum(s * math.log(s) for s in kinds[kind]["share"] if s)
                assert kinds[kind]["used"] == pytest.approx(math.exp(entropy))
                assert sum(kinds[kind]["share"]) == pytest.approx(1)


def test_the_dense_twin_and_another_gate_train(tmp_path: Path) -> None:
    soft = ["--model.router=SoftRouter", "--model.losses=null", "--trainer.precision=bf16-mixed"]
    for i, args in enumerate((["--model.overrides.dense=true"], soft)):
        assert cli("fit", *quick(tmp_path), *args) == 0
        assert evaluations(tmp_path / "vision_language" / f"version_{i}")


def write_shard(path: Path, start: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scenes = digit_scenes(pictures={"train": 200})["train"]
    with tarfile.open(path, "w") as tar:
        for i in range(start, start + 20):
            out = io.BytesIO()
            scenes.load(i).save(out, "PNG")
            for name, content in ((f"{i}.png", out.getvalue()), (f"{i}.txt", scenes.texts(i)[0].encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def test_shards_train_and_a_resumed_run_goes_on_with_the_next_batch(tmp_path: Path) -> None:
    for i in range(3):
        write_shard(tmp_path / "data" / "train" / f"{i}.tar", 20 * i)
    write_shard(tmp_path / "data" / "val" / "0.tar", 100)
    for i in range(10):
        (tmp_path / "classes" / str(i)).mkdir(parents=True)
        for j in range(4):
            Image.new("L", (16, 16), 20 * i + j).save(tmp_path / "classes" / str(i) / f"{j}.png")
    source = ["--data.source", tmp_path / "data", "--data.tokenizer=bytes", "--data.text_length=48"]
    source += ["--data.zero_shot", tmp_path / "classes", "--data.batch_size=8", "--model.schedule=constant"]

    def weights(folder: str, steps: int, *args: Any) -> dict[str, Any]:
        options = [*quick(tmp_path / folder, steps), *source, "--trainer.val_check_interval=2", *args]
        assert cli("fit", *options) == 0
        logs = max((tmp_path / folder / "vision_language").iterdir())
        return torch.load(logs / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]

    whole = weights("a", 4)
    weights("b", 2)
    begun = tmp_path / "b" / "vision_language" / "version_0" / "checkpoints" / "last.ckpt"
    resumed = weights("b", 4, "--ckpt_path", begun)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--model.network", "vision_language/limoe_tny"], "did you mean vision_language/limoe_tiny"),
        (["--model.router", "{name: TopKRoutr}"], "did you mean TopKRouter"),
        (["--model.losses", "{local_entrop: 0.1}"], "local_entropy"),
        (["--model.overrides.patch_size", "3"], "do not divide into patches of 3"),
        (["--model.overrides.pach_size", "4"], "did you mean patch_size"),
        (["--model.vocab_size", "7"], "the model has 7 token ids, but the tokenizer 'words' 54"),
        (["--model.image_size=32", "--data.image_size=16"], "image_size is 32, but data.image_size is 16"),
        (["--data.sorce", "digits"], "did you mean data.source"),
        (["--data.source", "digts"], "did you mean digits"),
        (["--data.source", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--data.digits", "[1, 9]"], "at most 4"),
        (["--data.tokenizer", "wrds"], "unknown tokenizer 'wrds'"),
        (["--data.pictures", "{trian: 9}"], "unknown split of pictures 'trian'; did you mean train"),
        (["--data.templates", "[a digit]"], "'a digit' has no {}"),
        (["--data.text_length", "2"], "text_length must be at least 3, start and end among the tokens, got 2"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(
    args: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("fit", "--trainer.default_root_dir", tmp_path, *args) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert told in errors[0]
    assert list(tmp_path.iterdir()) == []


def test_a_model_from_a_folder_brings_its_tokenizer(tmp_path):
    tokenizer = learn_words(["quite other words than those of digits"])
    model = zoo.create_model("vision_language/limoe_tiny", vocab_size=tokenizer.vocab_size)
    zoo.save_pretrained(model, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    task, data = ContrastiveTask(pretrained=str(tmp_path / "model")), VisionLanguageData()
    data.check("fit")
    task.check(data)
    assert data.tokenizer.fingerprint == tokenizer.fingerprint
    with pytest.raises(ValueError, match=r"the model has \d+ token ids, but the tokenizer 'words' 54"):
        task.check_model(model, VisionLanguageData(tokenizer="words"))
    # Shorter texts than the model takes are no reason to change it, larger and coloured images are.
    shorter = VisionLanguageData(text_length=5, image_size=24, channels=3)
    task = ContrastiveTask(pretrained=str(tmp_path / "model"))
    task.check(shorter)
    found = task.build()
    task.check_model(found, shorter)
    assert (found.text_length, found.image_size, found.channels) == (model.text_length, 24, 3)
    with pytest.raises(ValueError, match=r"takes texts of 16 tokens, but data\.text_length is 40"):
        task.check_model(found, VisionLanguageData(text_length=40, tokenizer=str(tmp_path / "model")))
    task, data = ContrastiveTask(), VisionLanguageData()
    task.check(data)
    assert data.tokenizer.vocab_size == 54  # words of the drawn pictures' captions


def test_what_cannot_be_exported_is_told_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*quick(tmp_path, 1), "--model.convert", '["to_dense"]', "--model.export", tmp_path / "out"]
    assert cli("fit", *options) == 2
    assert "export: save_pretrained: vision_language/limoe_tiny was changed by to_dense" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, ("{}", "a picture of {}", "this is {}")),
        ({"classes": ["a three", "an eight"]}, ("{}", "a picture of {}", "this is {}")),
        ({"classes": ["cat", "dog"]}, ("a photo of a {}.",)),
        ({"classes": ["cat", "dog"], "templates": ["some {}"]}, ("some {}",)),
        ({"source": "my/pairs", "classes": ["a three"]}, ("a photo of a {}.",)),
    ],
)
def test_only_digits_are_spoken_of_as_digits_are(given: dict[str, Any], said: tuple[str, ...]) -> None:
    assert VisionLanguageData(**given).templates == said


def test_what_was_predicted_before_an_image_breaks_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for i in range(7):
        Image.effect_noise((64, 64), 50).save(f"{i}.png")
    Path("5.png").write_bytes(Path("5.png").read_bytes()[:1000])  # its head is whole
    options = [*quick(tmp_path), "--data.images=[.]", "--data.classes=[a one, a two]", "--data.batch_size=2"]
    with pytest.raises(ValueError, match=r"5\.png"):
        cli("predict", *options)
    assert "stopped early; kept: 4 rows in predictions.csv" in capsys.readouterr().out
    with Path("predictions.csv").open() as file:
        assert [Path(row["path"]).name for row in csv.DictReader(file)] == [f"{i}.png" for i in range(4)]
