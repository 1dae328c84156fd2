"""What vision-language models are trained and evaluated on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from zoo.data import Loader
from zoo.data.captions import TEMPLATES, Scenes, digit_scenes, vocabulary, with_article
from zoo.data.images import Images, Split, image_files, open_images
from zoo.data.images_rows import ImageRows, unlabelled
from zoo.data.images_transforms import Augment, Preparation
from zoo.data.pairs import Pairs, open_pairs
from zoo.data.pairs_rows import PairRows, ShardLoader
from zoo.data.shards import Shards
from zoo.data.tokenizer import Tokenizer, open_or_learn_words

from .training import share_of

NO_AUGMENTATION = Augment()
PHOTO = ("a photo of a {}.",)
DIGITS = tuple(with_article(digit) for digit in range(10))


class VisionLanguageData(LightningDataModule):
    """Images with texts, and images of classes to recognise by name.

    Args:
        source: "digits" (pictures of scikit-learn's handwritten digits on a grid, with captions), a folder with images
            beside .txt files, or with captions.csv, captions.json or captions.jsonl, a table of those kinds, or .tar
            shards as webdataset has them; a folder may hold all of it in train, val and test folders.
        zero_shot: images to classify by the names of their classes, as `data.source` of zoo vision; for digits pictures
            of one digit by default.
        templates: what is said of a class, with {} for its name; several are averaged. "a photo of a {}." by default,
            and what captions of drawn pictures say of digits.
        tokenizer: "words" (those of the training texts), "words:SIZE" (the most frequent), "bytes", a folder, or a hub
            repository; by default that of the folder that the model is read from, or "words".
        text_length: tokens of the longest text, start and end among them; the model's by default.
        image_size: height and width that images are brought to; the model's by default.
        channels: 1 or 3; the model's by default.
        batch_size: images a batch on each process; all other processes' are negatives too.
        num_workers: processes that prepare batches.
        seed: of the order of images, of drawn pictures and of augmentation; with the epoch it is all they depend on.
        augment: what is done to training images at random; nothing by default.
        held_out: the share for val and for test, where the source has no such split.
        grid: cells of a drawn picture, a side.
        digits: fewest and most digits on a drawn picture.
        pictures: how many drawn pictures each split has.
        images: files and folders that `predict` classifies.
        classes: names to choose from in `predict`; those of zero_shot by default.
    """

    def __init__(
        self,
        source: str = "digits",
        zero_shot: str | None = None,
        templates: list[str] | None = None,
        tokenizer: str | None = None,
        text_length: int | None = None,
        image_size: int | None = None,
        channels: int | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        augment: Augment = NO_AUGMENTATION,
        held_out: float = 0.1,
        grid: int = 2,
        digits: tuple[int, int] = (1, 2),
        pictures: dict[str, int] | None = None,
        images: list[str] | None = None,
        classes: list[str] | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        Preparation(image_size or 1, channels or 1)  # raises for what does not fit
        self.source, self.zero_shot_source, self.tokenizer_name = source, zero_shot, tokenizer
        self.text_length, self.image_size, self.channels = text_length, image_size, channels
        self.batch_size, self.num_workers, self.seed, self.augment = batch_size, num_workers, seed, augment
        self.held_out, self.to_predict, self.given_classes = held_out, images or [], classes
        self.scenes: dict[str, Any] = {"grid": grid, "digits": tuple(digits), "pictures": pictures, "seed": seed}
        self.given_templates = templates

    @cached_property
    def pairs(self) -> Pairs:
        """Images with texts by split; none is decoded."""
        scenes = self.scenes if self.source == "digits" else {}
        return open_pairs(self.source, self.held_out, **scenes)

    @cached_property
    def zero_shot(self) -> Images | None:
        """Images by class, for zero-shot classification; None where there are none."""
        if self.zero_shot_source is not None:
            return open_images(self.zero_shot_source, held_out=self.held_out)
        if self.source != "digits":
            return None
        alone = digit_scenes(**{**self.scenes, "digits": (1, 1)}, held_out=self.held_out)
        splits = {name: _one_digit(scenes) for name, scenes in alone.items()}
        return Images("one digit on a grid", DIGITS, splits)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Texts to tokens; words are those of the training texts alone."""
        return open_or_learn_words(self.tokenizer_name or "words", self._texts)

    def _texts(self) -> Iterable[str]:
        train = self.pairs.split("train")
        if isinstance(train, Shards):
            raise ValueError("tokenizer: words are not learnt on shards, which are read once; name another")
        if isinstance(train, Scenes):
            return vocabulary()
        return (text for index in range(len(train)) for text in train.texts(index))

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that zero-shot classification chooses from."""
        if self.given_classes:
            return tuple(self.given_classes)
        return () if self.zero_shot is None else self.zero_shot.classes

    @property
    def templates(self) -> tuple[str, ...]:
        """What is said of a class."""
        if self.given_templates:
            return tuple(self.given_templates)
        drawn = self.source == "digits" and self.zero_shot_source is None and {*(self.given_classes or ())} <= {*DIGITS}
        return TEMPLATES if drawn else PHOTO

    def check(self, subcommand: str) -> None:
        """Raise what is wrong with the arguments, as far as it shows before any image is decoded."""
        if subcommand == "predict":
            if not self.to_predict:
                raise ValueError("nothing to predict: give data.images")
            image_files(self.to_predict)
            if not self.classes:
                raise ValueError("nothing to choose from: give data.classes or data.zero_shot")
        else:
            self.pairs.split({"fit": "train", "validate": "val"}.get(subcommand, subcommand))
        for template in self.templates:
            if "{}" not in template:
                raise ValueError(f"template {template!r} has no {{}}, where the name of a class belongs")
        if self.tokenizer_name is not None:
            _ = self.tokenizer

    def prepare_data(self) -> None:
        """Say what there is, on one process only."""
        if self.trainer and self.trainer.state.fn == TrainerFn.FITTING:
            if isinstance(self.pairs.splits["train"], Shards):
                print(f"pairs: {self.pairs.origin}: {len(self.pairs.splits['train'].paths)} shards", flush=True)
            else:
                print(f"pairs: {self.pairs.description}", flush=True)

    def preparation(self) -> Preparation:
        """What images must be like: the model's size and channels, values from -1 to 1 as LIMoE's."""
        model: Any = self.trainer.lightning_module.model if self.trainer else None
        size, channels = self.image_size or model.image_size, self.channels or model.channels
        return Preparation(size, channels, (0.5,), (0.5,))

    def rows(self, split: str, augment: Augment | None = None) -> PairRows:
        """Pictures of a split with their texts, as the trained model takes them."""
        model: Any = self.trainer.lightning_module.model if self.trainer else None
        length = self.text_length or model.text_length
        return PairRows(self.pairs.split(split), self.preparation(), self.tokenizer, length, augment, self.seed)

    def train_dataloader(self) -> Loader | ShardLoader:
        """Shuffled and augmented batches that can be taken up again in the middle of an epoch."""
        rows = self.rows("train", self.augment)
        if isinstance(rows.source, Shards):
            return ShardLoader(rows.source, rows, self.batch_size, **self._processes())
        return Loader(rows, self.batch_size, shuffle=True, seed=self.seed, **self._processes())

    def val_dataloader(self) -> Sequence[Loader]:
        """Every picture of the validation split once, and then every image to classify."""
        return self._evaluation("val")

    def test_dataloader(self) -> Sequence[Loader]:
        """Every picture of the test split once, and then every image to classify."""
        return self._evaluation("test")

    def predict_dataloader(self) -> Loader:
        """Every image to classify once."""
        rows = ImageRows(unlabelled(image_files(self.to_predict)), self.preparation())
        return Loader(rows, self.batch_size, seed=self.seed, **self._processes())

    def _evaluation(self, split: str) -> list[Loader]:
        loaders = []
        if split in self.pairs.splits:
            loaders.append(Loader(self.rows(split), self.batch_size, **self._processes()))
        if self.zero_shot is not None and split in self.zero_shot.splits:
            rows = ImageRows(self.zero_shot.split(split), self.preparation())
            loaders.append(Loader(rows, self.batch_size, **self._processes()))
        return loaders

    def _processes(self) -> dict[str, Any]:
        return {**share_of(self.trainer), "num_workers": self.num_workers}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the data it continues with."""
        return {"tokenizer": self.tokenizer.fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise ValueError when the checkpoint was trained with another tokenizer."""
        if state_dict["tokenizer"] != self.tokenizer.fingerprint:
            raise ValueError(
                f"the checkpoint was trained with another tokenizer than {self.tokenizer_name!r} of {self.source}"
            )


def _one_digit(scenes: Scenes) -> Split:
    """Pictures of one digit as images with a label."""
    numbers = range(len(scenes))
    labels = [scenes.scene(i).digits[0] for i in numbers]
    return Split(scenes, [scenes.name(i) for i in numbers], labels, numbers)
