"""Instruction tuning of a family with a processor of its own, and gradients over several processes."""

from __future__ import annotations

import copy
import json
import math
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

import zoo
from tasks.instruction import InstructionTask
from tasks.instruction_data import InstructionData
from zoo.data.captions import vocabulary
from zoo.data.chat import Chat
from zoo.data.conversations import Conversation
from zoo.data.conversations_rows import ConversationRows
from zoo.data.processors import llava_processor, with_image_token
from zoo.data.tokenizer import learn_words

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{{ eos_token if m['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class Source:
    """Conversations with none, one and two images, of several sizes, so of several numbers of tokens."""

    sides = ((), ((16, 16),), ((40, 16), (16, 24)))
    fingerprint = "here"

    def __len__(self) -> int:
        return len(self.sides)

    def conversation(self, index: int) -> Conversation:
        images = tuple(map(str, self.sides[index]))
        question = "<image>\n" * len(images) + "how many digits are there?"
        return Conversation(str(index), images, (("user", question), ("assistant", ("no", "one", "two")[index])))

    def sizes(self, index: int) -> list[tuple[int, int]]:
        return list(self.sides[index])

    def load(self, index: int) -> list[Image.Image]:
        return [Image.effect_noise(size, 90).convert("RGB") for size in self.sides[index]]


@pytest.fixture(scope="module")
def qwen():
    """A tiny Qwen3-VL-MoE and its processor, which cuts images into patches, and marks image tokens one by one."""
    words = learn_words(["user assistant : . ?", *vocabulary()])
    tokenizer = with_image_token(words)
    names = [f"<|{name}|>" for name in ("image_pad", "video_pad", "vision_start", "vision_end")]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    cut: dict[str, Any] = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    images = Qwen2VLImageProcessor(min_pixels=64, max_pixels=1024, **cut)
    made = Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(**cut), chat_template=TEMPLATE)
    model = zoo.create_model("vision_language/qwen3_vl_moe_tiny")
    image, video, start, _ = tokenizer.convert_tokens_to_ids(names)
    model.config.image_token_id, model.config.video_token_id, model.config.vision_start_token_id = image, video, start
    return model, Chat(made)


def test_a_batch_of_several_image_counts_gives_what_each_conversation_gives_alone(qwen) -> None:
    model, chat = qwen
    torch.manual_seed(torch.seed() % 2**31)
    source = Source()
    rows = ConversationRows(source, chat)
    examples = [rows[i] for i in range(3)]
    for index, (_, (example,)) in enumerate(examples):
        assert len(example.ids) == chat.length(source.conversation(index), source.sizes(index))
    batch = rows.collate(examples)
    assert batch["image_grid_thw"].shape == (3, 3)
    assert batch["mm_token_type_ids"].shape == batch["input_ids"].shape
    task = InstructionTask(model.eval())
    task.model = model
    logits, targets = task.logits(batch)
    expected = []
    for _, (example,) in examples:
        along = {name: value[None] for name, value in example.along.items()}
        alone = model(input_ids=example.ids[None], **along, **example.images).logits[0]
        expected.append(alone[(example.labels >= 0).nonzero().flatten() - 1])
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-4, atol=1e-5)
    assert chat.tokenizer.decode(targets) == "no <|end|> one <|end|> two <|end|>"


def test_a_family_that_counts_positions_itself_is_not_packed(qwen, tmp_path) -> None:
    model, chat = qwen
    chat.processor.save_pretrained(tmp_path)
    pictures = {"train": 4, "val": 4, "test": 4}
    data = InstructionData(pictures=pictures, processor=str(tmp_path), pack=True, length=64)
    with pytest.raises(ValueError, match=r"data\.pack: Qwen3VLMoe.* counts positions in images itself"):
        data.fit_to(model, "train")


def test_gradients_averaged_over_processes_are_those_of_all_answers_together(qwen) -> None:
    """Two processes with unequal numbers of answer tokens, by their training steps, against the mean by hand."""
    model, chat = qwen
    rows = ConversationRows(Source(), chat)
    parts = [rows.collate([rows[0]]), rows.collate([rows[1], rows[2]])]
    task: Any = InstructionTask(model.train())
    task.model = model
    task.log = lambda *_, **__: None
    counts = [int((part["labels"] >= 0).sum()) for part in parts]
    assert counts[0] != counts[1]
    reduce = SimpleNamespace(reduce=lambda number, reduce_op: torch.tensor(sum(counts) / 2))
    task._trainer = SimpleNamespace(strategy=reduce, log_every_n_steps=10**6, global_step=0, accumulate_grad_batches=1)
    task.with_auxiliary = lambda loss, step: loss

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    found = [gradients(task.training_step(part, 0)) for part in parts]
    logits, targets = (torch.cat(values) for values in zip(*(task.logits(part) for part in parts)))
    for name, whole in gradients(F.cross_entropy(logits, targets)).items():
        mean = sum(part.get(name, torch.zeros(())) for part in found) / 2
        close = 1e-5 * float(whole.abs().max()) + 1e-8
        torch.testing.assert_close(mean, whole, rtol=0, atol=close)


@pytest.mark.parametrize("steps", [2, 5])
def test_accumulated_gradients_are_those_of_all_answers_together(tmp_path, steps: int) -> None:
    """Answers of very unequal lengths; the reference takes the tokens of each step together. The last step is short."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "zero"]
    records = []
    for i in range(14):
        said = " ".join(words[(i * j) % 10] for j in range(1 + 5 * (i % 4)))
        turns = [{"from": "human", "value": "how many?"}, {"from": "gpt", "value": said}]
        records.append({"conversations": turns})
    (tmp_path / "train.json").write_text(json.dumps(records))
    seen: list[dict[str, Any]] = []
    expected: list[dict[str, Any]] = []

    class Look(pl.Callback):
        def __init__(self) -> None:
            self.rows: list[Any] = []

        def on_train_batch_start(self, trainer, task, batch, batch_idx) -> None:
            self.rows = [*self.rows, batch]

        def on_before_optimizer_step(self, trainer, task, optimizer) -> None:
            seen.append({n: p.grad.clone() for n, p in task.model.named_parameters() if p.grad is not None})
            seen[-1]["loss"] = trainer.callback_metrics["train/loss"]
            with torch.enable_grad():
                nats, tokens = 0.0, 0
                for batch in self.rows:
                    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
                    logits = task.model(**given, use_cache=False).logits[:, :-1].double()
                    labels = batch["labels"][:, 1:]
                    nats = nats + F.cross_entropy(logits[labels >= 0], labels[labels >= 0], reduction="sum")
                    tokens += int((labels >= 0).sum())
                names, parameters = zip(*((n, p) for n, p in task.model.named_parameters() if n in seen[-1]))
                found = torch.autograd.grad(nats / tokens, parameters)
            expected.append({**dict(zip(names, found)), "loss": (nats / tokens).detach()})
            self.rows = []

    task = InstructionTask("vision_language/moe_llava_tiny", overrides={"moe": False}, warmup_steps=1)
    data = InstructionData(str(tmp_path), batch_size=2, held_out=0.0)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    options = {"accelerator": "cpu", "enable_checkpointing": False, "log_every_n_steps": 1, **quiet}
    pl.Trainer(max_steps=steps, accumulate_grad_batches=3, callbacks=[Look()], **options).fit(task, data)
    assert len(seen) == steps
    for ours, theirs in zip(seen, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            close = 1e-5 * float(value.abs().max()) + 1e-8
            torch.testing.assert_close(ours[name].double(), value.double(), rtol=0, atol=close, msg=name)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_evaluations_in_other_precisions(precision: str) -> None:
    task = InstructionTask("vision_language/moe_llava_tiny")
    data = InstructionData(pictures={"train": 4, "val": 4, "test": 4})
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = pl.Trainer(accelerator="cpu", precision=precision, **quiet)  # type: ignore[arg-type]
    [figures] = trainer.validate(task, data, verbose=False)
    assert figures["val/perplexity"] == pytest.approx(math.exp(figures["val/loss"]), rel=1e-5)


@pytest.mark.parametrize("places", [None, 4])
def test_a_row_that_fills_up_a_batch_counts_nowhere(qwen, places: int | None) -> None:
    """As where processes share out an odd number of rows; with few places experts have, it takes none of them."""
    model, chat = copy.deepcopy(qwen[0]), qwen[1]
    routers = [module.router for module in model.modules() if isinstance(module, zoo.moe.MoE)]
    for router in routers:
        router.capacity = None if places is None else zoo.moe.Capacity(tokens=places)
    rows = ConversationRows(Source(), chat, keep=True)  # its images are drawn anew otherwise

    def evaluated(numbers: list[int]) -> tuple[Any, ...]:
        task: Any = InstructionTask(model.eval())
        task.model = model
        task.on_validation_epoch_start()
        with torch.no_grad():
            task.validation_step(rows.collate([rows[n] for n in numbers]), 0)
        return task._sums, task._balance.compute(), task.modality_shares()

    sums, balance, shares = evaluated([2, 0])
    found = evaluated([2, 0, -1, -1])
    torch.testing.assert_close(found[0], sums, rtol=1e-5, atol=1e-6)
    assert balance.keys() == found[1].keys() == shares.keys()
    assert len(balance) == len(routers)
    for layer, figures in balance.items():
        assert found[1][layer] == pytest.approx(figures, rel=1e-5)
        assert (figures["drop_rate"] > 0) == (places is not None)
        for kind, own in shares[layer].items():
            assert found[2][layer][kind]["share"] == pytest.approx(own["share"], abs=1e-6)
            assert found[2][layer][kind]["drop_rate"] == pytest.approx(own["drop_rate"], abs=1e-6)
    nothing, balance, _ = evaluated([-1])  # a process may have no other rows
    assert not nothing.any()
    assert all(not math.isnan(v) for figures in balance.values() for v in figures.values())


def test_a_model_from_a_folder_brings_its_processor(tmp_path):
    fresh = zoo.create_model("vision_language/moe_llava_tiny")
    zoo.save_pretrained(fresh, tmp_path / "model")
    processor = llava_processor(learn_words(["USER : ASSISTANT : quite other words"]), fresh.config)
    processor.save_pretrained(tmp_path / "model")
    model, words = zoo.from_pretrained(tmp_path / "model"), processor.tokenizer.get_vocab()
    for given, same in (({}, True), ({"tokenizer": "words"}, False)):
        data = InstructionData(**given)
        data.fit_to(model, None)
        assert (data.chat.processor.tokenizer.get_vocab() == words) is same
    data = InstructionData()
    data.fit_to(fresh, None)  # made here, so that there is no folder
    assert data.chat.processor.tokenizer.get_vocab() != words
