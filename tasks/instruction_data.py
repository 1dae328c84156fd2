"""What instruction tuning trains on: conversations about images."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from tasks.answering import open_processor, processor_of
from tasks.training import share_of
from zoo.data import Loader
from zoo.data.captions import digit_scenes, vocabulary
from zoo.data.chat import Chat
from zoo.data.conversations import Conversations, SceneConversations, open_conversations, read_image
from zoo.data.conversations_rows import ConversationRows, chosen, lengths
from zoo.data.images import image_files
from zoo.data.pictures import picture_size
from zoo.data.processors import llava_processor
from zoo.data.tokenizer import Tokenizer, open_or_learn_words


class InstructionData(LightningDataModule):
    """Conversations about images, of which the answers are trained.

    Args:
        source: "digits" (questions about scikit-learn's handwritten digits on a grid), a .json or .jsonl file as
            LLaVA's, or a folder with train.json, val.json and test.json.
        images: the folder that paths of images begin in; that of the source by default.
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
        questions: what `predict` asks about each.
    """

    def __init__(
        self,
        source: str = "digits",
        images: str | None = None,
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
        questions: list[str] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("length", 1 if length is None else length), ("turns", turns)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
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
    def conversations(self) -> Conversations:
        """What is said, by split; no image is decoded."""
        if self.source != "digits":
            return open_conversations(self.source, self.images, self.held_out)
        scenes = digit_scenes(**self.scenes, held_out=self.held_out)
        asked = {split: self.asked if split == "train" else self.tested for split in scenes}
        splits = {s: SceneConversations(part, self.turns, asked[s]) for s, part in scenes.items()}
        return Conversations("digits on a grid", splits)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """That of a processor that is made."""
        return open_or_learn_words(self.tokenizer_name or "words", lambda: ["USER: ASSISTANT: . ?", *self._texts()])

    def _texts(self) -> list[str]:
        if self.source == "digits":
            return vocabulary()
        train = self.conversations.split("train")
        return [text.replace("<image>", " ") for i in range(len(train)) for _, text in train.conversation(i).turns]

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
        for question in self.questions:
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
            self.conversations.split({"fit": "train", "validate": "val"}.get(subcommand, subcommand))
        if self.processor_name is None and self.tokenizer_name is not None:
            _ = self.tokenizer

    def prepare_data(self) -> None:
        """Say what there is, on one process only."""
        if self.trainer and self.trainer.state.fn == TrainerFn.FITTING:
            print(self.conversations.description, flush=True)

    def rows(self, split: str) -> ConversationRows:
        """Conversations of a split as the model takes them."""
        source = self.conversations.split(split)
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
        return self._loader("val") if "val" in self.conversations.splits else []

    def test_dataloader(self) -> Loader:
        """Every conversation of the test split once."""
        return self._loader("test")

    def predict_dataloader(self) -> Any:
        """Every image with every question."""
        from torch.utils.data import DataLoader

        paths = image_files(self.show)
        rows = [{"path": str(path), "question": question} for path in paths for question in self.questions]
        return DataLoader(rows, batch_size=None)  # type: ignore[arg-type]

    def _loader(self, split: str) -> Loader:
        options = {"shuffle": split == "train", "seed": self.seed, "num_workers": self.num_workers}
        return Loader(self.rows(split), self.batch_size, **options, **share_of(self.trainer))  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the data it continues with."""
        return {"chat": self.chat.fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise ValueError when the checkpoint was trained with another tokenizer, template or image preparation."""
        if self._chat is not None and state_dict["chat"] != self.chat.fingerprint:
            raise ValueError(
                f"the checkpoint was trained with another tokenizer, chat template or size of images than those of "
                f"{self.processor_name or self.tokenizer_name or self.source!r}"
            )
