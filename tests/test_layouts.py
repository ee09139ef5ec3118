"""Image folders as people have them: each is read rightly or refused by name, and every file is accounted for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.core.errors import UserError
from pipeline.prepare.sources import imagefolder
from pipeline.prepare.sources.sample import Columns
from pipeline.prepare.sources.splits import split_of
from tests import layouts
from tests.house import ROOT


def n_files(root):
    """Files below `root`, links followed but not round and round."""
    return sum(1 for p in root.rglob("*") if p.is_symlink() or not p.is_dir())


@pytest.mark.parametrize("case", layouts.CASES, ids=lambda case: case.layout)
def test_a_layout_is_read_or_refused_as_the_page_says(case, tmp_path):
    layouts.build(tmp_path / "elsewhere", {"": 4})
    layouts.build(tmp_path / "nothing", {"": 0})
    root = tmp_path / "images"
    layouts.build(root, case.tree)
    if case.refused:
        with pytest.raises(UserError) as refused:
            imagefolder.read(str(root), Columns(**case.params))
        assert case.refused in str(refused.value) and "\n" not in str(refused.value)
        return
    source = imagefolder.read(str(root), Columns(**case.params))
    assert source.classes == list(case.classes)
    counts = Counter(
        "unlabelled" if s.label is None else s.split or "train" for s in source.samples
    )
    expected = {
        "train": case.train,
        "val": case.val,
        "test": case.test,
        "unlabelled": case.unlabelled,
    }
    assert counts == Counter(expected)
    assert {reason: len(names) for reason, names in source.left_out.items()} == case.left_out
    for sample in source.samples:
        assert sample.read().size == (12, 12)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({**layouts.TRAIN, "test": 0}, "images: got test/ without images"),
        ({**layouts.ONE, "test": 0}, "images: got test/ without images"),
        ({**layouts.TRAIN, "docs/a.txt": "x", "test_images": 0}, "got test_images/ without images"),
        ({**layouts.TRAIN, "test": "-> ../nothing"}, "images: got test/ without images"),
        ({**layouts.TRAIN, "train/cow": "-> ../../nothing"}, "train/cow: got a class folder"),
        ({**layouts.ONE, "train_station": 0}, "train_station: got a class folder without images"),
        ({**layouts.TRAIN, "train_masks": 0, "docs/a.txt": "x"}, None),
        ({**layouts.TRAIN, "unlabelled": 0}, None),
        ({**layouts.TRAIN, "test/cat": 2, "testing": 0, "train/up": "-> ../.."}, None),
    ],
)
def test_a_split_or_class_without_images_is_refused_and_what_is_beside_it_is_not(
    tree, message, tmp_path
):
    layouts.build(tmp_path / "nothing", {"": 0})
    layouts.build(tmp_path / "images", tree)
    if message is None:
        assert imagefolder.read(str(tmp_path / "images"), Columns()).classes == ["cat", "dog"]
        return
    with pytest.raises(UserError, match=message):
        imagefolder.read(str(tmp_path / "images"), Columns())


def test_the_page_shows_these_layouts():
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert layouts.table() in page, "docs/data.md: replace the table by tests.layouts.table()"


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (
            ("train", "Train", "TRAIN", "training", "seg_train", "train_images", "dataset-train"),
            "train",
        ),
        (
            ("trainval", "train2017", "TrainImages", "trainset", "asl_alphabet_train", "01 train"),
            "train",
        ),
        (("val", "valid", "Validation", "dev", "VAL", "val_256", "my.dev"), "val"),
        (("test", "testing", "Eval", "evaluation", "test-a", "seg_test", "TestImages"), "test"),
        (("unlabelled", "unlabeled", "Unlabeled", "train_unlabeled", "unsupervised"), "unlabelled"),
        (
            (
                "cat",
                "strain",
                "contest",
                "device",
                "latest",
                "trains",
                "train_test",
                "validate_train",
                "",
                "日本",
            ),
            None,
        ),
    ],
)
def test_split_names_in_every_common_spelling(names, kind):
    for name in names:
        split = split_of(name)
        assert (split.kind if split else None) == kind, name


FOLDERS = st.sampled_from(
    [
        "train",
        "Train",
        "test",
        "valid",
        "val_images",
        "unlabeled",
        "cat",
        "dog",
        "data",
        ".git",
        "__MACOSX",
        "seg_train",
    ]
)
NAMES = st.sampled_from(
    [
        "0.png",
        "1.JPG",
        "._0.png",
        "a.txt",
        "Thumbs.db",
        "x",
        "labels.csv",
        "train.csv",
        "b.heic",
        "dead.png",
        "e\u0301.png",
        "\u00e9.png",
    ]
)
TABLES = st.sampled_from(
    ["file,label\n0.png,a\n1.JPG,b\n", "", "id,label\n0,1\n1,2\n", "a;b\n1;2\n", "\x00"]
)
TREES = st.dictionaries(
    st.lists(FOLDERS, max_size=3).map("/".join), st.sets(NAMES, min_size=1), max_size=8
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(tree=TREES, sheet=TABLES, pattern=st.sampled_from([None, "^([0-9a-z])"]))
def test_every_file_of_any_tree_is_read_or_left_out_with_a_reason(
    tree, sheet, pattern, tmp_path_factory
):
    root = tmp_path_factory.mktemp("tree")
    for folder, names in tree.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            path = root / folder / name
            if path.exists() or path.is_symlink():
                continue
            if name == "dead.png":
                path.symlink_to("/not/mounted")
            else:
                path.write_text(sheet if name.endswith(".csv") else "")
    try:
        source = imagefolder.read(str(root), Columns(pattern=pattern))
    except UserError as error:
        assert str(root) in str(error) or "prepare.label" in str(error) or ".csv" in str(error)
        return
    read = [s.origin for s in source.samples]
    left = [name for names in source.left_out.values() for name in names]
    tables = {
        note.split(" of ")[1].split(" (")[0] for note in source.notes if note.startswith("labels: ")
    }
    there = {
        p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_symlink() or p.is_file()
    }
    absent = set(read) - there  # named in a table
    assert sorted([*(set(read) - absent), *left, *tables]) == sorted(there)
    assert len(set(read)) == len(read) and not absent - {
        f"{Path(t).parent}/{n}".removeprefix("./")
        for t in tables
        for n in ("0.png", "1.JPG", "0", "1")
    }
    assert all(split_of(name) is None or not split_of(name).exact for name in source.classes)
