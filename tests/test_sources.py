"""The same pictures from folder, parquet and archive are the same data set; what is wrong is named."""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.core.errors import UserError
from pipeline.data import views
from pipeline.data.prepared import Prepared
from pipeline.distill import batches, settings
from pipeline.prepare import prepare as prepare_prepare
from pipeline.prepare.prepare import prepare
from pipeline.prepare.settings import Prepare
from pipeline.prepare.sources import cifar, parquet, unpickle, zoo
from pipeline.prepare.sources.sample import Columns
from pipeline.prepare.survey import survey
from tests import containers

SHARED = Path(__file__).parents[2] / "shared" / "data" / "cifar100"


@pytest.fixture
def splits():
    return {"train": containers.pictures(40, 0), "test": containers.pictures(16, 1)}


def prepared(out, **kwargs) -> Prepared:
    prepare(Prepare(image_size=32, val=8, student_labels=2, **kwargs), out)
    return Prepared.open(out)


def first_batch(found: Prepared):
    config = settings.Distill(methods=("plain",), student="test_resnet", steps=4, batch=16)
    chosen = batches.Batches(config, found, False, 1, views.Geometry(), 0)(0)
    rows, ks, labels = chosen.rows, chosen.view_numbers, chosen.labels
    return views.view_batch(found.images, views.Geometry(), 0, rows, ks, rows).numpy(), labels


def test_folder_parquet_and_archives_give_the_same_index_and_the_same_first_batch(splits, tmp_path):
    containers.as_folder(tmp_path / "folder", splits)
    containers.as_parquet(tmp_path / "parquet", splits)
    hundred = containers.as_cifar100(tmp_path / "hundred", splits)
    ten = containers.as_cifar10(tmp_path / "ten", splits)
    places = {
        "folder": ("imagefolder", tmp_path / "folder"),
        "parquet": ("parquet", tmp_path / "parquet"),
        "cifar-100": ("cifar", hundred),
        "cifar-100, the folder around it": ("cifar", hundred.parent),
        "cifar-100, packed": ("cifar", containers.packed(hundred)),
        "cifar-10": ("cifar", ten),
        "cifar-10, packed": ("cifar", containers.packed(ten)),
    }
    found = {
        name: prepared(tmp_path / "out" / name, source=source, path=str(path))
        for name, (source, path) in places.items()
    }
    pixels, labels = first_batch(found["folder"])
    assert found["folder"].classes == tuple(containers.FINE) and len(set(labels)) == 4
    for name, other in found.items():
        for file in ("index.json", "images.npy"):
            same = (found["folder"].folder / file).read_bytes()
            assert (other.folder / file).read_bytes() == same, name
        again = first_batch(other)
        assert np.array_equal(again[0], pixels) and np.array_equal(again[1], labels)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no CIFAR-100 parquet files beside the repository")
def test_cifar_100_itself_is_the_same_from_parquet_folder_and_archive(tmp_path, monkeypatch):
    """1,000 real pictures of the first shard and 500 of the test file, written anew in both other layouts."""
    found = parquet.read(str(SHARED / "train-00000-of-00005.parquet"), Columns())
    held_out = parquet.read(str(SHARED / "test-00000-of-00001.parquet"), Columns())
    monkeypatch.setattr(containers, "FINE", found.classes)
    monkeypatch.setattr(containers, "COARSE_OF", [0] * 100)
    splits = {}
    for split, samples in (("train", found.samples[:1000]), ("test", held_out.samples[:500])):
        pixels = np.stack([np.asarray(s.read().convert("RGB")) for s in samples])
        splits[split] = (pixels, [s.label for s in samples])
    containers.as_folder(tmp_path / "folder", splits)
    containers.as_parquet(tmp_path / "parquet", splits)
    archive = containers.packed(containers.as_cifar100(tmp_path, splits))
    config = Prepare("imagefolder", str(tmp_path / "folder"), image_size=32, val=100)
    prepare(config, tmp_path / "a")
    prepare(replace(config, source="parquet", path=str(tmp_path / "parquet")), tmp_path / "b")
    prepare(replace(config, source="cifar", path=str(archive)), tmp_path / "c")
    assert Prepared.open(tmp_path / "a").classes[0] == "apple"
    for file in ("index.json", "images.npy"):
        a, b, c = ((tmp_path / k / file).read_bytes() for k in "abc")
        assert a == b == c


