"""Tables of labels beside the images: what people export is read rightly, or refused with its line and header."""

from __future__ import annotations

import unicodedata

import pytest

from pipeline.core.errors import UserError
from pipeline.prepare.prepare import prepare, remarks
from pipeline.prepare.settings import Prepare
from pipeline.prepare.sources import imagefolder
from pipeline.prepare.sources.sample import Columns
from tests import layouts

NFD = unicodedata.normalize("NFD", "é")
NFC = unicodedata.normalize("NFC", "é")
BEYOND = ["9007199254740992", "9007199254740993"]  # one 64-bit float


def read(root, tree, **columns):
    layouts.build(root, tree)
    return imagefolder.read(str(root), Columns(**columns))


def labels(source):
    """Image -> class name, None unlabelled."""
    names = [*source.classes, None]
    return {s.origin: names[-1 if s.label is None else s.label] for s in source.samples}


@pytest.mark.parametrize(
    "text",
    [
        "file,label\n0.png,a\n1.png,b\n",
        "\ufefffile,label\r\n0.png,a\r\n1.png,b\r\n",
        "label;image\na;0\nb;1\n",
        "id|target\n0|a\n1|b\n\n\n",
        '"id","class"\n"0.PNG"," a "\n"1.PNG","b"\n',
        "path,label\n.\\images\\0.png,a\nimages\\1.png,b\n",
        "path,label\n/kaggle/input/x/images/0.png,a\n/kaggle/input/x/images/1.png,b\n",
        "path,category\n./images/0.png,a\nimages/1.png,b\n",
        "width,file,label\n9,0.png,a\n9,1.png,b\n",
        "file,anything\n0.png,a\n1.png,b\n",
        "0.png,a\n1.png,b\n",
        "image,a,b\n0,1,0\n1,0,1\n",
        "image,a,b,width\n0,1.0,0.0,30\n1,0.0,1.0,40\n",
    ],
)
def test_tables_of_every_dialect_give_the_same_labels(text, tmp_path):
    source = read(tmp_path, {"images": 2, "labels.csv": text})
    assert labels(source) == {"images/0.png": "a", "images/1.png": "b"} and not source.left_out


@pytest.mark.parametrize(
    ("cells", "classes", "numbers"),
    [
        (("1", "2", "10"), ["1", "2", "10"], [0, 1, 2]),
        (("1.0", "2.0", ""), ["1", "2"], [0, 1, None]),
        (("0", "1", "-1"), ["0", "1"], [0, 1, None]),
        (("100", "205", "100"), ["100", "205"], [0, 1, 0]),
        (("b", "nan", "a"), ["a", "b"], [1, None, 0]),
        (("none", "a", "none"), ["a", "none"], [1, 0, 1]),
        (("1a", "0.5", "x"), ["0.5", "1a", "x"], [1, 0, 2]),
        ((NFC, NFD, "z"), ["z", NFC], [1, 1, 0]),
        (("1_10", "11_0", "110"), ["110", "11_0", "1_10"], [2, 1, 0]),
        (("1e3", "10e2", "1000"), ["1000", "10e2", "1e3"], [2, 1, 0]),
        (("9007199254740992", "9007199254740993.0", "+7"), ["7", *BEYOND], [1, 2, 0]),
    ],
)
def test_labels_of_every_kind_are_classes(cells, classes, numbers, tmp_path):
    rows = "".join(f"{i}.png,{cell}\n" for i, cell in enumerate(cells))
    source = read(tmp_path, {"": 3, "labels.csv": f"file,label\n{rows}"})
    assert source.classes == classes
    assert [source.samples[i].label for i in range(3)] == numbers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got 0 lines; expected a header and a row an image"),
        ("file,label\n", "got 1 lines"),
        ("file,label\n0.png\n", "got 1 columns in line 2; expected 2, as in the header"),
        (
            "file,label\nx.png,a\ny.png,b\n",
            "got the header file, label; expected a column of image names",
        ),
        (
            "file,label\n0.png,0.5\n1.png,0.25\n",
            "got '0.(5|25)'; expected class names or whole numbers",
        ),
        (
            "file,label\n0.png,a\n0.png,b\n",
            "line 3 of labels.csv: got 'b' for 0.png, which is 'a' in line 2",
        ),
        (
            "file,a,b\n0.png,1,1\n1.png,0,1\n",
            "got 2 ones in line 2 .a, b.; expected one class an image",
        ),
        ("file,a,b\n0.png,0,0\n1.png,0,1\n", "got 0 ones in line 2 .all 0.; expected one class"),
        (
            "file,label,split\n0.png,a,train\n1.png,b,\n2.png,a,tset\n",
            "line 4 of labels.csv: column 'split': got 'tset'; expected train, val, test, unlabelled",
        ),
        (
            "file,a,b,Set\n0.png,1,0,unused\n1.png,0,1,train\n",
            "line 2 of labels.csv: column 'Set': got 'unused'; expected train",
        ),
        (
            "file,width,height\n0.png,4,5\n1.png,6,7\n",
            "got the header file, width, height; expected a column of labels",
        ),
        (
            "left,right,label\n0,1,a\n1,0,b\n2,2,a\n1,1,a\n",
            "which is 'b'|one column of image names",
        ),
        (
            "left,right,label\n0,1,a\n1,2,b\n",
            "image names in left, right; expected one column of image names; name it in prepare.image",
        ),
    ],
)
def test_a_table_that_is_not_understood_is_told_with_its_header_or_line(text, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path, {"": 3, "labels.csv": text})
    assert "labels.csv" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["image", "file", "label", "id"])
