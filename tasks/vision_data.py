"""What vision models are trained and evaluated on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.utils.data import DataLoader, Subset

from tasks.training import share_of
from zoo.data import Loader
from zoo.data.images import Images, image_files, open_images
from zoo.data.images_rows import ImageRows, unlabelled
from zoo.data.images_transforms import Augment, Preparation

NO_AUGMENTATION = Augment()


def channels_of(model: Any) -> int:
    """Of images that a model takes: as timm notes it, else its first convolution's; three where it has none."""
    if isinstance(said := getattr(model, "in_chans", None), int):
        return said
    return next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)


class VisionData(LightningDataModule):
    """Images and their classes.

    Args:
        source: "digits" (scikit-learn's 1797 handwritten digits of 8x8 pixels), a folder with a folder a class (and, if
            it likes, train, val and test folders around those), "torchvision:NAME", or a CSV file with columns path,
            label and maybe split.
        image_size: height and width that images are brought to; the model's by default.
        channels: 1 or 3; images are converted to grey or colour.
        batch_size: images a batch on each process.
        num_workers: processes that prepare batches.
        seed: of the order of images and of augmentation; with the epoch it is all they depend on.
        augment: what is done to training images at random; nothing by default.
        held_out: the share of each class for val and for test, where the source has no such split.
        on_corrupt: "error" names the file; "skip" goes on without it and counts.
        root: where torchvision's data sets lie.
        download: whether torchvision may fetch what is not there.
        mean: of each channel, for normalisation; the model's own by default.
        std: of each channel, for normalisation; the model's own by default.
        interpolation: in resizing; the model's own by default.
        crop_pct: share of the resized image that evaluation cuts out; the model's own by default.
        crop_mode: how evaluation makes images square, "center", "squash" or "border"; the model's own by default.
        images: files and folders that `predict` classifies.
    """

    def __init__(
        self,
        source: str = "digits",
        image_size: int | None = None,
        channels: int = 3,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        augment: Augment = NO_AUGMENTATION,
        held_out: float = 0.1,
        on_corrupt: Literal["error", "skip"] = "error",
        root: str = "data",
        download: bool = False,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        interpolation: str | None = None,
        crop_pct: float | None = None,
        crop_mode: str | None = None,
        images: list[str] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("image_size", image_size or 1)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.source, self.root, self.download, self.held_out = source, root, download, held_out
        self.image_size, self.channels, self.batch_size = image_size, channels, batch_size
        self.num_workers, self.seed, self.on_corrupt = num_workers, seed, on_corrupt
        self.augment, self.to_predict = augment, images or []
        self.given: dict[str, Any] = {"mean": mean, "std": std, "interpolation": interpolation}
        self.given |= {"crop_pct": crop_pct, "crop_mode": crop_mode}
        said = {name: value for name, value in self.given.items() if value is not None}
        Preparation(image_size or 1, channels, **said)  # raises for what does not fit

    @cached_property
    def images(self) -> Images:
        """The images by split; none is decoded."""
        return open_images(self.source, self.root, self.download, self.held_out)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by label."""
        return self.images.classes

    def check(self, subcommand: str) -> None:
        """Raise what is wrong with the arguments, as far as it shows before any image is decoded."""
        if subcommand == "predict":
            if not self.to_predict:
                raise ValueError("nothing to predict: give data.images")
            image_files(self.to_predict)
        if self.download:  # opening would fetch the images
            return
        if subcommand == "fit":
            self.images.check()
            if (count := len(self.images.split("train"))) < self.batch_size:
                raise ValueError(f"{count} images to train on do not fill one batch: batch_size is {self.batch_size}")
        elif subcommand != "predict":
            self.images.split("val" if subcommand == "validate" else subcommand)

    def prepare_data(self) -> None:
        """Fetch what is to be fetched, on one process only, and say what there is."""
        stage = self.trainer.state.fn if self.trainer else None
        if self.download or stage == TrainerFn.FITTING:
            print(f"images: {self.images.description}", flush=True)

    def preparation(self, model: Any = None, given: bool = True) -> Preparation:
        """What images must be like: as given, unless that is not to count, then as the model was made for."""
        from timm.data import resolve_model_data_config

        own: dict[str, Any] = {"mean": (0.5,), "std": (0.5,), "interpolation": "bicubic", "crop_pct": 1.0}
        own["crop_mode"] = "center"
        size = self.image_size
        if model is not None:
            theirs = resolve_model_data_config(model)
            fixed = getattr(getattr(model, "patch_embed", None), "img_size", None)
            size = size or (fixed or theirs["input_size"])[-1]
            if getattr(model, "pretrained_cfg", None):
                own = {name: theirs[name] for name in own}
        if size is None:
            raise ValueError("image_size: neither the data nor a model says how large images are")
        values = {name: value if given and value is not None else own[name] for name, value in self.given.items()}
        values.update({name: tuple(values[name]) for name in ("mean", "std")})
        return Preparation(size, self.channels, **values)

    def rows(self, split: str, augment: Augment | None = None, model: Any = None) -> ImageRows:
        """Images of a split as `model`, by default the trained one, takes them."""
        if model is None:
            model = getattr(getattr(self.trainer, "lightning_module", None), "model", None)
        chosen = unlabelled(image_files(self.to_predict)) if split == "predict" else self.images.split(split)
        return ImageRows(chosen, self.preparation(model), augment, self.seed, self.on_corrupt)

    def train_dataloader(self) -> Loader:
        """Shuffled and augmented batches that can be taken up again in the middle of an epoch."""
        return self._loader("train", self.augment)

    def val_dataloader(self) -> Loader | list[Any]:
        """Every image of the validation split once; nothing where training goes without one."""
        return self._loader("val") if "val" in self.images.splits else []

    def test_dataloader(self) -> Loader:
        """Every image of the test split once."""
        return self._loader("test")

    def predict_dataloader(self) -> Loader:
        """Every image to classify once."""
        return self._loader("predict")

    def batches(self, split: str, chosen: Sequence[int] | None = None, model: Any = None) -> DataLoader[Any]:
        """Images of a split, or those of them at `chosen`, as for evaluation and on every process the same."""
        rows: Any = self.rows(split, model=model)
        return DataLoader(
            rows if chosen is None else Subset(rows, list(chosen)),
            self.batch_size,
            num_workers=self.num_workers,
            # Its own generator: starting must not draw from the one that dropout draws from.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _loader(self, split: str, augment: Augment | None = None) -> Loader:
        trainer = self.trainer
        return Loader(
            self.rows(split, augment),
            self.batch_size,
            shuffle=split == "train",
            seed=self.seed,
            **share_of(trainer),
            num_workers=self.num_workers,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the data it continues with."""
        return {"classes": list(self.classes)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise ValueError when the checkpoint was trained on other classes."""
        theirs, ours = state_dict["classes"], list(self.classes)
        if theirs != ours:
            strange = next((a for a, b in zip(theirs, ours) if a != b), None)
            differ = f"; the first that differs is {strange!r}" if strange is not None else ""
            raise ValueError(
                f"the checkpoint was trained on {len(theirs)} classes, and {self.images.origin} has {len(ours)}{differ}"
            )