def test_coarse_labels_are_used_where_they_are_named(splits, tmp_path):
    containers.as_parquet(tmp_path / "parquet", splits)
    folder = containers.as_cifar100(tmp_path, splits)
    ours = prepared(
        tmp_path / "a",
        source="parquet",
        path=str(tmp_path / "parquet"),
        label_column="coarse_label",
    )
    theirs = prepared(
        tmp_path / "b", source="cifar", path=str(folder), label_column="coarse_labels"
    )
    assert ours.classes == theirs.classes == tuple(containers.COARSE)
    assert np.array_equal(ours.labels, theirs.labels)


def test_one_shard_by_name_or_by_pattern_is_cut_into_splits(splits, tmp_path):
    containers.as_parquet(tmp_path, splits)
    one = tmp_path / "train-00000-of-00002.parquet"
    config = Prepare("parquet", str(one), image_size=32, val=4, test=4)
    assert prepare(config, tmp_path / "a")["counts"] == {"train": 12, "val": 4, "test": 4}
    config = replace(config, path=str(tmp_path / "*-00000-of-*.parquet"))
    assert prepare(config, tmp_path / "b")["counts"] == {"train": 16, "val": 4, "test": 8}


def table(path, **columns):
    import pyarrow as pa
    from pyarrow import parquet as pq

    pictures = containers.pictures(len(next(iter(columns.values()))), 5)[0]
    cells = [containers.png(p) for p in pictures]
    pq.write_table(pa.table({"image": cells, **columns}), path)
    return str(path)


def test_text_labels_and_bare_numbers_are_classes_and_null_or_minus_one_is_no_label(tmp_path):
    names = table(tmp_path / "names.parquet", label=["dog", "cat", None, "dog"])
    found = parquet.read(names, Columns())
    assert found.classes == ["cat", "dog"]
    assert [(s.label, s.split) for s in found.samples] == [
        *((1, None), (0, None), (None, "train"), (1, None))
    ]
    numbers = table(tmp_path / "numbers.parquet", target=[0, 2, -1])
    found = parquet.read(numbers, Columns("target"))
    assert found.classes == ["0", "2"] and [s.label for s in found.samples] == [0, 1, None]
    assert np.array_equal(np.asarray(found.samples[1].read()), containers.pictures(3, 5)[0][1])


def named(path, names, **columns):
    """A table whose column `label` is a ClassLabel of these names."""
    import pyarrow.parquet as pq

    feature = {"label": {"names": names, "_type": "ClassLabel"}}
    note = json.dumps({"info": {"features": feature}})
    read = pq.read_table(table(path, **columns))
    pq.write_table(read.replace_schema_metadata({"huggingface": note}), path)
    return str(path)


def test_numbers_with_gaps_and_blank_texts_are_what_they_are_in_a_table(tmp_path):
    found = parquet.read(table(tmp_path / "a.parquet", label=[20, 10, 110]), Columns())
    assert found.classes == ["10", "20", "110"] and [s.label for s in found.samples] == [1, 0, 2]
    found = parquet.read(table(tmp_path / "b.parquet", label=["b", "", " ", "a"]), Columns())
    assert found.classes == ["a", "b"]
    assert [(s.label, s.split) for s in found.samples][:3] == [(1, None), *[(None, "train")] * 2]


