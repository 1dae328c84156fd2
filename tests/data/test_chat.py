"""Conversations as a model's inputs: which tokens are answers, where images are, and what goes into a row."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

import zoo
from zoo.data.captions import digit_scenes
from zoo.data.chat import TEMPLATES, Chat
from zoo.data.conversations import Conversation, SceneConversations
from zoo.data.conversations_rows import ConversationRows, chosen, lengths, pack
from zoo.data.processors import llava_processor
from zoo.data.tokenizer import END, ByteTokenizer
from zoo.models.image_text import configuration

PATCHES = 16  # of a picture, for the tiny tower


@pytest.fixture(scope="module")
def processor():
    return llava_processor(ByteTokenizer(), configuration("moe_llava_tiny"))


def talk(*turns: str, images: int = 0, system: str | None = None) -> Conversation:
    said = [(("user", "assistant")[i % 2], text) for i, text in enumerate(turns)]
    before = [] if system is None else [("system", system)]
    return Conversation("here", tuple(f"{i}.png" for i in range(images)), (*before, *said))


def shown(number: int) -> list[Image.Image]:
    return [Image.effect_noise((20, 14), 80).convert("RGB") for _ in range(number)]


def answered(chat: Chat, example) -> list[str]:
    """The text of each answer's labels, and nothing else is a label."""
    assert torch.equal(example.labels >= 0, example.answers > 0)
    return [
        chat.tokenizer.decode(example.labels[example.answers == n]) for n in range(1, int(example.answers.max()) + 1)
    ]


@pytest.mark.parametrize(("template", "ends"), [("vicuna", END), ("chatml", "<|im_end|>"), ("plain", END)])
def test_only_answers_are_trained_with_what_ends_them(processor, template: str, ends: str) -> None:
    chat = Chat(processor, template)
    conversation = talk("<image>\nWhat is it, ünd why?", "Ein Käse.", "Und <image>?", "two  words ", images=2)
    example = chat.encode(conversation, shown(2))
    between = {"vicuna": " ", "chatml": "", "plain": ""}[template]  # vicuna's colon is followed by a space
    assert answered(chat, example) == [f"{between}Ein Käse.{ends}", f"{between}two  words {ends}"]
    token = processor.image_token_id
    assert int((example.ids == token).sum()) == 2 * PATCHES
    assert example.images["pixel_values"].shape == (2, 3, 16, 16)
    # What the processor makes of the whole text, written here by hand.
    hand = {
        "vicuna": "USER: <image>\nWhat is it, ünd why? ASSISTANT: Ein Käse.<|end|>"
        "USER: <image>\nUnd ? ASSISTANT: two  words <|end|>",
        "chatml": "<|im_start|>user\n<image>\nWhat is it, ünd why?<|im_end|>\n"
        "<|im_start|>assistant\nEin Käse.<|im_end|>\n"
        "<|im_start|>user\n<image>\nUnd ?<|im_end|>\n<|im_start|>assistant\ntwo  words <|im_end|>\n",
        "plain": "<image>\nEin Käse.<|end|><image>\ntwo  words <|end|>",
    }[template]
    assert example.ids.tolist() == processor(images=shown(2), text=hand)["input_ids"][0]
    assert chat.length(conversation, [(20, 14), (3, 90)]) == len(example.ids)
    assert chat.end == (processor.tokenizer.eos_token_id if ends == END else None)


def test_without_an_image_and_with_a_system(processor) -> None:
    chat = Chat(processor, "vicuna", system="Be brief.")
    example = chat.encode(talk("Hello?", "Yes."), [])
    assert chat.tokenizer.decode(example.ids) == f"Be brief. USER: Hello? ASSISTANT: Yes.{END}"
    own = chat.encode(talk("Hello?", "Yes.", system="Be long."), [])
    assert chat.tokenizer.decode(own.ids).startswith("Be long. USER")
    assert not example.images
    assert Chat(processor, "vicuna").fingerprint != chat.fingerprint


def test_an_answer_that_a_question_repeats_is_found_where_it_is(processor) -> None:
    chat = Chat(processor, "vicuna")
    example = chat.encode(talk("yes <image> yes", "yes", "yes", "yes", images=1), shown(1))
    text = chat.tokenizer.decode(example.ids)
    assert text.count("yes") == 5
    assert answered(chat, example) == [f" yes{END}"] * 2
    place = int((example.answers == 1).nonzero()[0])
    assert chat.tokenizer.decode(example.ids[:place]).endswith("ASSISTANT:")


