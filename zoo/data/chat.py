"""Conversations about images as a model's inputs, of which only the answers are trained.

A processor of transformers prepares the images and puts as many tokens in an image's place as the model will see; its
chat template says how turns are told apart. S tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..nearest import unknown
from .captions import IMAGE_TOKEN
from .conversations import Conversation
from .packing import IGNORE

if TYPE_CHECKING:
    from PIL.Image import Image

_PARTS = (
    "{% macro said(m) %}{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}{% endmacro %}"
    "{% macro shown(m) %}{% for c in m['content'] if c['type'] == 'image' %}<image>\n{% endfor %}{% endmacro %}"
)
# "plain" is for a projector's pre-training: an image and its caption, whatever the question. "vicuna" is LLaVA's v1,
# whose images come first in a turn; "chatml" marks turns by <|im_start|> and <|im_end|>.
TEMPLATES = {
    "plain": _PARTS
    + "{% for m in messages %}{{ shown(m) }}{% if m['role'] == 'assistant' %}{{ said(m) }}{{ eos_token }}"
    "{% endif %}{% endfor %}",
    "vicuna": _PARTS
    + "{% for m in messages %}{% if m['role'] == 'system' %}{{ said(m) }} {% elif m['role'] == 'user' %}"
    "USER: {{ shown(m) }}{{ said(m) }} {% else %}ASSISTANT: {{ said(m) }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "chatml": _PARTS
    + "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ shown(m) }}{{ said(m) }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}


@dataclass(frozen=True)
class Example:
    """A conversation as inputs: ids, labels and answers [S] int64, and what the model takes besides.

    labels are the ids where an answer stands and -100 elsewhere; answers number the answers from 1, 0 being no answer.
    Tensors by name: `along`, one value a token [S, ...], and `images`, whose first dimension counts images or patches.
    """

    name: str
    ids: Tensor
    labels: Tensor
    answers: Tensor
    along: dict[str, Tensor]
    images: dict[str, Tensor]


class Chat:
    """A processor and how it writes conversations: a name of TEMPLATES, a file, or the processor's own template.

    system: what the system says in conversations where it says nothing.
    Raises ValueError where there is no template or no token for images, and for a tokenizer that cannot tell where in
    the text a token is.
    """

    def __init__(self, processor: Any, template: str | None = None, system: str | None = None) -> None:
        self.processor, self.system = processor, system
        self.tokenizer = processor.tokenizer
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(f"{type(self.tokenizer).__name__} is not a fast tokenizer: it reports no offsets")
        if not isinstance(getattr(processor, "image_token", None), str):
            raise ValueError(f"{type(processor).__name__} has no image_token, which stands for an image in a text")
        self.image_token: str = processor.image_token
        self.image_id: int = self.tokenizer.convert_tokens_to_ids(self.image_token)
        self.template = self._template(template)
        backend = self.tokenizer.backend_tokenizer.to_str()
        told = (self.template, str(self.system), backend, str(getattr(processor, "image_processor", "")))
        self.fingerprint = hashlib.sha256("\0".join(told).encode()).hexdigest()[:16]
        self._special = [str(token) for token in self.tokenizer.all_special_tokens]
        self._measured: dict[tuple[int, int], int] = {}

    def _template(self, name: str | None) -> str:
        own = getattr(self.processor, "chat_template", None)
        if name is None:
            if not isinstance(own, str):
                raise ValueError(f"the processor has no chat template; name one: {', '.join(TEMPLATES)}, or a file")
            return own
        if name in TEMPLATES:
            return TEMPLATES[name].replace(IMAGE_TOKEN, self.image_token)
        if Path(name).is_file():
            return Path(name).read_text(encoding="utf-8")
        raise unknown("chat template", name, TEMPLATES)

    def encode(self, conversation: Conversation, images: Sequence[Image]) -> Example:
        """A conversation with its images as inputs; raises ValueError as `written`."""
        text, spans = self.written(conversation)
        short, offsets = self._tokens(text)
        along: dict[str, Tensor] = {}
        seen: dict[str, Tensor] = {}
        if images:
            options = {"add_special_tokens": self._adds_specials(text), "return_tensors": "pt"}
            found = dict(self.processor(images=list(images), text=text, **options))
            ids = found.pop("input_ids")
            found.pop("attention_mask", None)
            for name, value in found.items():
                if isinstance(value, Tensor):
                    per_token = value.shape[:2] == ids.shape and not name.startswith("pixel")
                    (along if per_token else seen)[name] = value[0] if per_token else value
            ids = ids[0]
        else:
            ids = torch.tensor(short)
        answers = torch.zeros(len(ids), dtype=torch.long)
        # Both rows of tokens are the same but for the images, which are in no answer.
        for place, (start, end) in zip(self._places(short, ids.tolist(), conversation.name), offsets, strict=True):
            number = next((n for n, (first, last) in enumerate(spans, 1) if end > first and start < last), 0)
            if number and start < end:
                answers[place] = number
        labels = torch.where(answers > 0, ids, IGNORE)
        return Example(conversation.name, ids, labels, answers, along, seen)

    @cached_property
    def end(self) -> int | None:
        """The special token that ends an answer; None where the template ends it otherwise."""
        text, spans = self.written(Conversation("", (), (("user", "a"), ("assistant", "a"))))
        tokens = self.tokenizer(text[: spans[0][1]], add_special_tokens=False)["input_ids"]
        return tokens[-1] if tokens[-1] in self.tokenizer.all_special_ids else None

    def written(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, one token an image, and where in it each answer begins and ends.

        An answer is what the template adds to a text that asks for it, up to the end of the turn's mark.
        Raises ValueError for a text that spells a special token, and for a template that writes a turn otherwise when
        another follows it.
        """
        messages = self._messages(conversation)
        last = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        asked = self._render([messages[:number] for number in last], add_generation_prompt=True)
        told = self._render([messages[: number + 1] for number in last])
        text, spans = told[-1], []
        for prompt, answered in zip(asked, told):
            if not answered.startswith(prompt) or not text.startswith(answered):
                raise ValueError(
                    f"{conversation.name}: the chat template writes an earlier turn otherwise once another follows, so "
                    "that what the model would have answered cannot be told; give another template"
                )
            spans.append((len(prompt), len(answered.rstrip())))
        return text, spans

    def _messages(self, conversation: Conversation) -> list[dict[str, Any]]:
        turns = list(conversation.turns)
        if self.system is not None and turns[0][0] != "system":
            turns.insert(0, ("system", self.system))
        for _, text in turns:
            self._check(text.replace(IMAGE_TOKEN, ""), conversation.name)
        return [{"role": role, "content": _parts(text)} for role, text in turns]

    def _check(self, text: str, name: str) -> None:
        for token in self._special:
            if token in text:
                raise ValueError(f"{name}: its text spells the special token {token!r}")

    def _render(self, conversations: list[list[dict[str, Any]]], **options: Any) -> list[str]:
        given = {"tokenize": False, "chat_template": self.template, **options}
        return self.processor.apply_chat_template(conversations, **given)

    def _adds_specials(self, text: str) -> bool:
        """Whether the tokenizer is to open the text: not where the template has; as transformers generates."""
        start = self.tokenizer.bos_token
        return start is None or not text.startswith(start)

    def _tokens(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        out = self.tokenizer(text, add_special_tokens=self._adds_specials(text), return_offsets_mapping=True)
        return out["input_ids"], out["offset_mapping"]

    def _places(self, short: list[int], ids: list[int], name: str) -> list[int]:
        """Where in `ids` each token of `short` is: the same tokens, but that an image is one token in `short`."""
        breaks = [number for number, token in enumerate(short) if token == self.image_id]
        places, at = [], 0
        for first, end in pairwise((-1, *breaks, len(short))):
            segment = short[first + 1 : end]
            # The text before the first image begins with the whole, that after the last one ends with it.
            starts = range(at, at + 1) if first < 0 else range(at, len(ids) - len(segment) + 1)
            starts = starts if end < len(short) else range(len(ids) - len(segment), len(ids) - len(segment) + 1)
            begins = next((i for i in starts if i >= at and ids[i : i + len(segment)] == segment), None)
            if begins is None:
                raise ValueError(f"{name}: the processor writes the text otherwise with images than without")
            at = begins + len(segment)
            places += [*range(begins, at), at][: end - first]
        return places[: len(short)]

    def length(self, conversation: Conversation, sizes: Iterable[tuple[int, int]]) -> int:
        """Tokens of a conversation whose images have these widths and heights, without decoding any."""
        text = self._render([self._messages(conversation)])[0]
        return len(self._tokens(text)[0]) + sum(self._image_tokens(size) - 1 for size in sizes)

    def asking(self, question: str, sizes: Iterable[tuple[int, int]]) -> int:
        """The most tokens of a question about one image, of whichever of these sizes.

        Raises ValueError for a question that has an image in its text, or spells a special token.
        """
        if IMAGE_TOKEN in question or self.image_token in question:
            raise ValueError(f"question {question!r}: the image comes before it; leave {IMAGE_TOKEN} out of the text")
        self._check(question, f"question {question!r}")
        system = [] if self.system is None else [("system", self.system)]
        turns = [*system, ("user", f"{IMAGE_TOKEN}\n{question}")]
        messages = [{"role": role, "content": _parts(text)} for role, text in turns]
        text = self._render([messages], add_generation_prompt=True)[0]
        return len(self._tokens(text)[0]) + max(map(self._image_tokens, set(sizes)), default=1) - 1

    def _image_tokens(self, size: tuple[int, int]) -> int:
        """Tokens in the place of an image's one."""
        if size not in self._measured:
            from PIL import Image

            out = self.processor(images=[Image.new("RGB", size)], text=self.image_token)
            self._measured[size] = len(out["input_ids"][0]) - len(self.tokenizer(self.image_token)["input_ids"]) + 1
        return self._measured[size]


def _parts(text: str) -> list[dict[str, str]]:
    """A turn as transformers has them: images and pieces of text, without the line end that follows an image."""
    first, *rest = text.split(IMAGE_TOKEN)
    found = [{"type": "text", "text": first.removesuffix("\n") if rest else first}] if first.strip() else []
    for number, piece in enumerate(rest):
        found.append({"type": "image"})
        piece = piece.removeprefix("\n")
        piece = piece.removesuffix("\n") if number + 1 < len(rest) else piece
        if piece.strip():
            found.append({"type": "text", "text": piece})
    return found
