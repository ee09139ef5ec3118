"""Folders of images as people have them, and what becomes of each: the cases of test_layouts and docs/data.md."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROWS = "".join(f"{i},{'cat' if i % 2 else 'dog'}\n" for i in range(6))
FILES = "".join(f"{i}.png,{'cat' if i % 2 else 'dog'}\n" for i in range(6))
HOT = "".join(f"{i}.png,{i % 2},{1 - i % 2}\n" for i in range(6))
NFD = unicodedata.normalize("NFD", "Gänseblümchen")
NFC = unicodedata.normalize("NFC", NFD)


@dataclass(frozen=True)
class Case:
    """A folder. `tree`: a folder -> how many images it holds, a file -> its text, a link -> `-> target`."""

    layout: str  # the words of docs/data.md
    tree: dict[str, int | str]
    train: int = 0
    val: int = 0
    test: int = 0
    unlabelled: int = 0
    left_out: dict[str, int] = field(default_factory=dict)  # reason -> files
    refused: str = ""  # a part of the message
    classes: tuple[str, ...] = ("cat", "dog")
    params: dict[str, Any] = field(default_factory=dict)

    def happens(self) -> str:
        """The words of docs/data.md for the result."""
        if self.refused:
            return f"refused: {self.refused}"
        counts = {"train": self.train, "val": self.val, "test": self.test}
        counts["unlabelled"] = self.unlabelled
        read = ", ".join(f"{n} {name}" for name, n in counts.items() if n)
        classes = "" if self.classes == ("cat", "dog") else f"; classes {', '.join(self.classes)}"
        left = ", ".join(f"{n} {reason}" for reason, n in self.left_out.items())
        return f"{read}{classes}{f'; not read: {left}' if left else ''}"


def build(root: Path, tree: dict[str, int | str]) -> None:
    """Write the files of a case below `root`; every image differs."""
    seed = 0
    for name, content in tree.items():
        path = root / name
        names = [path / f"{i}.png" for i in range(content)] if isinstance(content, int) else [path]
        if content == 0:
            path.mkdir(parents=True)
        for file in names:
            seed += 1
            file.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str) and content.startswith("-> "):
                file.symlink_to(content[3:])
            elif isinstance(content, str) and content != "image":
                file.write_text(content)
            else:
                draw = np.random.default_rng(seed)
                pixels = draw.integers(0, 256, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(file, "PNG")


def splits(train: str, val: str, test: str) -> dict[str, int | str]:
    """Class folders in three split folders."""
    sizes = {train: 4, val: 2, test: 3}
    return {f"{split}/{name}": n for split, n in sizes.items() for name in ("cat", "dog")}


ONE = {"cat": 6, "dog": 6}
TRAIN = {"train/cat": 4, "train/dog": 4}
FLAT = "outside the class folders"
THREE = {"train": 8, "val": 4, "test": 6}

CASES = [
    Case("`cat/` `dog/`", ONE, train=12),
    Case(
        "`train/cat/` ... `test/cat/` ...", {**TRAIN, "test/cat": 2, "test/dog": 2}, train=8, test=4
    ),
    Case("`train/` `val/`, no test", {**TRAIN, "val/cat": 2, "val/dog": 2}, train=8, test=4),
    Case("`train/` `valid/` `test/`", splits("train", "valid", "test"), **THREE),
    Case(
        "`Training/` `Validation/` `Testing/`", splits("Training", "Validation", "Testing"), **THREE
    ),
    Case("`TRAIN/` `DEV/` `TEST/`", splits("TRAIN", "DEV", "TEST"), **THREE),
    Case("`train/` `val/` `eval/`", splits("train", "val", "eval"), **THREE),
    Case(
        "`train2017/` `val2017/` `test2017/`", splits("train2017", "val2017", "test2017"), **THREE
    ),
    Case(
        "`train_images/` `val_images/` `test_images/`",
        splits("train_images", "val_images", "test_images"),
        **THREE,
    ),
    Case(
        "`dataset-train/` `dataset-val/` `dataset-test/`",
        splits("dataset-train", "dataset-val", "dataset-test"),
        **THREE,
    ),
    Case("`TrainSet/` `ValSet/` `TestSet/`", splits("TrainSet", "ValSet", "TestSet"), **THREE),
    Case(
        "`seg_train/seg_train/cat/` ..., `seg_pred/`",
        {
            **splits("seg_train/seg_train", "seg_dev/seg_dev", "seg_test/seg_test"),
            "seg_pred/seg_pred": 5,
        },
        **THREE,
        left_out={f"{FLAT}, in seg_pred/": 5},
    ),
    Case("`data/train/cat/` ...", splits("data/train", "data/val", "data/test"), **THREE),
    Case("`train/images/cat/` ...", splits("train/images", "val/images", "test/images"), **THREE),
    Case("`flowers-main/cat/` ...", {"flowers-main/cat": 6, "flowers-main/dog": 6}, train=12),
    Case(
        "`train/` and `train_masks/`",
        {**TRAIN, "train_masks": 3},
        train=8,
        left_out={f"{FLAT}, in train_masks/": 3},
    ),
    Case(
        "`val/` and `valid/`",
        {**TRAIN, "val/cat": 1, "valid/cat": 1},
        refused="got val/, valid/ for the val split; expected one folder",
    ),
    Case(
        "`test/cat/` ... and no train",
        {"test/cat": 2, "test/dog": 2},
        refused="got test/ without train/",
    ),
    Case(
        "`cat/` `dog/` and a flat `test/`",
        {**ONE, "test": 5},
        refused="got test/ beside cat/, dog/ without train/",
    ),
    Case(
        "`bus/` `car/` and a class `train/`",
        {"bus": 4, "car": 4, "train": 4},
        refused="got train/ beside bus/, car/, a split beside class folders",
    ),
    Case(
        "`bus/` `test_tube/` `train_station/`",
        {"bus": 4, "test_tube": 4, "train_station": 4},
        train=12,
        classes=("bus", "test_tube", "train_station"),
    ),
    Case(
        "`bus/` `x_train/` `x_test/`",
        {"bus": 4, "x_train": 4, "x_test": 2},
        refused="got x_test/, x_train/ beside bus/, a split beside class folders",
    ),
    Case(
        "a class `train` in both splits",
        {"train/bus": 4, "train/train": 4, "test/bus": 2, "test/train": 2},
        train=8,
        test=4,
        classes=("bus", "train"),
    ),
    Case(
        "`train/cat/` `train/dog/` `train/val/`",
        {**TRAIN, "train/val": 3},
        refused="got the split val/ beside class folders",
    ),
    Case(
        "flat `test/` beside `train/`",
        {**TRAIN, "test": 5},
        train=8,
        left_out={"no label, test/ has no class folders": 5},
    ),
    Case(
        "flat `test/test/`",
        {**TRAIN, "test/test": 5},
        train=8,
        left_out={"no label, test/ has no class folders": 5},
    ),
    Case(
        "`test/` has a class that `train/` lacks",
        {**TRAIN, "test/cow": 2},
        refused="got the class 'cow', which train/ does not have",
    ),
    Case(
        "images beside the class folders",
        {**TRAIN, "train": 5, "cover.png": "image"},
        train=8,
        left_out={f"{FLAT}, in train/": 5, FLAT: 1},
    ),
    Case("images at any depth of a class", {"cat/2019/spring": 3, "cat": 3, "dog": 6}, train=12),
    Case("`unlabelled/` or `unlabeled/`", {**TRAIN, "unlabeled": 5}, train=8, unlabelled=5),
    Case("`unlabeled/` beside `cat/` `dog/`", {**ONE, "unlabeled": 5}, train=12, unlabelled=5),
    Case("`train/unlabelled/`", {**TRAIN, "train/unlabelled": 5}, train=8, unlabelled=5),
    Case(
        "`._0.png`, `__MACOSX/`, `.DS_Store`",
        {**ONE, "cat/._0.png": "x", "__MACOSX/cat/._0.png": "x", ".DS_Store": "x"},
        train=12,
        left_out={"hidden": 2, "of an operating system": 1},
    ),
    Case(
        "`@eaDir/`, `Thumbs.db`, `desktop.ini`",
        {**ONE, "cat/@eaDir": 2, "dog/Thumbs.db": "x", "desktop.ini": "x"},
        train=12,
        left_out={"of an operating system": 4},
    ),
    Case(
        "`.ipynb_checkpoints/`, `.thumbnails/`",
        {**ONE, "cat/.ipynb_checkpoints": 6, "dog/.thumbnails": 6},
        train=12,
        left_out={"hidden": 12},
    ),
    Case(
        "a readme, a HEIC photo",
        {**ONE, "README.md": "x", "cat/a.heic": "x"},
        train=12,
        left_out={".md, not a format that is read": 1, ".heic, not a format that is read": 1},
    ),
    Case(
        "`train/` `val/` and an empty `test/`",
        {**TRAIN, "val/cat": 2, "val/dog": 2, "test/cat": 0, "test/dog": 0},
        refused="got test/ without images; expected images in every split",
    ),
    Case(
        "a link to an empty folder",
        {**ONE, "eel": "-> ../nothing"},
        refused="eel: got a class folder without images",
    ),
    Case("an empty class folder", {**ONE, "eel": 0}, refused="got a class folder without images"),
    Case(
        "one name composed and decomposed",
        {f"train/{NFC}": 2, f"train/{NFD}": 2, "train/rose": 4, f"test/{NFD}": 2, "test/rose": 2},
        train=8,
        test=4,
        classes=(NFC, "rose"),
    ),
    Case("a link to a folder", {**ONE, "dog/more": "-> ../../elsewhere"}, train=16),
    Case(
        "a link to a folder above",
        {**ONE, "dog/up": "-> ../.."},
        train=12,
        left_out={"a link to a folder above itself": 1},
    ),
    Case(
        "a dead link to a folder",
        {**ONE, "eel": "-> /not/mounted"},
        refused="got a link to /not/mounted, which is not there",
    ),
    Case(
        "one flat folder",
        {"": 6},
        refused="got no class folders and 6 images; expected 2 class folders or more",
    ),
    Case("one class", {"only": 6}, refused="got 1 class folder (only); expected 2 or more"),
    Case(
        "flat, names by `label_pattern`",
        {"cat_1.png": "image", "cat_2.png": "image", "dog_1.png": "image", "x.png": "image"},
        train=3,
        left_out={"a name that prepare.label_pattern does not match": 1},
        params={"pattern": "^(cat|dog)_"},
    ),
    Case(
        "flat, `labels.csv` with `file,label`",
        {"": 6, "labels.csv": "file,label\n" + FILES},
        train=6,
    ),
    Case(
        "flat `train/` `test/`, `train.csv` with `id,label`",
        {
            "train": 6,
            "test": 6,
            "train.csv": "id,label\n" + ROWS,
            "test.csv": "id\n0\n1\n",
            "sample_submission.csv": "id,label\n0,cat\n",
        },
        train=6,
        left_out={
            "no label in train.csv, in test/": 6,
            "a table in which no labels are understood": 1,
            "a table of answers to hand in, by its name": 1,
        },
    ),
    Case(
        "`images/`, one-hot columns", {"images": 6, "truth.csv": "image,cat,dog\n" + HOT}, train=6
    ),
    Case(
        "`metadata.csv` in each split",
        {
            "train": 6,
            "train/metadata.csv": "file_name,label\n" + FILES,
            "test": 6,
            "test/metadata.csv": "file_name,label\n" + FILES,
        },
        train=6,
        test=6,
    ),
    Case(
        "a column of splits",
        {
            "": 6,
            "all.csv": "file,label,split\n"
            + FILES.replace("\n", ",training\n", 4)
            .replace("4.png,dog\n", "4.png,dog,test\n")
            .replace("5.png,cat\n", "5.png,cat,test\n"),
        },
        train=4,
        test=2,
    ),
    Case("tab or semicolon, no header", {"": 6, "labels.tsv": FILES.replace(",", "\t")}, train=6),
    Case(
        "labels 1, 2, ...",
        {"": 6, "labels.csv": "file,label\n" + FILES.replace("cat", "1").replace("dog", "2")},
        train=6,
        classes=("1", "2"),
    ),
    Case(
        "a header that is not understood",
        {
            "": 6,
            "labels.csv": "file,width,height\n" + FILES.replace("cat", "9,9").replace("dog", "8,8"),
        },
        refused="got the header file, width, height; expected a column of labels",
    ),
    Case(
        "a table that contradicts the class folders",
        {**ONE, "a.csv": "file,label\ncat/0.png,x\ncat/1.png,y\ndog/0.png,x\n"},
        refused="got other labels (column 'label') than the class folders",
    ),
]


def table() -> str:
    """The table of docs/data.md."""
    rows = [f"| {case.layout} | {case.happens()} |" for case in CASES]
    return "\n".join(["| layout | what happens |", "|---|---|", *rows])
