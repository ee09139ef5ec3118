"""Parquet files as the hub and its users write them: metadata, names of files and classes, shards, faults."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pipeline.core.errors import UserError
from pipeline.prepare.prepare import prepare
from pipeline.prepare.settings import Prepare
from pipeline.prepare.sources import parquet
from pipeline.prepare.sources.sample import Columns
from tests import containers

PETS = ["cat", "dog"]


def write(path, labels, names=None, features=None, metadata=None, seed=0, **columns):
    """A file of the hub: `image`, `label`, and a ClassLabel where `names` are given."""
    import pyarrow as pa
    from pyarrow import parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [containers.png(p) for p in containers.pictures(len(labels), seed)[0]]
    images = [{"bytes": cell, "path": f"{i}.png"} for i, cell in enumerate(cells)]
    kind = (
        {"names": names, "_type": "ClassLabel"} if names else {"dtype": "int64", "_type": "Value"}
    )
    described = {"image": {"_type": "Image"}, "label": kind, **(features or {})}
    text = json.dumps({"info": {"features": described}}) if metadata is None else metadata
    table = pa.table({"image": images, "label": labels, **columns})
    pq.write_table(table.replace_schema_metadata({"huggingface": text}), path)


def read(path, **columns):
    return parquet.read(str(path), Columns(**columns))


def by_split(source):
    """Split -> how many rows; None is train."""
    splits = [sample.split for sample in source.samples]
    return {split: splits.count(split) for split in splits}


SIX, FOUR, TWO = [0, 1] * 3, [0, 1] * 2, [0, 1]


@pytest.mark.parametrize(
    "feature",
    [
        [{"dtype": "string", "_type": "Value"}],
        {"feature": {"dtype": "string", "_type": "Value"}, "length": -1, "_type": "Sequence"},
        {"names": None, "num_classes": 9, "_type": "ClassLabel"},
        {"feature": {"names": PETS, "_type": "ClassLabel"}, "_type": "List"},
        {"box": {"dtype": "float32", "_type": "Value"}},
        "string",
        None,
    ],
)
def test_the_description_of_another_column_may_be_of_any_type(feature, tmp_path):
    write(tmp_path / "a.parquet", TWO, PETS, {"tags": feature}, tags=[["a", "b"], []])
    assert read(tmp_path).classes == PETS and len(read(tmp_path).samples) == 2


@pytest.mark.parametrize(
    "metadata", ["{}", "[]", '{"info": null}', '{"info": {"features": []}}', "7"]
)
def test_metadata_that_describes_nothing_is_read_as_none(metadata, tmp_path):
    write(tmp_path / "a.parquet", SIX, metadata=metadata)
    assert read(tmp_path).classes == ["0", "1"]


def test_class_names_may_be_a_dictionary(tmp_path):
    write(tmp_path / "a.parquet", TWO, {"0": "cat", "1": "dog"})
    assert read(tmp_path).classes == PETS


def test_rows_are_matched_by_the_names_of_their_classes(tmp_path):
    write(tmp_path / "train.parquet", [0, 1, 1], ["cat", "dog"])
    write(tmp_path / "test.parquet", [0, 1, 1], ["dog", "cat"])
    write(tmp_path / "valid.parquet", ["dog", "cat", None])
    source = read(tmp_path)
    assert source.classes == PETS
    labels = {s.origin: s.label for s in source.samples}
    assert [labels[f"train.parquet:{i}"] for i in range(3)] == [0, 1, 1]
    assert [labels[f"test.parquet:{i}"] for i in range(3)] == [1, 0, 0]
    assert [labels[f"valid.parquet:{i}"] for i in range(3)] == [1, 0, None]


def test_a_name_twice_in_the_list_is_two_classes(tmp_path):
    """ImageNet has two cranes."""
    write(tmp_path / "a.parquet", [0, 1, 2], ["crane", "dog", "crane"])
    assert [s.label for s in read(tmp_path).samples] == [0, 1, 2]


@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        ([1, 2, 3, 1], ["1", "2", "3"], [0, 1, 2, 0]),
        ([0, 2, -1, 1], ["0", "1", "2"], [0, 2, None, 1]),
        ([0.0, 1.0, None, float("nan")], ["0", "1"], [0, 1, None, None]),
        ([False, True, True, None], ["0", "1"], [0, 1, 1, None]),
        (["b", "a", None, "b"], ["a", "b"], [1, 0, None, 1]),
    ],
)
def test_labels_of_every_kind_are_classes(labels, classes, numbers, tmp_path):
    write(tmp_path / "a.parquet", labels)
    source = read(tmp_path)
    assert source.classes == classes and [s.label for s in source.samples] == numbers


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("flowers_train", "flowers_test"),
        ("flowers-train-00000-of-00001", "flowers-test-00000-of-00001"),
        ("training", "testing"),
        ("Train", "Test"),
        ("TRAIN", "EVAL"),
        ("train-00000-of-00001-3cb1f9a1b2c3d4e5", "test-00000-of-00001-0123456789abcdef"),
        ("data/train/0000", "data/test/0000"),
        ("default/train/0000", "default/test/0000"),
        ("default/partial-train/0000", "default/partial-test/0000"),
        ("train/part-0", "test/part-0"),
        ("my.train.v2", "my.test.v2"),
    ],
)
def test_a_split_is_found_in_the_name_of_a_file_or_folder(train, test, tmp_path):
    write(tmp_path / f"{train}.parquet", SIX, PETS)
    write(tmp_path / f"{test}.parquet", FOUR, PETS, seed=1)
    source = read(tmp_path)
    assert by_split(source) == {None: 6, "test": 4}
    assert {s.origin.rpartition(":")[0] for s in source.samples if s.split == "test"} == {
        f"{test}.parquet"
    }


def test_validation_alone_is_the_test_split_and_unlabelled_rows_are_train(tmp_path):
    for split, labels in (("train", SIX), ("validation", FOUR), ("unsupervised", [-1, -1])):
        write(tmp_path / "data" / f"{split}-00000-of-00001.parquet", labels, PETS)
    source = read(tmp_path)
    assert by_split(source) == {None: 6, "test": 4, "train": 2}
    assert sum(s.label is None for s in source.samples) == 2


def test_the_folders_above_the_path_name_no_split(tmp_path):
    write(tmp_path / "test" / "set" / "one.parquet", SIX, PETS)
    write(tmp_path / "test" / "set" / "two.parquet", TWO, PETS)
    assert by_split(read(tmp_path / "test" / "set")) == {None: 8}
    write(tmp_path / "test" / "set" / "test.parquet", TWO, PETS)
    with pytest.raises(UserError, match="splits test and one.parquet, two.parquet; .*name each"):
        read(tmp_path / "test" / "set")


def test_a_pattern_may_have_stars_in_its_folders(tmp_path):
    for split, labels in (("train", SIX), ("test", TWO)):
        write(tmp_path / "default" / split / "0000.parquet", labels, PETS)
    assert by_split(read(tmp_path / "default" / "*" / "0000.parquet")) == {None: 6, "test": 2}


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["train-00000-of-00003-3cb1f9a1b2c3d4e5"], "got no train-00001-of-00003.parquet;"),
        (["data/train-00001-of-00002"], "data: got no train-00000-of-00002.parquet;"),
        (["train_00000_of_00002"], "got no train_00001_of_00002.parquet;"),
        (["a-train-0-of-3", "a-train-2-of-3"], "got no a-train-1-of-3.parquet;"),
        (["train/0000", "train/0002"], "train: got no 0001.parquet;"),
        (
            ["train-00000-of-00001-aaaaaaaa", "train-00000-of-00001-bbbbbbbb"],
            "the same shard twice",
        ),
        (["train-00000-of-00001", "train-00000-of-00001-bbbbbbbb"], "the same shard twice"),
    ],
)
def test_a_missing_shard_and_one_of_two_versions_are_named(names, missing, tmp_path):
    for name in names:
        write(tmp_path / f"{name}.parquet", TWO, PETS)
    with pytest.raises(UserError, match=missing):
        read(tmp_path)


def test_a_part_may_be_named(tmp_path):
    write(tmp_path / "train-00000-of-00003-3cb1f9a1b2c3d4e5.parquet", SIX, PETS)
    assert len(read(tmp_path / "train-00000-of-00003-3cb1f9a1b2c3d4e5.parquet").samples) == 6


def spoiled(path, how):
    if how == "a pointer":
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "a page":
        path.write_bytes(b"<!DOCTYPE html>")
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif how == "metadata":
        write(path, TWO, metadata="{")
    elif how == "class above":
        write(path, [0, 7], PETS)
    elif how == "fraction":
        write(path, [0.5, 1.0])
    elif how == "other names":
        write(path, TWO, ["cat", "dgo"])
    elif how == "no names":
        write(path, TWO)
    elif how == "lists":
        write(path, [[0], [1]])
    elif how == "two images":
        write(path, TWO, PETS, mask=[b"x", b"y"])
    else:
        write(path, TWO, PETS)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("a pointer", "not a readable parquet file .a Git LFS pointer"),
        ("empty", "not a readable parquet file .empty, 0 bytes"),
        ("a page", "not a readable parquet file .an HTML page"),
        ("cut", "not a readable parquet file"),
        ("metadata", "the huggingface metadata is damaged"),
        ("class above", "got class 7; expected 0 to 1, as in its metadata"),
        ("fraction", "column 'label': got 0.5; expected class numbers"),
        (
            "other names",
            r"got the class 'dgo', which .*train.parquet does not have; did you mean 'dog'",
        ),
        ("no names", "got class numbers and no names, where .*train.parquet has names"),
        ("lists", r"column 'label': got \[0\]; expected"),
        ("two images", "image columns: got image, mask of image, label, mask; expected one"),
    ],
)
def test_a_fault_is_told_with_the_file_it_is_in(how, message, tmp_path):
    write(tmp_path / "train.parquet", SIX, PETS)
    write(tmp_path / "test.parquet", TWO, PETS)
    spoiled(tmp_path / "test.parquet", how)
    with pytest.raises(UserError, match=f"test.parquet: .*{message}|{message}") as fault:
        read(tmp_path)
    assert "test.parquet" in str(fault.value).split(";")[0] and "\n" not in str(fault.value)


def test_a_broken_image_is_told_with_its_file_and_row(tmp_path):
    write(tmp_path / "train" / "0000.parquet", SIX, PETS)
    source = read(tmp_path)
    assert source.samples[4].origin == "train/0000.parquet:4"
    write(tmp_path / "train" / "0000.parquet", TWO, PETS, mask=[b"no", b"no"])
    config = Prepare("parquet", str(tmp_path), image_column="mask", image_size=8, val=1, test=1)
    with pytest.raises(UserError, match="train/0000.parquet:0: not a readable image"):
        prepare(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_of_several_columns_of_images_is_taken_by_name(tmp_path):
    other = containers.pictures(2, 9)[0]
    write(tmp_path / "a.parquet", TWO, PETS, thumb=[containers.png(p) for p in other])
    found = read(tmp_path, image="thumb")
    assert np.array_equal(np.asarray(found.samples[1].read()), other[1])
    with pytest.raises(
        UserError,
        match="image_column: got 'thum', which is no column of images in .*; did you mean 'thumb'",
    ):
        read(tmp_path, image="thum")


def test_other_files_of_a_download_are_counted(tmp_path):
    write(tmp_path / "data" / "train-00000-of-00001.parquet", SIX, PETS)
    for name in ("README.md", ".gitattributes", ".cache/huggingface/download/x.metadata"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert read(tmp_path).left_out == {
        "hidden": [".cache/huggingface/download/x.metadata", ".gitattributes"],
        ".md, not a parquet file": ["README.md"],
    }
