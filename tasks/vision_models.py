"""What the vision task asks of timm's models: which there are, and whether they fit data, or one another."""

from __future__ import annotations

from typing import Any

from tasks.vision_data import channels_of
from zoo.nearest import unknown


def takes_any_size(name: str) -> bool:
    """Whether images of any size go through a model: then it has no argument for it, as convolutional networks."""
    import timm

    from zoo.models.vision import register_models

    register_models()
    known = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return known is not None and not known.fixed_input_size


def check_timm(name: Any) -> None:
    """Raise ValueError, with the nearest ones, for no model of timm's, which may also be "hf-hub:..." and the like."""
    import timm

    if name is None:
        raise ValueError("upcycle: expected a table that names the dense model of timm under 'model'; it has none")
    if not isinstance(name, str) or (":" not in name and not timm.is_model(name)):
        raise unknown("model of timm", str(name), timm.list_models())


def image_size_of(model: Any) -> tuple[int, ...] | None:
    """The size of images that a model is set to, None for one that takes any."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return tuple(size) if size else None


def check_fits(model: Any, data: Any, classes: int | None) -> None:
    """Raise ValueError when model and data differ in classes, unless they are None, channels or image size."""
    if classes is not None and model.num_classes != classes:
        raise ValueError(f"the model has {model.num_classes} classes, but {data.images.origin} has {classes}")
    channels = channels_of(model)
    if channels != data.channels:
        raise ValueError(f"the model takes {channels} channels, but data.channels is {data.channels}")
    size, patch = image_size_of(model), getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if size and data.image_size and size != (data.image_size, data.image_size):
        raise ValueError(f"the model takes images of {size[0]}x{size[1]}, but data.image_size is {data.image_size}")
    if size and patch and (size[0] % patch[0] or size[1] % patch[1]):
        raise ValueError(
            f"image_size: images of {size[0]}x{size[1]} do not divide into patches of {patch[0]}x{patch[1]}"
        )


def check_alike(teacher: Any, model: Any) -> None:
    """Raise ValueError for a teacher of other classes, channels or images."""
    asked = {"classes": lambda m: m.num_classes, "channels": channels_of, "image size": image_size_of}
    for what, of in asked.items():
        if (theirs := of(teacher)) != (ours := of(model)) and None not in (theirs, ours):
            raise ValueError(f"teacher: {what} {theirs}, the model's {ours}; they must be the same")
