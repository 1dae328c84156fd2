"""Image files as they are meant to be seen: orientation, depth, size without decoding, and what cannot be read."""

import io

import numpy as np
import pytest
from PIL import Image

from zoo.data.images_rows import ImageRows, unlabelled
from zoo.data.images_transforms import Augment, Preparation
from zoo.data.pictures import in_mode, open_picture, picture_size

ORIENTATION = 0x0112
# What each value of the EXIF tag says of stored pixels [H, W], by the standard (JEITA CP-3451, 4.6.4 A).
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


@pytest.fixture
def pixels():
    return np.random.default_rng().integers(0, 256, (6, 9, 3), dtype=np.uint8)


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["png", "webp", "tiff"])
def test_an_image_is_turned_as_its_exif_says(pixels, orientation, kind, tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = tmp_path / f"image.{kind}"
    lossless = {"lossless": True, "exact": True} if kind == "webp" else {}
    Image.fromarray(pixels).save(file, exif=exif, **lossless)
    expected = UPRIGHT[orientation](pixels)
    np.testing.assert_array_equal(np.asarray(open_picture(file)), expected)
    assert picture_size(file) == expected.shape[1::-1]


def test_a_photograph_of_a_telephone_reaches_the_model_upright(tmp_path):
    dark_above = np.zeros((32, 32, 3), dtype=np.uint8)
    dark_above[16:] = 255
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # stored a quarter turn to the left
    Image.fromarray(np.rot90(dark_above)).save(tmp_path / "photo.jpg", exif=exif)
    image = ImageRows(unlabelled([str(tmp_path / "photo.jpg")]), Preparation(8))[0]["image"]
    assert image[:, :3].max() < -0.9
    assert image[:, 5:].min() > 0.9


@pytest.mark.parametrize(
    "damage",
    [b"Exif\0\0II*\0\xff\xff", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x09\xff\xff\xff\xff"],
)
def test_damaged_exif_does_not_lose_the_image(pixels, damage, tmp_path):
    file = tmp_path / "image.webp"
    Image.fromarray(pixels).save(file, exif=damage, lossless=True, exact=True)
    np.testing.assert_array_equal(np.asarray(open_picture(file)), pixels)


@pytest.mark.parametrize("kind", ["png", "tiff", "pgm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_values_keep_their_place_between_black_and_white(kind, channels, tmp_path):
    values = np.random.default_rng().integers(0, 65536, (8, 8), dtype=np.uint16)
    values[0, :2] = 0, 65535
    file = tmp_path / f"deep.{kind}"
    if kind == "pgm":
        file.write_bytes(b"P5\n8 8\n65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(file)
    expected = values / 65535 * 2 - 1
    for augment in (None, Augment()):
        image = ImageRows(unlabelled([str(file)]), Preparation(8, channels), augment)[0]["image"].numpy()
        np.testing.assert_allclose(image, np.broadcast_to(expected, image.shape), rtol=0, atol=1 / 255 + 1e-6)


def test_floating_point_images_are_refused(tmp_path):
    Image.fromarray(np.random.default_rng().random((4, 4), dtype=np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(ValueError, match="floating-point"):
        in_mode(open_picture(tmp_path / "f.tiff"), "RGB")
    with pytest.raises(ValueError, match=r"f\.tiff"):
        ImageRows(unlabelled([str(tmp_path / "f.tiff")]), Preparation(4))[0]


def test_an_image_of_too_many_pixels_is_named_or_skipped(monkeypatch, pixels, tmp_path):
    file = str(tmp_path / "huge.png")
    Image.fromarray(pixels).save(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(ValueError, match=r"huge\.png.*exceeds"):
        ImageRows(unlabelled([file]), Preparation(4))[0]
    with pytest.warns(UserWarning, match=r"skipped .*huge\.png"):
        assert ImageRows(unlabelled([file]), Preparation(4), on_corrupt="skip")[0]["skipped"] == 1
    with pytest.raises(ValueError, match="exceeds"):
        picture_size(file)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_other_modes_are_converted_as_pillow_does(pixels, mode):
    image = Image.fromarray(pixels).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF")
    for wanted in ("L", "RGB"):
        assert in_mode(open_picture(buffer), wanted).tobytes() == image.convert(wanted).tobytes()