def test_class_names_by_number_are_in_the_order_of_the_numbers(tmp_path):
    names = {str(i): f"class {i}" for i in range(12)}
    in_order_of_text = dict(sorted(names.items()))
    assert list(in_order_of_text)[:3] == ["0", "1", "10"]
    path = named(tmp_path / "a.parquet", in_order_of_text, label=[2, 11])
    assert parquet.read(path, Columns()).classes == list(names.values())
    for keys in ({"0": "a", "2": "b"}, {"a": 0, "b": 1}):
        path = named(tmp_path / "b.parquet", keys, label=[0, 0])
        with pytest.raises(
            UserError, match="class names: got the keys (0, 2|a, b); expected 0 to 1"
        ):
            parquet.read(path, Columns())


def test_a_file_without_rows_is_told(tmp_path):
    path = named(tmp_path / "a.parquet", ["a", "b"], label=[0])
    import pyarrow.parquet as pq

    pq.write_table(pq.read_table(path).slice(0, 0), path)
    with pytest.raises(UserError, match="got 0 images; expected 1 or more; correct the path"):
        survey(tmp_path)
    with pytest.raises(UserError):
        prepare(Prepare("parquet", path, image_size=32, val=1, test=1), tmp_path / "out")


def without_pyarrow(tmp_path, splits, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)


def without_a_shard(tmp_path, *_):
    (tmp_path / "train-00001-of-00002.parquet").unlink()


def with_a_broken_file(tmp_path, *_):
    (tmp_path / "test-00000-of-00002.parquet").write_bytes(b"PAR1 no")


def with_a_bare_file(tmp_path, *_):
    (tmp_path / "more.parquet").write_bytes(b"")


def with_unlabelled_tests(tmp_path, splits, _):
    pixels, labels = splits["test"]
    containers.as_parquet(tmp_path, {"test": (pixels, [-1] * len(labels))})


@pytest.mark.parametrize(
    ("spoil", "column", "message"),
    [
        (without_pyarrow, None, r"source 'parquet' needs pyarrow .*pip install '\.\[parquet\]'"),
        (
            without_a_shard,
            None,
            "got no train-00001-of-00002.parquet; expected all shards; add it, or give the part",
        ),
        (with_a_broken_file, None, "test-00000-of-00002.parquet: not a readable parquet file"),
        (
            with_a_bare_file,
            None,
            "splits test, train and more.parquet; .* name each file after its",
        ),
        (
            with_unlabelled_tests,
            None,
            r"test-00000-of-00002.parquet:0: got no label in test; .*leave",
        ),
        (None, "fine", "got 'fine', which is no column of .*; did you mean 'fine_label'"),
        (None, "img", "got 'img', which is no column of .*; .*allowed: fine_label, coarse_label"),
    ],
)
def test_mistakes_in_parquet_are_named(spoil, column, message, splits, tmp_path, monkeypatch):
    containers.as_parquet(tmp_path, splits)
    if spoil:
        spoil(tmp_path, splits, monkeypatch)
    with pytest.raises(UserError, match=message):
        config = Prepare("parquet", str(tmp_path), column, image_size=32, val=8)
        prepare(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"other": [0, 1]},
            "label column: got other; expected a ClassLabel or .*; name the column",
        ),
        ({"label": [0.5, 1.0]}, "column 'label': got 0.5; expected class numbers from 0"),
        (
            {"label": [0, 1], "thumb": [b"", b""]},
            "image columns: got image, thumb of image, label, thumb",
        ),
    ],
)
def test_columns_that_are_no_labels_or_no_pictures_are_named(columns, message, tmp_path):
    with pytest.raises(UserError, match=message):
        parquet.read(table(tmp_path / "a.parquet", **columns), Columns())


def test_a_label_above_the_named_classes_is_named(tmp_path):
    pixels, labels = containers.pictures(8, 0)
    containers.as_parquet(tmp_path, {"train": (pixels, labels)}, shards=1)
    import pyarrow.parquet as pq

    path = tmp_path / "train-00000-of-00001.parquet"
    read = pq.read_table(path)
    column = read.schema.get_field_index("fine_label")
    pq.write_table(read.set_column(column, "fine_label", [[9] * 8]), path)
    with pytest.raises(UserError, match="got class 9; expected 0 to 3, as in its metadata"):
        parquet.read(str(path), Columns())


