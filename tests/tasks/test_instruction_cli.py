"""Instruction tuning by `zoo vision_language`: MoE-LLaVA's three stages in a row, in one process, on drawn digits."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch.nn import functional as F

import zoo
from tasks.__main__ import main
from tasks.answering import answer, open_image, open_processor
from tasks.instruction import InstructionTask
from tasks.vision_language import InstructionData
from zoo.data.conversations_rows import ConversationRows
from zoo.moe import MoE
from zoo.pretrained.context import decoder_of

CONFIGS = Path(__file__).parents[2] / "configs" / "vision_language"
PICTURES = {"train": 48, "val": 12, "test": 12}
SMALL = ["--data.pictures", json.dumps(PICTURES), "--data.batch_size=16", "--trainer.accelerator=cpu"]
SMALL += ["--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1"]


def cli(subcommand: str, config: str, *args: Any) -> int:
    return main(["vision_language", subcommand, "--config", str(CONFIGS / config), *SMALL, *map(str, args)])


def fit(folder: Path, config: str, *args: Any, steps: int = 3) -> Path:
    """Train for a few steps; the folder of logs."""
    limits = [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}"]
    assert cli("fit", config, *limits, "--trainer.default_root_dir", folder, *args) == 0
    return max((folder / "vision_language").iterdir(), key=lambda path: path.stat().st_mtime)


def logged(logs: Path, name: str) -> float:
    with (logs / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)][-1]


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> dict[int, Path]:
    """What each of the three configs exports, trained for three steps from what the one before it exported."""
    root = tmp_path_factory.mktemp("stages")
    before: list[Any] = []
    for number in (1, 2, 3):
        config = f"moe_llava_digits_{number}.yaml"
        said = yaml.safe_load((CONFIGS / config).read_text())["model"]
        assert said.get("pretrained") == (f"runs/moe_llava_digits_{number - 1}" if number > 1 else None)
        assert said["export"] == f"runs/moe_llava_digits_{number}"
        fit(root / f"logs{number}", config, "--model.export", root / str(number), *before)
        before = ["--model.pretrained", root / str(number)]
    return {number: root / str(number) for number in (1, 2, 3)}


def changed(before: Any, after: Any) -> set[str]:
    old, new = before.state_dict(), after.state_dict()
    return {name for name in old if not torch.equal(old[name], new[name])}


def test_each_stage_trains_what_the_paper_says_and_hands_it_over(stages: dict[int, Path]) -> None:
    said = yaml.safe_load((CONFIGS / "moe_llava_digits_1.yaml").read_text())["model"]
    torch.manual_seed(0)  # as the command line does before it builds
    fresh: Any = InstructionTask(**said | {"export": None}).build()
    first, second, third = (zoo.from_pretrained(stages[n]) for n in (1, 2, 3))
    parameters = dict(second.named_parameters())
    tower = {name for name in parameters if ".vision_tower." in name}
    assert changed(fresh, first) == {name for name in parameters if ".multi_modal_projector." in name}
    assert changed(first, second) == set(parameters) - tower
    assert third.generation_config.eos_token_id == open_processor(str(stages[3])).tokenizer.eos_token_id
    # Stage 3: MLPs, in every other layer as experts, and gates.
    layers = decoder_of(third).layers
    assert [isinstance(layer.mlp, MoE) for layer in layers] == [True, False, True, False]
    dense = {
        f"model.language_model.layers.{i}.mlp.{fc}.{kind}"
        for i in (1, 3)
        for fc in ("fc1", "fc2")
        for kind in ("weight", "bias")
    }
    same = set(parameters) & set(dict(third.named_parameters()))
    moved = {name for name in same if not torch.equal(parameters[name], dict(third.named_parameters())[name])}
    assert moved == dense
    for i in (0, 2):
        experts = layers[i].mlp.experts.state_dict()
        was = dict(second.model.language_model.layers[i].mlp.named_parameters())
        up, down = experts["up_proj"], experts["down_proj"]
        for stacked, whole in ((up, was["fc1.weight"]), (down, was["fc2.weight"])):
            assert all(not torch.equal(one, whole) for one in stacked)
            torch.testing.assert_close(stacked, whole.expand_as(stacked), rtol=0, atol=0.02)  # copies, three steps ago


def test_the_report_of_a_run_draws_experts_by_modality(stages: dict[int, Path], capsys) -> None:
    logs = stages[3].parent / "logs3" / "vision_language" / "version_0"
    assert main(["report", str(logs)]) == 0
    told = capsys.readouterr().out
    assert "answers right" in told
    assert "experts in use, language_model.layers.2.mlp" in told
    assert "images" in told


def test_answers_right_are_those_that_generation_gives(stages: dict[int, Path], tmp_path: Path, capsys) -> None:
    """Against `generate`, an answer at a time, after a longer training so that some are right and some wrong."""
    config, out = "moe_llava_digits_2.yaml", tmp_path / "out"
    start = ["--model.pretrained", stages[1], "--model.export", out, "--data.turns=2", "--model.lr=1e-2"]
    logs = fit(tmp_path, config, *start, "--trainer.check_val_every_n_epoch=null", steps=40)
    model, processor = zoo.from_pretrained(out), open_processor(str(out))
    data = InstructionData(pictures=PICTURES, digits=(1, 2), turns=2, chat_template="vicuna")
    data.fit_to(model, "val")
    chat, source = data.chat, data.rows("val").source
    right, number = 0, 0
    for index in range(len(source)):
        text, spans = chat.written(source.conversation(index))
        for begin, end in spans:
            inputs = processor(images=source.load(index), text=text[:begin], return_tensors="pt")
            out_ids = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=2)[0]
            said = processor.tokenizer.decode(out_ids[inputs["input_ids"].shape[1] :])
            assert said.endswith("<|end|>")
            right += said.removesuffix("<|end|>").split() == text[begin:end].removesuffix("<|end|>").split()
            number += 1
    assert number == 24
    assert logged(logs, "val/answers_right") == pytest.approx(right / number, abs=1e-6)
    assert 0 < right < number
    picture = tmp_path / "picture.png"
    source.load(0)[0].save(picture)
    questions = ["how many digits are there?", "what is in the picture?"]
    written = tmp_path / "answers.csv"
    asked = ["--data.show", f"[{picture}]", "--data.questions", json.dumps(questions), "--model.predictions", written]
    assert cli("predict", config, "--model.pretrained", out, "--model.export=null", *asked) == 0
    with written.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["question"] for row in rows] == questions
    for row in rows:
        assert row["answer"] == answer(model, processor, [open_image(picture)], row["question"], 32)
    capsys.readouterr()
    assert cli("predict", config, "--model.pretrained", out, "--model.export=null", *asked) == 2
    assert "answers.csv exists" in capsys.readouterr().err
    assert cli("validate", config, "--model.pretrained", out, "--model.export=null", "--data.turns=2") == 0
    assert f"{right / number:.3f}"[:5] in capsys.readouterr().out


def test_packed_rows_train_what_the_conversations_alone_do(stages: dict[int, Path]) -> None:
    """The same loss and gradients from one packed row as from padded rows; and of answers alone, by hand."""
    model = zoo.from_pretrained(stages[2]).train()
    data = InstructionData(pictures=PICTURES, digits=(1, 2), chat_template="vicuna", length=250)
    data.fit_to(model, "train")
    task = InstructionTask(model)
    task.model = model
    alone, packed = data.rows("train"), ConversationRows(data.rows("train").source, data.chat, *_all(data), limit=250)
    numbers = packed.rows[0]
    assert len(numbers) > 2
    found = []
    for batch in (alone.collate([alone[n] for n in numbers]), packed.collate([packed[0]])):
        model.zero_grad()
        logits, targets = task.logits(batch)
        loss = F.cross_entropy(logits, targets, reduction="sum")
        loss.backward()
        found.append(
            (loss, len(targets), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        )
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=0)
    assert found[0][1] == found[1][1]
    largest = max(float(gradient.abs().max()) for gradient in found[0][2].values())
    for name, gradient in found[0][2].items():
        # Some are zero but for rounding, those of the keys' biases.
        close = 1e-5 * float(gradient.abs().max()) + 1e-7 * largest
        torch.testing.assert_close(found[1][2][name], gradient, rtol=0, atol=close)
    hand = torch.zeros((), dtype=torch.double)
    for n in numbers:
        example = data.chat.encode(alone.source.conversation(n), alone.source.load(n))
        scores = model(input_ids=example.ids[None], **example.images).logits[0].double().log_softmax(-1)
        places = (example.labels >= 0).nonzero().flatten()
        hand -= scores[places - 1, example.ids[places]].sum()
    torch.testing.assert_close(found[0][0].double(), hand, rtol=1e-5, atol=0)


def _all(data: InstructionData) -> tuple[Any, Any]:
    import numpy as np

    from zoo.data.conversations_rows import lengths

    sizes = lengths(data.rows("train").source, data.chat)
    return np.arange(len(sizes)), sizes


def test_a_packed_run_resumes_where_it_was(stages: dict[int, Path], tmp_path: Path) -> None:
    options = ["--model.pretrained", stages[2], "--model.export=null", "--data.pack=true", "--data.length=200"]
    options += ["--data.batch_size=4", "--model.schedule=constant", "--trainer.val_check_interval=2"]

    def weights(folder: Path, steps: int, *args: Any) -> dict[str, torch.Tensor]:
        logs = fit(folder, "moe_llava_digits_3.yaml", *options, *args, steps=steps)
        return torch.load(logs / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]

    whole = weights(tmp_path / "a", 4, "--trainer.val_check_interval=2")
    weights(tmp_path / "b", 2)
    begun = tmp_path / "b" / "vision_language" / "version_0" / "checkpoints" / "last.ckpt"
    resumed = weights(tmp_path / "b", 4, "--ckpt_path", begun, "--trainer.val_check_interval=2")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert whole.keys() == resumed.keys()
    # What stays frozen is in the folder that it was read from.
    assert all(".language_model.layers." in name and ".mlp." in name for name in whole)


def test_llavas_files_and_lora_experts(stages: dict[int, Path], tmp_path: Path, capsys) -> None:
    """LLaVA's JSON with none, one and two images a conversation trains LoRA experts, with a processor of its own."""
    data = InstructionData(pictures=PICTURES, digits=(1, 2))
    scenes = data.conversations[0].split("train")
    records = []
    for i in range(16):
        shown = [f"{i}.png"] * (i % 3)
        for path in set(shown):
            scenes.load(i)[0].save(tmp_path / path)
        question = "<image>\n" * len(shown) + "how many digits are there?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "two"}]
        records.append({"id": str(i), "image": shown, "conversations": turns} if shown else {"conversations": turns})
    (tmp_path / "talk.json").write_text(json.dumps(records))
    given = ["--data.source", tmp_path / "talk.json", "--data.processor", stages[2], "--model.stage=null"]
    given += ["--model.pretrained", stages[2], "--model.export=null", "--data.batch_size=4", "--data.held_out=0.2"]
    lora = ["--model.convert", "[{adapt: {kind: LLaVA-MoLE, rank: 4, alpha: 8}}]"]
    logs = fit(tmp_path / "runs", "moe_llava_digits_2.yaml", *given, *lora)
    state = torch.load(logs / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
    dense = dict(zoo.from_pretrained(stages[2]).named_parameters())
    assert state
    assert not {name.removeprefix("model.") for name in state} & dense.keys()
    assert logged(logs, "train/loss_switch") > 0

    (tmp_path / "1.png").write_bytes(b"damaged")
    (tmp_path / "more.json").write_text(json.dumps(records[1:]))  # lengths of the others are known already
    given += ["--data.source", tmp_path / "more.json", "--trainer.default_root_dir", tmp_path / "none"]
    assert cli("fit", "moe_llava_digits_2.yaml", *given) == 2
    assert "1.png is not a readable image" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--task", "instructon"], "did you mean instruction"),
        (["--model.network=vision_language/limoe_tiny", "--model.overrides=null"], "no model from images to text"),
        (["--model.overrides", "{moe: false}", "--model.stage=3"], "stage 3 trains experts: give sparse"),
        (["--model.stage=4"], "stage"),
        (["--model.stage=1", "--model.convert=[{adapt: {kind: LoRA}}]"], "both say what is trained"),
        (["--model.stage=null", "--model.convert=[{adapt: {kind: LLaVA-MOLE}}]"], "did you mean LLaVA-MoLE"),
        (["--model.pretrained={language_model: a}"], "expected a folder, or language_model and vision_tower"),
        (["--data.length=9"], "tokens are more than the 9 that fit"),
        (["--data.length=9999"], "data.length is 9999, but the model's context 512"),
        (["--data.chat_template=vicunia"], "did you mean vicuna"),
        (["--data.asked=why"], "1 questions wanted, 0 begin with 'why'"),
        (["--data.tokenizer=words:x"], "expected words:SIZE"),
        (["--data.source=/nowhere.json"], "/nowhere.json"),
        (["--data.tokenizer=bytes"], "the tokenizer has 260 tokens, but the model's vocabulary only 256"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(args: list[str], told: str, tmp_path: Path, capsys) -> None:
    given = ["--trainer.default_root_dir", tmp_path, "--model.export", tmp_path / "out"]
    assert cli("fit", "moe_llava_digits_1.yaml", *given, *args) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert told in errors[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--data.questions=[<image> why?]"], "the image comes before it; leave <image> out of the text"),
        (["--data.questions=[how many?, <|end|> why?]"], "question '<|end|> why?': its text spells the special token"),
        (["--model.max_new_tokens=600"], "and 600 to write are more than the model's context of 512"),
        (["--data.show=[whole.png, damaged.png]"], "damaged.png is not a readable image"),
        (["--model.pretrained=classifier"], "expected a model of text, or of images and text, and classifier holds an"),
    ],
)
def test_what_cannot_be_asked_is_told_before_anything_is_answered(
    args: list[str], told: str, stages: dict[int, Path], tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16)).save("whole.png")
    Path("damaged.png").write_bytes(b"damaged")
    zoo.save_pretrained(zoo.create_model("vision/vmoe_tiny_test"), "classifier")
    monkeypatch.setattr("tasks.instruction.answer", lambda *given: pytest.fail("answered"))
    start = ["--task=instruction", "--model.pretrained", str(stages[3]), "--data.show=[whole.png]"]
    asked = ["--data.questions=[how many?]", "--model.predictions=answers.csv", *args]
    assert main(["vision_language", "predict", *start, *asked]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert told in errors[0]


def test_an_image_that_breaks_when_decoded_costs_no_other_answer(stages: dict[int, Path], tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "acd":
        Image.effect_noise((64, 64), 50).convert("RGB").save(f"{name}.png")
    Path("b.png").write_bytes(Path("a.png").read_bytes()[:2000])  # its head is whole
    start = ["--task=instruction", "--model.pretrained", str(stages[3]), "--data.show=[.]"]
    asked = ["--data.questions=[how many?, what is it?]", "--model.predictions=answers.csv"]
    monkeypatch.setattr("tasks.instruction.answer", lambda model, processor, images, text, *more: f"{images[0].size}")
    with pytest.warns(UserWarning, match=r"b\.png: not an image that can be read .*: question 'how many\?' is not"):
        assert main(["vision_language", "predict", *start, *asked]) == 0
    with Path("answers.csv").open() as file:
        rows = [(Path(row["path"]).name, row["question"], row["answer"]) for row in csv.DictReader(file)]
    wanted = [(f"{name}.png", text) for name in "abcd" for text in ("how many?", "what is it?")]
    assert rows == [(*row, "" if row[0] == "b.png" else "(64, 64)") for row in wanted]


def test_predict_asks_after_what_the_system_says(stages: dict[int, Path], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16)).save("a.png")
    prompts = []

    def generate(self, input_ids, **inputs):
        prompts.append(input_ids[0].tolist())
        return input_ids

    monkeypatch.setattr("transformers.LlavaForConditionalGeneration.generate", generate)
    start = ["--task=instruction", "--model.pretrained", str(stages[3]), "--data.show=[a.png]"]
    asked = ["--data.questions=[how many digits are there?]", "--model.predictions=answers.csv"]
    assert main(["vision_language", "predict", *start, *asked, "--data.system=this is a picture ."]) == 0
    processor = open_processor(str(stages[3]))
    text = "this is a picture . USER: <image>\nhow many digits are there? ASSISTANT:"
    assert prompts == processor(images=[Image.new("RGB", (16, 16))], text=text)["input_ids"]


def test_experts_in_the_vision_tower_are_no_share_of_text(tmp_path: Path) -> None:
    """A tower's tokens are patches, not those of the text around an image, and as many as they are."""
    said = ["--model.stage=null", "--model.export=null", "--model.pretrained=null", "--model.sparse=null"]
    convert = [{"upcycle": {"within": "model.vision_tower", "num_experts": 2, "layers": "all"}}]
    network = ["--model.network=vision_language/moe_llava_tiny", '--model.overrides={"moe": false}']
    logs = fit(tmp_path, "moe_llava_digits_3.yaml", *said, *network, "--model.convert", json.dumps(convert), steps=1)
    with (logs / "metrics.csv").open() as file:
        names = set(csv.DictReader(file).fieldnames or [])
    assert any(name.startswith("val/load_max/") and "vision_tower" in name for name in names)
    assert not any(name.startswith("val/used_") for name in names)
