"""Splits, labels, order and the index of a prepared folder, and what is refused on the way."""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pipeline.core.config import parse
from pipeline.core.errors import UserError
from pipeline.data.prepared import SPLITS, UNLABELLED, Prepared
from pipeline.prepare.prepare import prepare, remarks
from pipeline.prepare.settings import Prepare
from stages import prepare as stages_prepare


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
    counts = [len(prepared.rows(s)) for s in SPLITS]
    assert counts == [1297, 100, 400] and prepared.images.array.shape == (1797, 32, 32, 3)
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
    unlabelled = prepared.labels == UNLABELLED
    assert unlabelled.sum() == 3 and (prepared.splits[unlabelled] == "train").all()
    assert index["labelled_train"] == index["student_labels"] == 16
    assert "train/dög/3.png" in prepared.origins()


def test_train_and_val_only_means_val_is_the_test_split(folder, tmp_path):
    (folder / "test").rename(folder / "val")
    index = prepare(Prepare("imagefolder", path=str(folder), image_size=16, val=4), tmp_path / "p")
    prepared = Prepared.open(tmp_path / "p")
    assert index["counts"]["test"] == 8
    origins = prepared.origins()
    assert all(origins[r].startswith("val/") for r in prepared.rows("test"))


def test_one_tree_of_classes_is_split_by_seed(folder, tmp_path):
    index = prepare(
        Prepare("imagefolder", path=str(folder / "train"), image_size=16, val=0.2, test=0.2),
        tmp_path / "p",
    )
    assert index["counts"] == {"train": 12, "val": 4, "test": 4}


def test_the_index_is_in_the_order_of_the_hash_of_each_images_pixels(digits):
    prepared = Prepared.open(digits)
    found = [
        hashlib.sha256(image.tobytes()).hexdigest()
        for image in prepared.images.squares(range(len(prepared.images)))
    ]
    assert found == list(prepared.sha256) == sorted(found)


@pytest.mark.parametrize(("stored", "file"), [("raw", "images.npy"), ("packed", "images.bin")])
def test_the_names_of_the_files_and_their_order_decide_nothing(stored, file, folder, tmp_path):
    config = Prepare(
        "imagefolder",
        path=str(folder),
        image_size=16,
        stored=stored,
        val=4,
        student_labels=3,
    )
    prepare(config, tmp_path / "before")
    for i, path in enumerate(sorted(folder.rglob("*.png"), key=lambda p: p.name[::-1])):
        path.rename(path.with_name(f"renamed {97 * i % 31} {i}.png"))
    prepare(config, tmp_path / "after")
    for name in ("index.json", file):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    assert (
        Prepared.open(tmp_path / "before").origins() != Prepared.open(tmp_path / "after").origins()
    )


def test_pictures_that_stand_twice_are_reported(folder, tmp_path):
    shutil.copy(folder / "train" / "cat" / "3.png", folder / "test" / "cat" / "copy.png")
    shutil.copy(folder / "train" / "cat" / "5.png", folder / "train" / "dög" / "torn.png")
    config = Prepare("imagefolder", path=str(folder), image_size=16, stored="raw", val=4)
    index = prepare(config, tmp_path / "p")
    prepared = Prepared.open(tmp_path / "p")
    across = next(d for d in index["duplicates"] if "test" in d["splits"] and d["labels"] == [0])
    assert sum(len(d["splits"]) > 1 for d in index["duplicates"]) == 8  # 0 to 3 of both classes
    assert {prepared.sha256[row] for row in across["rows"]} == {across["sha256"]}
    torn = [d for d in index["duplicates"] if d["labels"] == [0, 1]]
    origins = [prepared.origins()[row] for row in torn[0]["rows"]]
    assert len(torn) == 1 and sorted(origins) == ["train/cat/5.png", "train/dög/torn.png"]
    told = " ".join(remarks(index))
    assert "in more than one split (what is tested was seen before): 8" in told
    assert "images under more than one label: 1" in told


@pytest.mark.parametrize(("stored", "file"), [("raw", "images.npy"), ("packed", "images.bin")])
def test_broken_pictures_are_left_out_and_listed_where_asked(stored, file, folder, tmp_path):
    for name in ("cat/a.png", "dög/b.jpg"):
        (folder / "train" / name).write_bytes(b"broken")
    config = Prepare("imagefolder", path=str(folder), image_size=16, stored=stored, val=4)
    with pytest.raises(UserError, match=rf"{folder}/train/cat/a.png: not a readable image"):
        prepare(config, tmp_path / "p")
    assert not (tmp_path / "p").exists()
    index = prepare(replace(config, on_error="skip"), tmp_path / "skipped")
    assert [s["origin"] for s in index["skipped"]] == ["train/cat/a.png", "train/dög/b.jpg"]
    assert (
        "skipped train/cat/a.png: no format that is read here; it begins with b'broken'"
        in remarks(index)
    )
    for s in index["skipped"]:
        (folder / s["origin"]).unlink()
    prepare(config, tmp_path / "without")
    pixels = [(tmp_path / p / file).read_bytes() for p in ("skipped", "without")]
    assert pixels[0] == pixels[1]
    assert len(Prepared.open(tmp_path / "skipped").images) == 31


def test_a_class_that_is_all_broken_is_named(folder, tmp_path):
    for path in (folder / "train" / "cat").iterdir():
        path.write_bytes(b"")
    config = Prepare("imagefolder", path=str(folder), image_size=16, val=2, on_error="skip")
    with pytest.raises(
        UserError, match="class 'cat': got no training image with val 2 and test 0.2"
    ):
        prepare(config, tmp_path / "p")