def test_what_a_template_cannot_say_is_an_error(processor, tmp_path) -> None:
    with pytest.raises(ValueError, match="special token '<|end|>'".replace("|", r"\|")):
        Chat(processor, "vicuna").encode(talk("What?", "This<|end|>"), [])
    with pytest.raises(ValueError, match=r"chat template 'vicunia'.*vicuna"):
        Chat(processor, "vicunia")
    with pytest.raises(ValueError, match="no chat template"):
        Chat(processor)
    # A template that thinks in the last turn alone, as some of reasoning models do.
    (tmp_path / "thinks.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {% if loop.last and m['role'] == 'assistant' %}hm {% endif %}"
        "{% for c in m['content'] %}{{ c['text'] }}{% endfor %};{% endfor %}"
    )
    chat = Chat(processor, str(tmp_path / "thinks.jinja"))
    assert answered(chat, chat.encode(talk("A?", "B."), [])) == ["assistant: hm B.;"]
    with pytest.raises(ValueError, match="writes an earlier turn otherwise"):
        chat.encode(talk("A?", "B.", "C?", "D."), [])


class Rows:
    """A processor that writes images otherwise than by one token repeated: rows of them, ended by line ends."""

    image_token = "<image>"

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer, self.chat_template = tokenizer, TEMPLATES["vicuna"]

    def apply_chat_template(self, conversations, **options):
        return self.tokenizer.apply_chat_template(conversations, **options)

    def __call__(self, images, text, **options):
        for image in images:
            rows = "\n".join(["@" * image.width] * image.height)
            text = text.replace("<image>", f"[{rows}\n]", 1)
        return {"input_ids": torch.tensor([self.tokenizer(text)["input_ids"]])}


def test_images_that_become_other_tokens_do_not_move_the_answers(processor) -> None:
    chat = Chat(Rows(processor.tokenizer))
    images = [Image.new("RGB", size) for size in ((3, 2), (1, 1), (2, 4))]
    example = chat.encode(talk("<image><image>\nWhat?", "A.", "<image>", "\nB.", images=3), images)
    assert answered(chat, example) == [f" A.{END}", f" \nB.{END}"]
    assert chat.tokenizer.decode(example.ids).startswith("USER: [@@@\n@@@\n]\n[@\n]\nWhat? ASSISTANT: A.")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    scenes = digit_scenes(digits=(1, 2), pictures={"train": 40})["train"]
    return SceneConversations(scenes, turns=2)


def test_rows_are_padded_to_the_longest_and_count_nowhere_where_they_stand_in(processor, drawn) -> None:
    chat = Chat(processor, "vicuna")
    rows = ConversationRows(drawn, chat)
    assert len(rows) == 40
    batch = rows.collate([rows[3], rows[-1], rows[7]])
    examples = [chat.encode(drawn.conversation(i), drawn.load(i)) for i in (3, 0, 7)]
    longest = max(len(e.ids) for e in examples)
    for row, example in enumerate(examples):
        size = len(example.ids)
        assert batch["input_ids"].shape == (3, longest)
        assert batch["input_ids"][row, :size].tolist() == example.ids.tolist()
        assert batch["attention_mask"][row].tolist() == [1] * size + [0] * (longest - size)
        if row != 1:
            assert batch["labels"][row, :size].tolist() == example.labels.tolist()
            assert batch["answers"][row, :size].tolist() == example.answers.tolist()
    assert batch["labels"][1].unique().tolist() == [-100]
    assert batch["answers"][1].unique().tolist() == [0]
    assert (batch["labels"][0, len(examples[0].ids) :] == -100).all()
    assert torch.equal(batch["pixel_values"], torch.cat([e.images["pixel_values"] for e in examples]))


