"""From pictures to tensors: size, channels and normalisation, and timm's augmentation in training.

H, W height and width, C channels: 1 for grey, 3 for colour.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..nearest import unknown
from .pictures import in_mode

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

Transform = Callable[["Image"], "Tensor"]
MODES = {1: "L", 3: "RGB"}
CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclass(frozen=True)
class Augment:
    """What is done to training images at random; everything is off by default. Each image of each epoch has its own.

    crop is the range of areas of a random resized crop, such as [0.08, 1], and ratio that of its shapes; flip the
    probability of a mirror image; rand timm's description of RandAugment or another policy, such as
    "rand-m9-n2-mstd0.5"; color_jitter the strength of brightness, contrast and saturation; erase the probability of
    blanking a rectangle.
    """

    crop: tuple[float, float] | None = None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    rand: str | None = None
    color_jitter: float = 0.0
    erase: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("flip", self.flip), ("erase", self.erase)):
            if not 0 <= value <= 1:
                raise ValueError(f"augment.{name} is a probability, got {value}")
        if self.crop is not None and not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError(f"augment.crop is a range of shares of the area such as [0.08, 1], got {list(self.crop)}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"augment.ratio is a range of shapes such as [0.75, 1.33], got {list(self.ratio)}")


@dataclass(frozen=True)
class Preparation:
    """What a model takes: images [channels, size, size], normalised by mean and std; crop_pct and crop_mode as in timm.

    crop_mode says how evaluation makes an image square: "center" cuts out the middle, "squash" takes all of it out of
    proportion, "border" adds what is missing.
    """

    size: int
    channels: int = 3
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        if self.channels not in MODES:
            raise ValueError(f"channels must be 1 (grey) or 3 (colour), got {self.channels}")
        if self.size < 1:
            raise ValueError(f"image_size must be at least 1, got {self.size}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, 3):
                raise ValueError(f"{name} must have a value for all channels or three, got {list(getattr(self, name))}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0, got {list(self.std)}")
        if self.interpolation not in INTERPOLATIONS:
            raise unknown("interpolation", self.interpolation, INTERPOLATIONS)
        if self.crop_mode not in CROP_MODES:
            raise unknown("crop_mode", self.crop_mode, CROP_MODES)
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must be above 0 and at most 1, got {self.crop_pct}")

    def statistics(self, values: tuple[float, ...]) -> tuple[float, ...]:
        """One value a channel: means of all for a grey image, or the same for every channel."""
        return values if len(values) == self.channels else (sum(values) / len(values),) * self.channels

    def config(self) -> dict[str, Any]:
        """The same as timm notes it of a model, in `pretrained_cfg`."""
        size = (self.channels, self.size, self.size)
        return {**self._shared(), "input_size": size, "crop_pct": self.crop_pct, "crop_mode": self.crop_mode}

    def renormalised(self, images: Tensor, theirs: Preparation) -> Tensor:
        """Images [B, C, H, W] prepared like this, with the mean and deviation of `theirs` in place of these."""
        now, wanted = ((p.statistics(p.mean), p.statistics(p.std)) for p in (self, theirs))
        if now == wanted:
            return images
        mean, std, new_mean, new_std = (images.new_tensor(v)[:, None, None] for v in (*now, *wanted))
        return images * (std / new_std) + (mean - new_mean) / new_std

    def _shared(self) -> dict[str, Any]:
        return {
            "input_size": self.size,
            "interpolation": self.interpolation,
            "mean": self.statistics(self.mean),
            "std": self.statistics(self.std),
        }

    def evaluation(self) -> Transform:
        """Resize, make square by crop_mode, and normalise; the middle is of an image with its shorter side resized."""
        from timm.data import create_transform

        transform = create_transform(**self._shared(), crop_pct=self.crop_pct, crop_mode=self.crop_mode)
        return lambda image: transform(in_mode(image, MODES[self.channels]))

    def training(self, augment: Augment) -> Transform:
        """The same at random; policies see colour, whatever the model takes. ValueError for an unknown policy."""
        from timm.data import create_transform
        from torchvision.transforms import Grayscale

        crop, ratio = (augment.crop, augment.ratio) if augment.crop else ((1.0, 1.0), (1.0, 1.0))
        jitter: dict[str, Any] = {"color_jitter": augment.color_jitter or None}
        try:
            parts = create_transform(
                **self._shared(),
                **jitter,
                is_training=True,
                separate=True,
                scale=crop,
                ratio=ratio,
                hflip=augment.flip,
                auto_augment=augment.rand,
                re_prob=augment.erase,
            )
        except (AssertionError, LookupError, ValueError) as error:  # timm says no more of a policy
            raise ValueError(
                f"augment.rand: timm has no policy {augment.rand!r}; expected one such as 'rand-m9-n2-mstd0.5'"
            ) from error
        steps = [*parts[:2], *([Grayscale()] if self.channels == 1 else []), parts[2]]

        def transform(image: Image) -> Any:
            out: Any = in_mode(image, "RGB")
            for step in steps:
                out = step(out)
            return out

        return transform