def test_a_full_disk_is_told_before_anything_is_written(folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    config = Prepare("imagefolder", path=str(folder), image_size=16, stored="raw", val=4)
    with pytest.raises(UserError, match="got No space left .*; expected 0.00 GB for the prepared"):
        prepare(config, tmp_path / "p")
    assert not any(p.suffix != "" or p.name == "p" for p in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda r: (r / "train" / "cat" / "0.png").write_bytes(b"\x89PNG broken"),
            "0.png: not a readable image",
        ),
        (
            lambda r: (r / "train" / "eel").mkdir(),
            "eel: got a class folder without images; .*add images",
        ),
        (
            lambda r: draw(r / "test" / "cow" / "1.png", 0),
            "got the class 'cow', which train/ does not",
        ),
        (lambda r: (r / "train").rename(r / "trian"), "got test/ beside trian/ without train/"),
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
        (
            {"path": "nowhere"},
            "no such file or folder in .*; expected the folder that holds train/",
        ),
        ({"path": __file__}, "test_prepare.py: got a file; expected the folder"),
        (
            {"label_column": "fine"},
            "prepare.label_column: got 'fine'; expected null for source 'im",
        ),
        (
            {"student_labels": 100},
            "got 100; expected at most .* the training images of class 'cat'",
        ),
        ({"val": 1000.0}, "prepare.val: got 1000 of .* images; expected a stratified split"),
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
        ({"source": "digit"}, r"source: got 'digit'; did you mean 'digits'\?"),
        (
            {"student_labels": "some"},
            "student_labels: got 'some'; expected 'all' or a whole number",
        ),
        ({"student_labels": 0}, "student_labels: got 0; expected 'all' or 1 or more"),
        ({"image_size": 4}, "image_size: got 4; expected 8 or more"),
        ({"val": 0.0}, "val: got 0.0; expected above 0 or 1 or more"),
    ],
)
def test_impossible_parameters_are_refused_with_the_value(kwargs, message):
    with pytest.raises(UserError, match=message):
        parse(Prepare, {"source": "digits", **kwargs}, "prepare")


def test_one_class_is_refused_with_the_count(tmp_path):
    draw(tmp_path / "images" / "only" / "a.png", 0)
    with pytest.raises(UserError, match=r"got 1 class folder \(only\); expected 2 or more"):
        prepare(Prepare("imagefolder", path=str(tmp_path / "images")), tmp_path / "p")


def command(folder, out, capsys, **params):
    """What `python -m stages.prepare` prints for an image folder, line by line."""
    section = {"source": "imagefolder", "path": str(folder), "image_size": 16, "val": 4, **params}
    (out.parent / "params.yaml").write_text(json.dumps({"prepare": section}))
    stages_prepare.main(argparse.Namespace(out=out, params=out.parent / "params.yaml"))
    return capsys.readouterr().out.splitlines()


def test_the_last_line_says_what_was_read_and_what_was_not(folder, tmp_path, capsys):
    for name in ("train/cat/._0.png", "__MACOSX/x.png", "train/dög/a.txt", "train/b.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    (folder / "train" / "cat" / "dead.png").symlink_to("/not/mounted/7.png")
    draw(folder / "train" / "loose.png", 7)
    with pytest.raises(
        UserError,
        match="train/cat/dead.png: not a readable image .a link to /not/mounted/7.png, which is not there",
    ):
        command(folder, tmp_path / "p", capsys)
    lines = command(folder, tmp_path / "p", capsys, on_error="skip")
    assert lines[0].startswith(f"{tmp_path / 'p'}: 19 train, 4 val, 8 test; 2 classes, 16 px;")
    assert lines[-1] == (
        "  read 31 images; not read: 6 files: 1 broken, "
        "2 .txt, not a format that is read (train/b.txt and 1 more), "
        "1 hidden (train/cat/._0.png), 1 of an operating system (__MACOSX/x.png), "
        "1 outside the class folders, in train/ (train/loose.png)"
    )
    source = json.loads((tmp_path / "p" / "source.json").read_text())
    assert source["left_out"]["hidden"] == ["train/cat/._0.png"]


def test_a_file_of_several_frames_is_mentioned(folder, tmp_path, capsys):
    frames = [Image.new("RGB", (9, 9), (200, 10 * i, 0)) for i in range(3)]
    for name in ("a.gif", "b.webp", "c.png", "d.tif"):
        path = folder / "train" / "cat" / name
        frames[0].save(path, save_all=True, append_images=frames[1:])
    lines = command(folder, tmp_path / "p", capsys)
    assert lines[1] == (
        "  several frames or pages, of which the first is read: 4 files (train/cat/a.gif, "
        "train/cat/b.webp, train/cat/c.png and 1 more)"
    )
    assert lines[-1] == "  read 35 images; not read: 0 files"


def test_class_folders_and_a_table_give_the_same_bytes(folder, tmp_path):
    rows = []
    for path in sorted(folder.glob("t*/*/*.png")):
        split, label = path.relative_to(folder).parts[:2]
        target = tmp_path / "flat" / split / f"{label}{path.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
        rows.append(f"{split}/{label}{path.name},{label}")
    (tmp_path / "flat" / "labels.csv").write_text("file,label\n" + "\n".join(rows) + "\n")
    shutil.rmtree(folder / "unlabelled")
    for name, path in (("a", folder), ("b", tmp_path / "flat")):
        prepare(Prepare("imagefolder", str(path), image_size=16, val=4), tmp_path / name)
    for name in ("index.json", "images.bin"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