@pytest.mark.parametrize("limit", [7, 30])
def test_packing_fits_everything_once_and_wastes_little(limit: int) -> None:
    sizes = [random.randint(1, limit) for _ in range(200)]
    rows = pack(sizes, limit)
    assert sorted(number for row in rows for number in row) == list(range(200))
    assert all(sum(sizes[n] for n in row) <= limit for row in rows)
    # First fit, the longest first, takes at most 11/9 of the best, and of no more than that of the sum, and one.
    assert len(rows) <= 11 / 9 * max(-(-sum(sizes) // limit), sum(2 * s > limit for s in sizes)) + 1
    assert pack([], 5) == []


def test_a_packed_row_gives_each_conversation_the_logits_it_has_alone(processor, drawn) -> None:
    torch.manual_seed(random.randrange(1 << 30))
    gate = {"name": "TopKRouter", "k": 2}  # without capacity, whose places all tokens of a batch share
    model = zoo.create_model("vision_language/moe_llava_tiny", router=gate, text_config={"vocab_size": 320}).eval()
    model.config.image_token_id = processor.image_token_id
    chat = Chat(processor, "vicuna")
    sizes = lengths(drawn, chat)
    rows = ConversationRows(drawn, chat, sizes=sizes, numbers=chosen(drawn, sizes, 300), limit=300)
    batch = rows.collate([rows[0], rows[len(rows) - 1]])
    assert batch["input_ids"].shape == (2, 300)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "pixel_values")}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False, moe_context={"mask": batch["real"].bool()}).logits
        for row, index in enumerate((0, len(rows) - 1)):
            at = last = 0
            for number in rows.rows[index]:
                example = chat.encode(drawn.conversation(number), drawn.load(number))
                end = at + len(example.ids)
                alone = model(input_ids=example.ids[None], **example.images).logits[0]
                torch.testing.assert_close(logits[row, at:end], alone, rtol=1e-4, atol=1e-5)
                assert batch["labels"][row, at:end].tolist() == example.labels.tolist()
                own = batch["answers"][row, at:end]
                assert own[own > 0].unique().tolist() == [last + 1, last + 2]
                at, last = end, last + 2
            assert (batch["labels"][row, at:] == -100).all()
            assert batch["real"][row].sum() == at
    assert len(rows.rows[0]) > 1


class Said:
    """Texts without images, as a source."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def conversation(self, number: int) -> Conversation:
        return talk("Why?", self.texts[number])

    def load(self, number: int) -> list[Image.Image]:
        return []


def test_a_conversation_that_begins_with_its_answer_is_not_foretold_by_the_one_before(processor) -> None:
    """In the plain template a text alone is all answer: packed or not, its first token follows nothing."""
    gate = {"name": "TopKRouter", "k": 2}
    model = zoo.create_model("vision_language/moe_llava_tiny", router=gate, text_config={"vocab_size": 320})
    model = model.double().eval()
    source, chat = Said("So it is.", "Or so.", "It is otherwise, one hears."), Chat(processor, "plain")
    examples = [chat.encode(source.conversation(n), []) for n in range(3)]
    rows = ConversationRows(source, chat, sizes=np.array([len(e.ids) for e in examples]), limit=64)
    assert len(rows) == 1
    batch = rows.collate([rows[0]])
    told = {"position_ids": batch["position_ids"], "moe_context": {"mask": batch["real"].bool()}}
    parameters = list(model.parameters())

    def nats(ids: torch.Tensor, labels: torch.Tensor, **more) -> torch.Tensor:
        logits = model(input_ids=ids[None], use_cache=False, **more).logits[0].log_softmax(-1)
        return -sum(logits[at - 1, labels[at]] for at in range(1, len(ids)) if labels[at] >= 0)

    found = nats(batch["input_ids"][0], batch["labels"][0], **told)
    expected = sum(nats(example.ids, example.ids) for example in examples)
    assert int((batch["labels"] >= 0).sum()) == sum(len(example.ids) - 1 for example in examples)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    mine, theirs = (torch.autograd.grad(y, parameters, materialize_grads=True) for y in (found, expected))
    scale = max(slope.abs().max().item() for slope in theirs)
    for one, other in zip(mine, theirs):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * scale)


def test_what_is_too_long_is_named_or_left_out(processor, drawn) -> None:
    sizes = lengths(drawn, Chat(processor, "vicuna"))
    longest = int(sizes.argmax())
    limit = int(sizes.max()) - 1
    with pytest.raises(ValueError, match=rf"train picture {longest}: {sizes.max()} tokens are more than the {limit}"):
        chosen(drawn, sizes, limit)
    kept = chosen(drawn, sizes, limit, skip=True)
    assert kept.tolist() == [i for i, size in enumerate(sizes) if size <= limit]
    with pytest.raises(ValueError, match="all others are longer than 5 tokens"):
        chosen(drawn, sizes, 5, skip=True)
