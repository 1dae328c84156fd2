"""Image files as they are meant to be seen: upright, and with values from black to white whatever their depth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # an EXIF tag, and its values that turn an image by a quarter
# 65535 is white in these: 16-bit PNG and PGM, which Pillow may read as 32-bit integers.
DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def open_picture(file: Any) -> Image:
    """Decode an image, turned as its EXIF says; raises OSError, ValueError or SyntaxError for a corrupt one.

    file: a path or an open file. An image of more pixels than Pillow thinks safe is a ValueError.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            image.load()
            if _told(image) != 1:
                ImageOps.exif_transpose(image, in_place=True)
            return image
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error


def picture_size(file: Any) -> tuple[int, int]:
    """Width and height of what `open_picture` gives, from the head of the file alone; raises as it does."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            width, height = image.size
            return (height, width) if _told(image) in SIDEWAYS else (width, height)
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error


def in_mode(image: Image, mode: str) -> Image:
    """The image in "L" (grey) or "RGB"; 16-bit values become 8-bit ones, where Pillow's `convert` cuts them off at 255.

    Raises ValueError for floating-point values, which do not say what white is.
    """
    if image.mode in DEEP:
        from PIL import Image

        values = np.asarray(image).clip(0, 65535) / 257
        image = Image.fromarray(values.round().astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its values are floating-point numbers, of which none is known to be white")
    return image.convert(mode)


def _told(image: Image) -> int:
    """The orientation that EXIF tells; 1, upright, where there is none, and for TIFF, which Pillow turns itself."""
    if "exif" not in image.info:
        return 1
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF, in one of many ways: the pixels may be whole
        return 1