class Evil:
    """A pickle of this calls os.system."""

    def __reduce__(self):
        return os.system, ("touch evil",)


OBJECTS = np.array([{"a": 1}], dtype=object)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Evil(), "batch: got a pickle that names posix.system; expected dict, list, str, bytes"),
        ({b"data": np.zeros(3, np.float64)}, "batch: got an array of dtype 'f8'"),
        ({b"data": OBJECTS}, "batch: got an array of dtype 'O8'"),
        ({b"data": np.dtype}, "names numpy.dtype|batch: got a MakeDtype"),
        ({b"data": {1, 2}}, "batch: got a set|names .*set"),
        (Path("a"), "batch: got a pickle that names pathlib"),
        (print, "batch: got a pickle that names .*print"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_can_build_nothing_but_plain_values_and_bytes(
    value, message, protocol, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        unpickle.loads(pickle.dumps(value, protocol=protocol), "batch")
    assert not Path("evil").exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_what_the_archives_hold_is_read_as_it_was_written(protocol):
    value = {"labels": [0, 1], "names": ["ä", b"b\xff"], "data": np.arange(6, dtype=np.uint8)}
    value["turned"] = np.asfortranarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    found = unpickle.loads(pickle.dumps(value, protocol=protocol), "batch")
    assert found["labels"] == [0, 1] and found["names"] == ["ä", b"b\xff"]
    assert np.array_equal(found["data"], value["data"]) and found["data"].dtype == np.uint8
    assert np.array_equal(found["turned"], value["turned"])


@pytest.mark.parametrize("raw", [b"", b"garbage", b"\x80\x02}q\x00", b"cos\nsystem\n(S'x'\ntR."])
def test_damaged_pickles_are_named(raw):
    with pytest.raises(UserError, match="batch: not a CIFAR batch|names os.system"):
        unpickle.loads(raw, "batch")


def rewrite(folder, name, **change):
    batch = pickle.loads((folder / name).read_bytes(), encoding="bytes")  # made by this very test
    containers.dump(folder / name, {**batch, **{k.encode(): v for k, v in change.items()}})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "test").unlink(), "/test: cannot be read .No such file.*unpack the whole"),
        (lambda f: (f / "meta").unlink(), "got no batches.meta .CIFAR-10. or meta"),
        (lambda f: (f / "train").write_bytes(b"x"), "train: not a CIFAR batch"),
        (lambda f: rewrite(f, "train", fine_labels=[0]), r"data: got \(40, 3072\) for 1 labels"),
        (
            lambda f: rewrite(f, "train", fine_labels=[9] * 40),
            "label of .*: got 9; expected 0 to 3",
        ),
        (lambda f: rewrite(f, "train", data=[1] * 40), "data: got list for 40 labels"),
        (
            lambda f: containers.dump(f / "meta", {"a": 1}),
            "got a; expected the key 'fine_label_names'",
        ),
    ],
)
def test_mistakes_in_a_cifar_folder_are_named(spoil, message, splits, tmp_path):
    folder = containers.as_cifar100(tmp_path, splits)
    spoil(folder)
    with pytest.raises(UserError, match=message):
        cifar.read(str(folder), Columns())


