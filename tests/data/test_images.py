"""Where labelled images come from: splits, labels, and what is wrong with a source."""

import csv
import random
import struct

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from zoo.data.images import image_files, open_images


def picture(path, value, size=(6, 5), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)
    return path


def class_folders(home, counts):
    for label, (name, count) in enumerate(counts.items()):
        (home / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture(home / name / f"{i}.png", (40 * label, i, 0))
    return home


def test_digits_are_those_of_scikit_learn_each_once():
    images, reference = open_images("digits"), load_digits()
    seen = []
    for split in images.splits.values():
        for i in range(0, len(split), 7):
            number = int(split.names[i].split()[1])
            seen.append(number)
            assert split.labels[i] == reference.target[number]
            np.testing.assert_allclose(np.asarray(split.load(i)) / 255 * 16, reference.images[number], atol=0.04)
    assert len(set(seen)) == len(seen)
    assert sum(map(len, images.splits.values())) == 1797
    assert images.classes == tuple("0123456789")
    assert images.description == "scikit-learn's digits: 10 classes; 1439 train, 179 val, 179 test images"


def test_the_same_share_of_every_class_is_held_out_and_always_the_same():
    first, second = open_images("digits", held_out=0.2), open_images("digits", held_out=0.2)
    assert {s: split.names for s, split in first.splits.items()} == {
        s: split.names for s, split in second.splits.items()
    }
    total = np.bincount(load_digits().target)
    for split in ("val", "test"):
        np.testing.assert_allclose(np.bincount(first.split(split).labels), 0.2 * total, atol=0.5)
    with pytest.raises(ValueError, match=r"held_out must be .* below 0\.5, got 0\.7"):
        open_images("digits", held_out=0.7)


def test_a_folder_with_a_folder_a_class(tmp_path):
    home = class_folders(tmp_path / "pets", {"cat": 10, "dog": 20})
    (home / "cat" / "notes.txt").write_text("no image")
    picture(home / "dog" / "more" / "deep.jpg", (40, 99, 0))
    images = open_images(str(home))
    assert images.classes == ("cat", "dog")
    assert [len(images.split(s)) for s in ("train", "val", "test")] == [8 + 17, 1 + 2, 1 + 2]
    every = [(name, label) for split in images.splits.values() for name, label in zip(split.names, split.labels)]
    assert len(set(every)) == 31
    for split in images.splits.values():
        for i, (name, label) in enumerate(zip(split.names, split.labels)):
            assert images.classes[label] in name
            assert split.load(i).getpixel((0, 0))[0] == pytest.approx(40 * label, abs=2)


def test_splits_do_not_change_when_the_folder_moves(tmp_path):
    first = open_images(str(class_folders(tmp_path / "a", {"x": 20, "y": 20})), held_out=0.25)
    (tmp_path / "a").rename(tmp_path / "b")
    second = open_images(str(tmp_path / "b"), held_out=0.25)
    for split in ("train", "val", "test"):
        ours = [name.removeprefix(str(tmp_path / "a")) for name in first.split(split).names]
        assert ours == [name.removeprefix(str(tmp_path / "b")) for name in second.split(split).names]


def test_folders_of_splits_are_taken_as_they_are_and_a_missing_one_is_held_out(tmp_path):
    class_folders(tmp_path / "train", {"a": 10, "b": 10})
    class_folders(tmp_path / "valid", {"a": 1, "b": 2})
    images = open_images(str(tmp_path))
    assert [len(images.split(s)) for s in ("train", "val", "test")] == [18, 3, 2]
    assert all("/valid/" in name for name in images.split("val").names)
    assert all("/train/" in name for name in images.split("test").names)


def test_a_table_of_paths_and_labels(tmp_path):
    rows = []
    for i in range(12):
        picture(tmp_path / "all" / f"{i}.png", (i, 0, 0))
        rows.append(
            {"path": f"all/{i}.png", "label": str(10 if i % 2 else 9), "split": "test" if i < 2 else "training"}
        )
    with (tmp_path / "table.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    images = open_images(str(tmp_path / "table.csv"))
    assert images.classes == ("9", "10")  # as numbers, not as text
    assert images.split("test").labels == [0, 1]
    assert [images.split("test").load(i).getpixel((0, 0))[0] for i in range(2)] == [0, 1]
    assert len(images.split("train")) == 8  # and one of each class to validate on


def test_a_torchvision_set_from_local_files(tmp_path):
    rng, raw = random.Random(0), tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = {}
    for part, count in (("train", 30), ("t10k", 10)):
        pixels[part] = bytes(rng.randrange(256) for _ in range(count * 28 * 28))
        labels = bytes(i % 10 for i in range(count))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4B3i", 0, 0, 8, 3, count, 28, 28) + pixels[part])
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">4Bi", 0, 0, 8, 1, count) + labels)
    images = open_images("torchvision:MNIST", root=str(tmp_path), held_out=0.34)
    assert [len(images.split(s)) for s in ("train", "val", "test")] == [20, 10, 10]
    assert images.classes[3].startswith("3")
    for split, part in (("train", "train"), ("val", "train"), ("test", "t10k")):
        for i, name in enumerate(images.split(split).names):
            number = int(name.split()[-1])
            expected = pixels[part][number * 784 : (number + 1) * 784]
            assert images.split(split).load(i).tobytes() == expected
            assert images.split(split).labels[i] == number % 10


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("digit", "did you mean digits"),
        ("torchvision:CIFAR01", "did you mean CIFAR10"),
        ("torchvision:MNIST", "MNIST is not in .*nowhere; put it there, or set data.download to true"),
        ("/nowhere/at/all", "no folder or table of images '/nowhere/at/all'"),
    ],
)
def test_a_source_that_is_not_there_is_named(source, told, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        open_images(source, root=str(tmp_path / "nowhere"))


def test_folders_without_images_or_classes_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no folders: expected one for each class"):
        open_images(str(tmp_path / "empty"))
    (tmp_path / "bare" / "cat").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no image below .*bare"):
        open_images(str(tmp_path / "bare"))
    class_folders(tmp_path / "odd" / "train", {"cat": 2})
    class_folders(tmp_path / "odd" / "val", {"cat": 1, "dgo": 1})
    with pytest.raises(ValueError, match=r"there is no class 'dgo' in .*train"):
        open_images(str(tmp_path / "odd"))


def test_a_class_without_images_is_named(tmp_path):
    class_folders(tmp_path, {"cat": 10, "dog": 0, "emu": 10})
    with pytest.raises(ValueError, match="no image to train on of 1 classes: dog"):
        open_images(str(tmp_path)).check()


def test_a_split_without_images_is_named(tmp_path):
    class_folders(tmp_path, {"cat": 1, "dog": 2})
    with pytest.raises(ValueError, match="has no images to val on"):
        open_images(str(tmp_path)).split("val")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("path,class\na.png,1\n", "no column 'label'; it has path, class"),
        ("path,label\n", "lists no image"),
        ("path,label\na.png,\n", "line 2: no label"),
        ("path,label\na.png,1\nb.png,1\n", "line 3: there is no image .*b.png"),
        ("path,label,split\na.png,1,tarin\n", "unknown split 'tarin'"),
    ],
)
def test_a_mistake_in_a_table_is_named(text, told, tmp_path):
    picture(tmp_path / "a.png", 0, mode="L")
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        open_images(str(tmp_path / "table.csv"))