def test_an_image_that_is_called_like_a_column_makes_the_header_no_row(name, tmp_path):
    header = "file,label" if name in ("file", "label") else f"{name},label"
    tree = {f"{name}.jpg": "image", "": 2, "labels.csv": f"{header}\n{name}.jpg,a\n0.png,b\n1,a\n"}
    assert labels(read(tmp_path, tree)) == {f"{name}.jpg": "a", "0.png": "b", "1.png": "a"}


@pytest.mark.parametrize("text", ["0,y\n1,x\n2,y\n", "0.png,target\n1.png,x\n2.png,x\n"])
def test_a_first_row_whose_label_is_called_like_a_column_is_a_row(text, tmp_path):
    found = labels(read(tmp_path, {"": 3, "labels.csv": text}))
    assert found["0.png"] in ("y", "target") and found["1.png"] == "x" and len(found) == 3


@pytest.mark.parametrize(
    "raw", ["file,label\n0.png,ä\n".encode("latin-1"), "file,label".encode("utf-16"), b"a,b\n\0"]
)
def test_a_table_of_another_encoding_is_told(raw, tmp_path):
    layouts.build(tmp_path, {"": 2})
    (tmp_path / "labels.csv").write_bytes(raw)
    with pytest.raises(UserError, match="labels.csv: "):
        imagefolder.read(str(tmp_path), Columns())


def test_columns_are_chosen_by_name(tmp_path):
    text = "left,right,label,grade\n0,1,a,x\n2,3,b,y\n"
    assert labels(read(tmp_path / "a", {"": 4, "y.csv": text}, image="right", label="grade")) == {
        "1.png": "x",
        "3.png": "y",
    }
    with pytest.raises(
        UserError, match="expected prepare.label_column 'grad'; did you mean 'grade'"
    ):
        imagefolder.read(str(tmp_path / "a"), Columns("grad", "right"))
    with pytest.raises(
        UserError, match="expected prepare.image_column 'label' to name images; .*left, right"
    ):
        imagefolder.read(str(tmp_path / "a"), Columns("grade", "label"))


