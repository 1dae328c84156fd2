"""Questions about images, through the scripts as they stand, on tiny models with their processors."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

import zoo
from tasks.answering import answer, open_image, open_processor, prepare
from zoo.pretrained.image_text import class_of

SCRIPTS = Path(__file__).parents[2] / "scripts"
TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %} ANSWER:"
)


def processor(template: str | None) -> LlavaProcessor:
    """Letters as tokens, 16 a picture of 16 x 16."""
    letters = {chr(i): i for i in range(32, 127)}
    core = Tokenizer(models.WordLevel({**letters, "<image>": 250, "<end>": 251, "<?>": 252}, unk_token="<?>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<end>", pad_token="<end>", unk_token="<?>", extra_special_tokens=["<image>"]
    )
    pictures = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("answering") / "model"
    torch.manual_seed(0)
    zoo.save_pretrained(zoo.create_model("vision_language/llava_mixtral_tiny"), path)
    processor(TEMPLATE).save_pretrained(path)
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (20, 24), colour).save(path.parent / f"{name}.png")
    return path


def run(monkeypatch, name, *args):
    monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
    runpy.run_path(str(SCRIPTS / name), run_name="__main__")


def test_the_scripts_answer_what_the_model_generates(folder, monkeypatch, capsys):
    pictures = [folder.parent / "blue.png", folder.parent / "red.png"]
    run(monkeypatch, "describe_image.py", folder, *pictures, "--tokens", 6)
    described = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in described] == [str(path) for path in pictures]
    run(monkeypatch, "answer_question.py", folder, "Which colour?", *pictures, "--tokens", 6)
    answered = capsys.readouterr().out.strip()
    assert answered
    assert all(text for _, text in described)

    model, made = class_of("llava").from_pretrained(folder).eval(), open_processor(str(folder))
    for images, question, found in (
        ([pictures[0]], "Describe this image.", described[0][1]),
        (pictures, "Which colour?", answered),
    ):
        inputs = made(
            images=[Image.open(path) for path in images],
            text="USER: " + "<image>" * len(images) + question + " ANSWER:",
            return_tensors="pt",
        )
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=251)
        expected = made.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert found == expected.strip()


def test_without_a_chat_template_the_images_come_first(folder):
    image = open_image(folder.parent / "red.png")
    inputs = prepare(processor(None), [image, image], "Hi")
    ids = inputs["input_ids"][0].tolist()
    assert ids == [250] * 16 + [252] + [250] * 16 + [252, ord("H"), ord("i")]
    assert inputs["pixel_values"].shape == (2, 3, 16, 16)


def test_what_does_not_fit_the_context_is_said_before_the_model_runs(folder):
    model, made = zoo.from_pretrained(folder), open_processor(str(folder))
    image = open_image(folder.parent / "red.png")
    with pytest.raises(ValueError, match=r"\d+ tokens, 16 of them of images, and 500 to write .* context of 512"):
        answer(model, made, [image], "Why?", 500)


def test_image_tokens_that_fit_no_image_are_an_error(folder):
    model, made = zoo.from_pretrained(folder), open_processor(str(folder))
    made.patch_size = 8  # four tokens an image, of which the model has sixteen features
    with pytest.raises(ValueError, match="mage features and image tokens do not match"):
        answer(model, made, [open_image(folder.parent / "red.png")], "Why?", 2)


def test_what_is_no_image_and_no_processor_is_named(folder, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a\.png: not an image that can be read"):
        open_image(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match=r"b\.png"):
        open_image(tmp_path / "b.png")
    zoo.save_pretrained(zoo.create_model("language/mixtral_tiny", num_hidden_layers=1), tmp_path / "text")
    with pytest.raises(ValueError, match="text: "):
        open_processor(str(tmp_path / "text"))
