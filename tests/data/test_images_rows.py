"""Images as rows of batches: what is random in them, corrupt files, size and channels."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.data import Loader
from zoo.data.images import open_images
from zoo.data.images_rows import IGNORE, ImageRows, unlabelled
from zoo.data.images_transforms import Augment, Preparation

STRONG = Augment(crop=(0.3, 1.0), flip=0.5, rand="rand-m9-n2-mstd0.5", color_jitter=0.4, erase=0.5)


@pytest.fixture
def files(tmp_path):
    """Ten images in colour, each of its own."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(10):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(paths[-1])
    return paths


def batches(data, batch_size=2, shuffle=True, **arguments):
    return list(Loader(data, batch_size, shuffle=shuffle, **arguments))


def test_an_evaluation_image_is_the_resized_and_normalised_picture(files):
    # The shorter side, 20 of 24x20, becomes 10; the middle 10x10 of what comes out is kept.
    image = Image.open(files[0])
    resized = np.asarray(image.resize((12, 10), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    expected = (resized[:, 1:11].transpose(2, 0, 1) - 0.25) / 0.5
    prepared = ImageRows(unlabelled(files), Preparation(10, 3, (0.25,), (0.5,)))[0]["image"]
    np.testing.assert_allclose(prepared.numpy(), expected, atol=1e-6)


def test_without_augmentation_a_training_image_is_the_picture_too():
    split = open_images("digits").split("train")
    trained = ImageRows(split, Preparation(8, 1), Augment())
    evaluated = ImageRows(split, Preparation(8, 1))
    for i in (0, 5, 77):
        torch.testing.assert_close(trained[i]["image"], evaluated[i]["image"], rtol=0, atol=1e-6)
        assert evaluated[i]["image"].min() == -1  # grey values from -1 to 1


@pytest.mark.parametrize(("channels", "shape"), [(1, (1, 12, 12)), (3, (3, 12, 12))])
@pytest.mark.parametrize("augment", [None, STRONG])
def test_grey_and_colour_are_converted_as_asked(files, channels, shape, augment):
    digits = open_images("digits").split("val")
    for split in (unlabelled(files), digits):
        assert ImageRows(split, Preparation(12, channels), augment)[1]["image"].shape == shape
    grey = ImageRows(digits, Preparation(8, 3))[0]["image"]
    assert torch.equal(grey[0], grey[1])
    assert torch.equal(grey[0], ImageRows(digits, Preparation(8, 1))[0]["image"][0])


def test_statistics_of_colour_become_those_of_grey():
    assert Preparation(8, 1, (0.2, 0.4, 0.6), (0.5,)).statistics((0.2, 0.4, 0.6)) == (pytest.approx(0.4),)
    assert Preparation(8, 3, (0.5,)).statistics((0.5,)) == (0.5, 0.5, 0.5)


def test_augmentation_depends_on_seed_epoch_and_image_alone(files):
    def rows(seed=0):
        return ImageRows(unlabelled(files), Preparation(10), STRONG, seed)

    first = rows()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    again = first[3]["image"]
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    assert torch.equal(rows()[3]["image"], again)
    assert not torch.equal(rows(seed=1)[3]["image"], again)
    first.epoch = 1
    assert not torch.equal(first[3]["image"], again)


def test_augmentation_leaves_the_generators_alone(files):
    rows = ImageRows(unlabelled(files), Preparation(10), STRONG)
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = random.random(), np.random.rand(), torch.rand(())
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    _ = rows[0]
    assert (random.random(), np.random.rand(), torch.rand(())) == expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_go_on_in_the_middle_of_an_epoch_with_the_same_pixels(files, num_workers):
    def loader():
        return Loader(ImageRows(unlabelled(files), Preparation(10), STRONG), 2, shuffle=True, num_workers=num_workers)

    straight = loader()
    first, second = list(straight), list(straight)
    assert not torch.equal(first[0]["image"], second[0]["image"])
    resumed = loader()
    resumed.load_state_dict({"epoch": 1, "rows_done": 4})
    for theirs, ours in zip(second[2:], resumed, strict=True):
        assert torch.equal(theirs["image"], ours["image"])
        assert torch.equal(theirs["index"], ours["index"])


@pytest.mark.parametrize("damage", ["cut short", "no image", "gone"])
def test_a_corrupt_image_is_an_error_that_names_the_file(files, damage):
    break_file(files[4], damage)
    with pytest.raises(ValueError, match=rf"{files[4]} is not a readable image .*data.on_corrupt=skip"):
        _ = ImageRows(unlabelled(files), Preparation(10))[4]


def test_an_error_in_a_worker_names_the_file_too(files):
    break_file(files[4], "gone")
    with pytest.raises(ValueError, match=files[4]):
        batches(ImageRows(unlabelled(files), Preparation(10), STRONG), num_workers=1)


@pytest.mark.parametrize("damage", ["cut short", "no image", "gone"])
def test_a_corrupt_image_is_skipped_where_asked_and_counted(files, damage):
    break_file(files[4], damage)
    break_file(files[5], damage)
    rows = ImageRows(unlabelled(files), Preparation(10), Augment(), on_corrupt="skip")
    with pytest.warns(UserWarning, match=f"skipped {files[4]}"):
        found = batches(rows)
    assert sum(int(batch["skipped"].sum()) for batch in found) == 2 + 1  # row 4 goes past two, row 5 past one
    assert sorted(i for batch in found for i in batch["index"].tolist()) == [0, 1, 2, 3, 6, 6, 6, 7, 8, 9]

    evaluated = ImageRows(unlabelled(files), Preparation(10), on_corrupt="skip")
    with pytest.warns(UserWarning, match=f"skipped {files[5]}"):
        found = batches(evaluated, 4, shuffle=False)
    labels = torch.cat([batch["label"] for batch in found])
    assert (labels == IGNORE).nonzero().flatten().tolist() == [4, 5]
    assert sum(int(batch["skipped"].sum()) for batch in found) == 2


def test_when_no_image_is_readable_training_does_not_go_on(files):
    for path in files:
        break_file(path, "no image")
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(ValueError, match="none of 10 images is readable"):
        _ = ImageRows(unlabelled(files), Preparation(10), STRONG, on_corrupt="skip")[0]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Augment(flip=1.5), r"augment.flip is a probability, got 1.5"),
        (lambda: Augment(crop=(0.0, 1.0)), r"augment.crop is a range of shares"),
        (lambda: Preparation(8, 2), r"channels must be 1 \(grey\) or 3 \(colour\), got 2"),
        (lambda: Preparation(0), r"image_size must be at least 1, got 0"),
    ],
)
def test_settings_that_mean_nothing_are_errors(make, told):
    with pytest.raises(ValueError, match=told):
        make()


def break_file(path, damage):
    if damage == "gone":
        __import__("os").remove(path)
        return
    with open(path, "rb") as file:
        content = file.read()
    with open(path, "wb") as file:
        file.write(content[:-600] if damage == "cut short" else b"not an image at all")