def test_images_to_classify_are_found_in_order_below_folders(tmp_path):
    for name in ("b.png", "a.JPG", "c/d.webp"):
        picture(tmp_path / name, 0)
    (tmp_path / "readme.txt").write_text("")
    found = [p.removeprefix(str(tmp_path)) for p in image_files([str(tmp_path), str(tmp_path / "b.png")])]
    assert found == ["/a.JPG", "/b.png", "/c/d.webp", "/b.png"]
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no image below '.*none'"):
        image_files([str(tmp_path / "none")])
    with pytest.raises(FileNotFoundError, match=r"no image or folder 'gone\.png'"):
        image_files(["gone.png"])


def test_folders_of_splits_need_no_training_one_and_no_lower_case(tmp_path):
    class_folders(tmp_path / "held" / "val", {"cat": 2, "dog": 1})
    class_folders(tmp_path / "held" / "test", {"cow": 1})
    held = open_images(str(tmp_path / "held"))
    assert held.classes == ("cat", "cow", "dog")
    assert {name: list(split.labels) for name, split in held.splits.items()} == {"val": [0, 0, 2], "test": [1]}
    class_folders(tmp_path / "named" / "Train", {"cat": 2, "dog": 2})
    class_folders(tmp_path / "named" / "Validation", {"cat": 1, "dog": 1})
    named = open_images(str(tmp_path / "named"), held_out=0)
    assert {name: list(split.labels) for name, split in named.splits.items()} == {"train": [0, 0, 1, 1], "val": [0, 1]}
    # A class may be called as a split is, beside others.
    class_folders(tmp_path / "exams", {"test": 1, "homework": 1})
    assert open_images(str(tmp_path / "exams")).classes == ("homework", "test")


def test_hidden_files_are_no_images(tmp_path):
    class_folders(tmp_path, {"cat": 2})
    (tmp_path / "cat" / "._0.png").write_bytes(b"of macOS")
    assert sorted(open_images(str(tmp_path), held_out=0).split("train").names) == image_files([str(tmp_path)])
    assert len(image_files([str(tmp_path)])) == 2


def test_numbers_that_are_written_in_two_ways_are_two_classes_in_one_order(tmp_path):
    table = tmp_path / "table.csv"
    labels = ["10", "1", "01", "001", "2"]
    names = [picture(tmp_path / f"{label}.png", 0).name for label in labels]
    table.write_text("path,label\n" + "".join(f"{name},{label}\n" for name, label in zip(names, labels)))
    assert open_images(str(table)).classes == ("001", "01", "1", "2", "10")


def test_a_table_that_is_no_text_is_named(tmp_path):
    (tmp_path / "table.csv").write_text("path,label\na.png,café\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"table\.csv: not UTF-8 text"):
        open_images(str(tmp_path / "table.csv"))