def test_one_of_several_columns_of_labels_is_taken_and_the_others_are_named(tmp_path):
    source = read(tmp_path, {"": 2, "y.csv": "file,class_id,class_name\n0,7,a\n1,9,b\n"})
    assert source.classes == ["a", "b"]
    assert source.notes == [
        "labels: column 'class_name' of y.csv (prepare.label_column: also class_id)"
    ]


def test_a_column_of_splits_that_holds_none_is_noted_and_one_of_labels_is_not(tmp_path):
    text = "file,label,split,phase,set\n0,a,0,train,\n1,b,1,test,\n2,b,0,,\n"
    source = read(tmp_path / "a", {"": 3, "y.csv": text})
    assert [s.split for s in source.samples] == [None, "test", None]
    assert source.notes == [
        "labels: column 'label' of y.csv",
        "column 'split' of y.csv not read: values 0, 1",
    ]
    source = read(tmp_path / "b", {"": 2, "y.csv": "file,set\n0,a\n1,b\n"})
    assert source.classes == ["a", "b"] and len(source.notes) == 1
    source = read(
        tmp_path / "c", {"": 2, "y.csv": "file,label,set\n0,a,x\n1,b,test\n"}, label="set"
    )
    assert source.classes == ["test", "x"]


def test_a_table_without_labels_may_have_any_column_of_splits(tmp_path):
    tree = {"": 2, "y.csv": "file,label\n0,a\n1,b\n", "z.csv": "file,w,split\n0,7,train\n1,8,no\n"}
    assert labels(read(tmp_path, tree)) == {"0.png": "a", "1.png": "b"}


def test_ids_that_train_and_test_share_are_those_of_the_tables_split(tmp_path):
    tree = {"train": 4, "test": 4, "labels.csv": "id,label\n0,a\n1,b\n2,a\n3,b\n"}
    source = read(tmp_path / "a", tree)
    assert set(labels(source)) == {f"train/{i}.png" for i in range(4)}
    assert source.left_out == {
        "no label in labels.csv, in test/": [f"test/{i}.png" for i in range(4)]
    }
    tree["test_labels.csv"] = "id,label\n0,b\n1,a\n2,b\n3,a\n"
    both = read(tmp_path / "b", tree)
    assert labels(both)["test/0.png"] == "b" and labels(both)["train/0.png"] == "a"
    assert {s.origin for s in both.samples if s.split == "test"} == {
        f"test/{i}.png" for i in range(4)
    }


def test_a_table_in_each_split_is_read_as_roboflow_writes_it(tmp_path):
    rows = "filename, cat, dog\n" + "".join(f"{i}.png, {i % 2}, {1 - i % 2}\n" for i in range(4))
    tree = {}
    for split in ("train", "valid", "test"):
        tree |= {split: 4, f"{split}/_classes.csv": rows}
    source = read(tmp_path, tree | {"README.roboflow.txt": "x"})
    assert source.classes == ["cat", "dog"]
    assert sorted(str(s.split) for s in source.samples) == ["None"] * 4 + ["test"] * 4 + ["val"] * 4
    assert source.left_out == {".txt, not a format that is read": ["README.roboflow.txt"]}


def test_ids_of_nested_split_folders_never_mix(tmp_path):
    rows = "".join(
        f"{folder}/{i}.png,{'ab'[i % 2]}\n"
        for folder in ("train_images", "test_images")
        for i in range(4)
    )
    source = read(
        tmp_path,
        {
            "archive/train_images": 4,
            "archive/test_images": 4,
            "archive/labels.csv": f"file,label\n{rows}",
        },
    )
    assert {s.origin.split("/")[1] for s in source.samples if s.split == "test"} == {"test_images"}


def test_a_path_into_another_folder_is_not_the_image_of_that_name(tmp_path):
    """cat/1.png is gone; dog/1.png is another image."""
    source = read(
        tmp_path,
        {"cat": 1, "dog": 2, "y.csv": "file,label\ncat/0.png,a\ncat/1.png,a\ndog/0.png,b\n"},
        label="label",
    )
    assert {s.origin for s in source.samples} == {"cat/0.png", "cat/1.png", "dog/0.png"}
    assert source.left_out == {"no label in y.csv, in dog/": ["dog/1.png"]}


