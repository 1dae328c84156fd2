"""What instruction tuning trains on: conversations about images."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from tasks import labels
from tasks.answering import open_processor, processor_of
from tasks.training import share_of
from zoo.data import Loader
from zoo.data.captions import digit_scenes, vocabulary
from zoo.data.chat import Chat
from zoo.data.conversations import (
    Conversations,
    ConversationSource,
    SceneConversations,
    open_conversations,
    read_image,
)
from zoo.data.conversations_rows import ConversationRows, NamedConversationRows, chosen, lengths
from zoo.data.images import image_files
from zoo.data.mixing import Mixture, in_order
from zoo.data.packing import Sources
from zoo.data.pictures import picture_size
from zoo.data.processors import llava_processor
from zoo.data.tokenizer import Tokenizer, open_or_learn_words
from zoo.nearest import unknown


class InstructionData(LightningDataModule):
    """Conversations about images, of which the answers are trained.

    Args:
        source: "digits" (questions about scikit-learn's handwritten digits on a grid), a .json or .jsonl file as
            LLaVA's, or with "messages" as chat services have them, or a folder with train.json, val.json and test.json.
            Or several of these by name, such as {vqa: my/vqa, ocr: my/ocr.json}: then each name is evaluated by itself
            too, and its place, from 0, is what gates and adapters go by that are told a task, a cluster or another
            label.
        images: the folder that paths of images begin in, one of each source where they have names; that of the source
            by default.
        processor: a folder or hub repository with the model's processor; by default that of the folder that the model
            is read from, or one that is made of `tokenizer`, and of what the model's vision tower takes.
        tokenizer: make a processor of it: "words" (those of the training conversations; where the model has no
            processor this is the default), "words:SIZE", "bytes", a folder, or a hub repository.
        chat_template: "plain" (images and captions, for a projector), "vicuna" (LLaVA's), "chatml", or a file; the
            processor's own by default, or "vicuna".
        system: what the system says first in every conversation.
        length: tokens of the longest conversation, images included; the model's context by default.
        too_long: what happens to longer ones: "error", or "skip" to leave them out.
        pack: put several conversations into one row of `length` tokens, each attending to itself alone.
        keep: encode every conversation once, and keep it in memory, for small images.
        batch_size: rows a batch on each process.
        num_workers: processes that prepare batches.
        seed: of the order of conversations, and of drawn pictures.
        held_out: the share of images for val and for test, where the source has no such split.
        grid: cells of a drawn picture, a side.
        digits: fewest and most digits on a drawn picture.
        pictures: how many drawn pictures each split has.
        turns: questions about a drawn picture.
        asked: how questions about drawn pictures begin, such as "how many"; any by default.
        tested: the same of those to validate and test on; as `asked` by default.
        show: images that `predict` shows, files and folders.
        questions: what `predict` asks about each; where sources have names, lists by these names.
        weights: by the names of sources, how many of an epoch's rows are of each, in any unit, as for texts
            (`tasks.language_data.LanguageData`); by default as many as there are.
    """

    def __init__(
        self,
        source: dict[str, str] | str = "digits",
        images: dict[str, str] | str | None = None,
        processor: str | None = None,
        tokenizer: str | None = None,
        chat_template: str | None = None,
        system: str | None = None,
        length: int | None = None,
        too_long: Literal["error", "skip"] = "error",
        pack: bool = False,
        keep: bool = False,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        held_out: float = 0.1,
        grid: int = 2,
        digits: tuple[int, int] = (1, 4),
        pictures: dict[str, int] | None = None,
        turns: int = 3,
        asked: str = "",
        tested: str | None = None,
        show: list[str] | None = None,
        questions: dict[str, list[str]] | list[str] | None = None,
        weights: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("length", 1 if length is None else length), ("turns", turns)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if isinstance(source, Mapping) and not source:
            raise ValueError("source: expected conversations by name, got none")
        self.names = list(source) if isinstance(source, Mapping) else []
        for what, given in (("images", images), ("questions", questions)):
            if isinstance(given, Mapping):
                if not self.names:
                    raise ValueError(f"{what}: given by name, but source has no names; expected one for all")
                for name in given:
                    if name not in self.names:
                        raise unknown(f"source of {what}", name, self.names)
        self.weights = None if weights is None else in_order(weights, self.names)
        self.source, self.images, self.processor_name, self.tokenizer_name = source, images, processor, tokenizer
        self.chat_template, self.system, self.length, self.skip = chat_template, system, length, too_long == "skip"
        self.pack, self.keep, self.batch_size, self.num_workers, self.seed = pack, keep, batch_size, num_workers, seed
        self.held_out, self.turns, self.asked = held_out, turns, asked
        self.tested = asked if tested is None else tested
        self.scenes: dict[str, Any] = {"grid": grid, "digits": tuple(digits), "pictures": pictures, "seed": seed}
        self.show, self.questions = show or [], questions or []
        self._chat: Chat | None = None
        self._limit = length

    @cached_property
    def conversations(self) -> list[Conversations]:
        """What each source says, by split; no image is decoded."""
        sources = self.source if isinstance(self.source, Mapping) else {"": self.source}
        images = self.images if isinstance(self.images, Mapping) else dict.fromkeys(sources, self.images)
        return [self._open(source, images.get(name)) for name, source in sources.items()]

    def _open(self, source: str, images: str | None) -> Conversations:
        if source != "digits":
            return open_conversations(source, images, self.held_out)
        scenes = digit_scenes(**self.scenes, held_out=self.held_out)
        asked = {split: self.asked if split == "train" else self.tested for split in scenes}
        splits = {s: SceneConversations(part, self.turns, asked[s]) for s, part in scenes.items()}
        return Conversations("digits on a grid", splits)

    def _having(self, split: str) -> dict[int, ConversationSource]:
        """A split's conversations by the number of the source; raises ValueError where no source has any."""
        found = {number: c.splits[split] for number, c in enumerate(self.conversations) if split in c.splits}
        if not found:
            self.conversations[0].split(split)  # which says so
        return found

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """That of a processor that is made."""
        return open_or_learn_words(self.tokenizer_name or "words", lambda: ["USER: ASSISTANT: . ?", *self._texts()])

    def _texts(self) -> list[str]:
        drawn = "digits" in (self.source.values() if isinstance(self.source, Mapping) else [self.source])
        texts = vocabulary() if drawn else []
        for train in self._having("train").values():
            if not isinstance(train, SceneConversations):
                said = (text for i in range(len(train)) for _, text in train.conversation(i).turns)
                texts += [text.replace("<image>", " ") for text in said]
        return texts

    @property
    def chat(self) -> Chat:
        """How conversations become inputs; there once `fit_to` has seen a model."""
        assert self._chat is not None
        return self._chat

    def fit_to(self, model: Any, split: str | None) -> None:
        """Make the processor for a model, and count the tokens of a split's conversations, before any work is done.

        Raises ValueError for a vocabulary that is larger than the model's, for conversations longer than its context,
        and for a model that cannot take several in a row.
        """
        if self._chat is None:
            name = self.processor_name or (None if self.tokenizer_name else processor_of(model))
            processor = open_processor(name) if name else llava_processor(self.tokenizer, model.config)
            own = getattr(processor, "chat_template", None)
            self._chat = Chat(processor, self.chat_template or (None if own else "vicuna"), self.system)
            processor.chat_template = self._chat.template  # answers and exports are written by it, too
        processor = self._chat.processor
        size = model.get_input_embeddings().num_embeddings
        if len(processor.tokenizer) > size:
            raise ValueError(
                f"the tokenizer has {len(processor.tokenizer)} tokens, but the model's vocabulary only {size}"
            )
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if self.length and context and self.length > context:
            raise ValueError(f"data.length is {self.length}, but the model's context {context}")
        self._limit = self.length or context
        if self.pack:
            if self._limit is None:
                raise ValueError("packing needs data.length, as the model says no length of its context")
            if any(hasattr(module, "get_rope_index") for module in model.modules()):
                raise ValueError(
                    f"data.pack: {type(model).__name__} counts positions in images itself, and takes one conversation "
                    "a row"
                )
        if split is not None:
            self.rows(split)

    def check_asked(self, model: Any, more: int) -> None:
        """Raise ValueError, before anything is answered, for what `predict` cannot ask.

        That is a question with an image in its text, an image that cannot be read, and a question that leaves no room
        for `more` tokens of an answer.
        """
        sizes = {read_image(Path(path), picture_size) for path in image_files(self.show)}
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        asked = self.questions.values() if isinstance(self.questions, Mapping) else [self.questions]
        for question in (question for questions in asked for question in questions):
            tokens = self.chat.asking(question, sizes)
            if context and tokens + more > context:
                raise ValueError(
                    f"question {question!r}: {tokens} tokens with an image and {more} to write are more than the "
                    f"model's context of {context}; shorten it, take smaller images, or a smaller max_new_tokens"
                )

    def check(self, subcommand: str) -> None:
        """Raise what is wrong with the arguments, as far as it shows without a model."""
        if subcommand == "predict":
            if not self.show or not self.questions:
                raise ValueError("nothing to predict: give data.show, images, and data.questions")
            image_files(self.show)
        else:
            split = {"fit": "train", "validate": "val"}.get(subcommand, subcommand)
            there = self._having(split)
            for number, weight in enumerate(self.weights or [] if split == "train" else []):
                if weight and number not in there:
                    self.conversations[number].split(split)
        if self.processor_name is None and self.tokenizer_name is not None:
            _ = self.tokenizer

    def prepare_data(self) -> None:
        """Say what there is, on one process only."""
        if self.trainer and self.trainer.state.fn == TrainerFn.FITTING:
            print("\n".join(conversations.description for conversations in self.conversations), flush=True)

    def rows(self, split: str) -> ConversationRows | NamedConversationRows:
        """Conversations of a split as the model takes them, in each row of one source."""
        parts = {number: self._rows(source) for number, source in self._having(split).items()}
        if not self.names:
            return parts[0]
        order: Any = Sources(list(parts.values()))
        if self.weights is not None and split == "train":
            order = Mixture(list(parts.values()), [self.weights[number] for number in parts], self.seed)
        return NamedConversationRows(order, list(parts))

    def _rows(self, source: ConversationSource) -> ConversationRows:
        if self._limit is None:
            return ConversationRows(source, self.chat, keep=self.keep)
        sizes = lengths(source, self.chat)
        numbers = chosen(source, sizes, self._limit, self.skip)
        return ConversationRows(source, self.chat, numbers, sizes, self._limit if self.pack else None, self.keep)

    def train_dataloader(self) -> Loader:
        """Shuffled batches that can be taken up again in the middle of an epoch."""
        return self._loader("train")

    def val_dataloader(self) -> Loader | list[Any]:
        """Every conversation of the validation split once."""
        return self._loader("val") if any("val" in c.splits for c in self.conversations) else []

    def test_dataloader(self) -> Loader:
        """Every conversation of the test split once."""
        return self._loader("test")

    def predict_dataloader(self) -> Any:
        """Every image with every question."""
        from torch.utils.data import DataLoader

        paths = image_files(self.show)
        asked = self.questions if isinstance(self.questions, Mapping) else {None: self.questions}
        rows: list[dict[str, Any]] = []
        for name, questions in asked.items():
            told = {} if name is None else {"source": torch.tensor([self.names.index(name)])}
            rows += [{"path": str(path), "question": q, **told} for path in paths for q in questions]
        return DataLoader(rows, batch_size=None)  # type: ignore[arg-type]

    def _loader(self, split: str) -> Loader:
        options = {"shuffle": split == "train", "seed": self.seed, "num_workers": self.num_workers}
        return Loader(self.rows(split), self.batch_size, **options, **share_of(self.trainer))  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the data it continues with."""
        return {"chat": self.chat.fingerprint, "sources": self.names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise ValueError when the checkpoint had other sources, or another tokenizer, template or size of images."""
        labels.check_sources(self.names, state_dict)
        if self._chat is not None and state_dict["chat"] != self.chat.fingerprint:
            raise ValueError(
                f"the checkpoint was trained with another tokenizer, chat template or size of images than those of "
                f"{self.processor_name or self.tokenizer_name or self.source!r}"
            )