def test_mistakes_in_a_cifar_archive_are_named(splits, tmp_path):
    folder = containers.as_cifar100(tmp_path, splits)
    with pytest.raises(UserError, match="label_column: got 'fine'; did you mean 'fine_labels'"):
        cifar.read(str(folder), Columns("fine"))
    (folder / "test").unlink()
    archive = containers.packed(folder)
    with pytest.raises(
        UserError, match="got no cifar-100-python/test; expected the whole archive; fetch it again"
    ):
        cifar.read(str(archive), Columns())
    archive.write_bytes(archive.read_bytes()[:200])
    with pytest.raises(UserError, match="not a readable archive"):
        cifar.read(str(archive), Columns())
    with pytest.raises(
        UserError, match="prepare.path: got None for source 'cifar'; expected cifar-10"
    ):
        cifar.read(None, Columns())
    other = containers.packed(containers.as_cifar100(tmp_path / "b", splits).rename(tmp_path / "x"))
    with pytest.raises(UserError, match="x.tar.gz: got x/.*; expected cifar-10-python.tar.gz"):
        cifar.read(str(other), Columns())


def as_mnist(root, pixels, labels, split):
    """The IDX files that torchvision looks for under MNIST/raw."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    name = {"train": "train", "test": "t10k"}[split]
    head = struct.pack(">iiii", 2051, len(pixels), *pixels.shape[1:])
    (folder / f"{name}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
    (folder / f"{name}-labels-idx1-ubyte").write_bytes(
        struct.pack(">ii", 2049, len(labels)) + bytes(labels)
    )


def test_a_torchvision_set_is_read_as_torchvision_lays_it_out(tmp_path):
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (60, 28, 28), dtype=np.uint8)
    labels = (np.arange(60) % 10).tolist()
    as_mnist(tmp_path, pixels[:40], labels[:40], "train")
    as_mnist(tmp_path, pixels[40:], labels[40:], "test")
    config = Prepare("torchvision:MNIST", str(tmp_path), image_size=28, val=10)
    assert prepare(config, tmp_path / "p")["counts"] == {"train": 30, "val": 10, "test": 20}
    found = Prepared.open(tmp_path / "p")
    assert found.classes[7] == "7 - seven"
    row = found.origins().index("test/000003")
    assert np.array_equal(
        found.images.squares([row])[0], np.repeat(pixels[43][..., None], 3, axis=2)
    )
    assert found.labels[row] == labels[43] and found.splits[row] == "test"


def test_a_torchvision_set_without_a_split_is_cut(tmp_path):
    config = Prepare("torchvision:FakeData", str(tmp_path), image_size=8, val=20, test=20)
    found = zoo.read("FakeData", str(tmp_path), Columns())
    assert len(found.classes) == 10 and len(found.samples) == 1000
    assert config.source == "torchvision:FakeData" and found.samples[0].split is None


def test_torchvisions_cifar_goes_through_the_reader_that_executes_nothing(
    splits, tmp_path, monkeypatch
):
    containers.as_cifar10(tmp_path, splits)
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("unpickled"))
    found = zoo.read("CIFAR10", str(tmp_path), Columns())
    assert found.classes == containers.FINE and len(found.samples) == 56


def offline(*_, **__):
    raise OSError("Name or service not known")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CIFAR11", "source: got 'torchvision:CIFAR11'; did you mean 'CIFAR1"),
        ("MNIST", r"torchvision:MNIST: no files in .* the download failed .*check the network"),
        (
            "CIFAR100",
            r"torchvision:CIFAR100: no files in .* the download failed .*service not known",
        ),
        (
            "CocoDetection",
            "torchvision:CocoDetection: got .*annFile.*; expected a data set that needs a",
        ),
    ],
)
def test_mistakes_in_a_torchvision_source_are_named(name, message, tmp_path, monkeypatch):
    import torchvision.datasets.mnist
    import torchvision.datasets.utils

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", offline)
    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", offline)
    with pytest.raises(UserError, match=message):
        prepare_prepare.prepare(Prepare(f"torchvision:{name}", str(tmp_path)), tmp_path / "out")


def test_a_torchvision_source_without_a_path_says_what_the_path_is_for(tmp_path):
    with pytest.raises(UserError, match="prepare.path: got None .*the folder to download to"):
        prepare(Prepare("torchvision:MNIST"), tmp_path / "out")