def test_a_name_that_fits_two_images_is_refused(tmp_path):
    with pytest.raises(UserError, match="got '0', which matches a/0.png, b/0.png; expected one"):
        read(tmp_path, {"a": 1, "b": 1, "labels.csv": "id,label\n0,x\n"}, label="label")


def test_folders_that_are_no_classes_are_not_taken_for_classes(tmp_path):
    """HAM10000: two folders of images in no order, and a table."""
    tree = {
        "part_1": 2,
        "part_2": 2,
        "meta.csv": "image_id,dx\npart_1/0,mel\npart_1/1,nv\npart_2/0,mel\npart_2/1,nv\n",
    }
    with pytest.raises(
        UserError, match="meta.csv: got other labels .column 'dx'. than the class folders"
    ):
        read(tmp_path, tree)
    assert imagefolder.read(str(tmp_path), Columns("dx")).classes == ["mel", "nv"]


def test_a_table_that_says_the_same_as_the_class_folders_is_no_contradiction(tmp_path):
    rows = "".join(
        f"{name}/{i}.png,{number}\n" for number, name in enumerate(("cat", "dog")) for i in range(3)
    )
    source = read(
        tmp_path,
        {
            "cat": 3,
            "dog": 3,
            "all.csv": f"path,label\n{rows}",
            "sizes.csv": "path,width\ncat/0.png,3\n",
        },
    )
    assert source.classes == ["cat", "dog"]
    assert source.left_out == {".csv, not a format that is read": ["all.csv", "sizes.csv"]}


def test_a_row_whose_image_is_not_there_is_a_broken_image(tmp_path):
    rows = "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(10))
    layouts.build(tmp_path / "d", {"": 8, "labels.csv": f"file,label\n{rows}", "notes.txt": "x"})
    config = Prepare("imagefolder", str(tmp_path / "d"), image_size=8, val=2, test=2)
    with pytest.raises(
        UserError,
        match=r"8.png: not a readable image .named in line 10 of labels.csv, but not there",
    ):
        prepare(config, tmp_path / "p")
    assert not (tmp_path / "p").exists()
    index = prepare(
        Prepare("imagefolder", str(tmp_path / "d"), image_size=8, val=2, test=2, on_error="skip"),
        tmp_path / "p",
    )
    assert [s["origin"] for s in index["skipped"]] == ["8.png", "9.png"]
    assert remarks(index)[-1] == (
        "read 8 images; not read: 3 files: 2 broken, 1 .txt, not a format that is read (notes.txt)"
    )


def test_without_a_table_a_column_is_refused(tmp_path):
    with pytest.raises(
        UserError, match="prepare.image_column: got 'file'; expected null for source 'imagefolder'"
    ):
        read(tmp_path, {"cat": 2, "dog": 2}, image="file")


@pytest.mark.parametrize("pattern", ["cat", "(", "[", ""])
def test_a_pattern_without_a_group_is_refused(pattern):
    with pytest.raises(ValueError, match="got .*; expected a regular expression with a group"):
        Prepare("imagefolder", label_pattern=pattern)


def test_a_pattern_labels_every_split(tmp_path):
    tree = {
        f"{split}/{name}_{i}.png": "image"
        for split in ("train", "valid", "test")
        for name in ("cat", "dog")
        for i in range(2)
    }
    source = read(tmp_path, tree, pattern=r"(\w+)_\d")
    assert source.classes == ["cat", "dog"]
    assert sorted(str(s.split) for s in source.samples) == ["None"] * 4 + ["test"] * 4 + ["val"] * 4
    with pytest.raises(
        UserError, match=r"label_pattern: got '\^\(x\)', which matches none of 12 image names"
    ):
        imagefolder.read(str(tmp_path), Columns(pattern="^(x)"))
