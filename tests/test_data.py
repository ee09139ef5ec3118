"""Sources, splits and the index: what the pipeline learns from, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from pipeline import data
from pipeline.data import Prepare, Prepared, prepare
from pipeline.errors import UserError


def draw(path, colour, mode="RGB", size=(20, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for split, n in (("train", 10), ("test", 4)):
        for c, name in enumerate(("cat", "dög")):
            for i in range(n):
                draw(root / split / name / f"{i}.png", (40 * c, 10 * i, 5))
    for i in range(3):
        draw(root / "unlabelled" / f"u{i}.jpg", (9, 9, 9))
    return root


def test_digits_are_split_stratified_and_by_seed(digits, tmp_path):
    prepared = Prepared.open(digits)
    counts = [len(prepared.rows(s)) for s in data.SPLITS]
    assert counts == [1297, 100, 400] and prepared.images.shape == (1797, 32, 32, 3)
    per_class = np.bincount(prepared.labels[prepared.rows("test")])
    assert per_class.min() >= 38 and per_class.max() <= 42
    prepare(
        Prepare("digits", image_size=32, student_labels=5, val=100, test=400, seed=1),
        tmp_path / "p",
    )
    assert not np.array_equal(Prepared.open(tmp_path / "p").splits, prepared.splits)


def test_the_same_seed_prepares_the_same_bytes(digits, tmp_path):
    prepare(Prepare("digits", image_size=32, student_labels=5, val=100, test=400), tmp_path / "p")
    for path in digits.iterdir():
        assert path.read_bytes() == (tmp_path / "p" / path.name).read_bytes()


def test_student_labels_are_n_a_class_of_train_only(digits):
    prepared = Prepared.open(digits)
    assert (prepared.splits[prepared.student_label] == "train").all()
    assert np.bincount(prepared.labels[prepared.student_label]).tolist() == [5] * 10


def test_an_image_folder_keeps_its_splits_and_cuts_the_missing_one(folder, tmp_path):
    index = prepare(Prepare("imagefolder", path=str(folder), image_size=16, val=4), tmp_path / "p")
    prepared = Prepared.open(tmp_path / "p")
    assert prepared.classes == ("cat", "dög")
    assert index["counts"] == {"train": 19, "val": 4, "test": 8}
    unlabelled = prepared.labels == data.UNLABELLED
    assert unlabelled.sum() == 3 and (prepared.splits[unlabelled] == "train").all()
    assert index["labelled_train"] == index["student_labels"] == 16
    assert "train/dög/3.png" in prepared.ids


def test_train_and_val_only_means_val_is_the_test_split(folder, tmp_path):
    (folder / "test").rename(folder / "val")
    index = prepare(Prepare("imagefolder", path=str(folder), image_size=16, val=4), tmp_path / "p")
    prepared = Prepared.open(tmp_path / "p")
    assert index["counts"]["test"] == 8
    assert all(prepared.ids[r].startswith("val/") for r in prepared.rows("test"))


def test_one_tree_of_classes_is_split_by_seed(folder, tmp_path):
    index = prepare(
        Prepare("imagefolder", path=str(folder / "train"), image_size=16, val=0.2, test=0.2),
        tmp_path / "p",
    )
    assert index["counts"] == {"train": 12, "val": 4, "test": 4}


def test_the_index_holds_the_hash_of_each_images_pixels(digits):
    import hashlib

    prepared = Prepared.open(digits)
    records = json.loads((digits / "index.json").read_text())["records"]
    assert records[7]["sha256"] == hashlib.sha256(prepared.images[7].tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 100, (100, 100, 100)),
        ("P", 0, (0, 0, 0)),
        ("RGBA", (200, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (200, 0, 0, 255), (200, 0, 0)),
        ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
        ("I;16", 25700, (100, 100, 100)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_every_kind_of_image_becomes_rgb(mode, colour, expected):
    image = Image.new(mode, (20, 20), colour)
    found = data.square_rgb(image, 8)
    assert found.shape == (8, 8, 3) and tuple(found[4, 4]) == expected


def test_an_exif_rotation_is_applied():
    image = Image.new("RGB", (20, 20), "black")
    image.paste("white", (0, 0, 20, 5))  # a white top
    exif = image.getexif()
    exif[0x0112] = 6  # shown rotated by 90 degrees clockwise: white on the right
    image.getexif().update(exif)
    assert data.square_rgb(image, 8)[4, 7, 0] > 200 and data.square_rgb(image, 8)[0, 3, 0] < 50


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda r: (r / "train" / "cat" / "0.png").write_bytes(b"\x89PNG broken"),
            "0.png: not a readable image",
        ),
        (lambda r: (r / "train" / "eel").mkdir(), "class 'eel' holds no image"),
        (lambda r: draw(r / "test" / "cow" / "1.png", 0), "class 'cow' is not in train/"),
        (lambda r: (r / "train").rename(r / "trian"), "has test/ but no train/"),
    ],
)
def test_mistakes_in_a_folder_are_named_and_nothing_is_left_behind(
    spoil, message, folder, tmp_path
):
    spoil(folder)
    with pytest.raises(UserError, match=message):
        prepare(
            Prepare("imagefolder", path=str(folder), image_size=16, val=4), tmp_path / "out" / "p"
        )
    left = list((tmp_path / "out").iterdir()) if (tmp_path / "out").exists() else []
    assert left == []


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"path": None}, "prepare.path: got None"),
        ({"path": "nowhere"}, "prepare.path: nowhere is not a folder"),
        ({"student_labels": 100}, "got 100, but class 'cat' has only"),
        ({"val": 1000.0}, "prepare.val: cannot cut 1000 of"),
    ],
)
def test_mistakes_in_the_parameters_are_named(kwargs, message, folder, tmp_path):
    config = Prepare(
        **{"source": "imagefolder", "path": str(folder), "image_size": 16, "val": 4, **kwargs}
    )
    with pytest.raises(UserError, match=message):
        prepare(config, tmp_path / "p")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"source": "digit"}, r"source is 'digit'; did you mean 'digits'\?"),
        ({"student_labels": "some"}, "student_labels is 'some'"),
        ({"student_labels": 0}, "student_labels is 0"),
        ({"image_size": 4}, "image_size is 4"),
        ({"val": 0.0}, "val is 0.0"),
    ],
)
def test_impossible_parameters_are_refused_with_the_value(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Prepare(**{"source": "digits", **kwargs})


def test_one_class_is_refused_with_the_count(tmp_path):
    draw(tmp_path / "images" / "only" / "a.png", 0)
    with pytest.raises(UserError, match="found 1 class folders; at least 2"):
        prepare(Prepare("imagefolder", path=str(tmp_path / "images")), tmp_path / "p")


def test_damaged_pixels_are_refused(digits, tmp_path):
    import shutil

    copy = shutil.copytree(digits, tmp_path / "p")
    pixels = bytearray((copy / "images.npy").read_bytes())
    pixels[-1] ^= 1
    (copy / "images.npy").write_bytes(bytes(pixels))
    with pytest.raises(UserError, match="not the pixels of index.json"):
        Prepared.open(copy)
