"""Images of their own shape: how they are stored, what views and evaluation see of them, what they are worth."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from exporters.artifact import inputs
from pipeline.core.config import parse
from pipeline.core.errors import UserError
from pipeline.data import decoding, pixels, views
from pipeline.data.mixing import Mix
from pipeline.data.pixels import Packed, Squares
from pipeline.data.prepared import Prepared
from pipeline.data.views import Geometry
from pipeline.prepare.prepare import prepare, remarks
from pipeline.prepare.settings import Prepare
from pipeline.store.policy import Cache
from tests.conftest import ROOT, VIT

NONE = np.array([], dtype=np.int64)
SIZE = 32


def photograph(width: int, height: int, seed: int) -> Image.Image:
    """Smooth colours, none like another."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def coordinates(width: int, height: int) -> Image.Image:
    """Red tells x, green y, from 0 at the first edge to 255 at the last."""
    x = (np.arange(width) + 0.5) / width * 255
    y = (np.arange(height) + 0.5) / height * 255
    red, green = np.meshgrid(x, y)
    return Image.fromarray(np.stack([red, green, 0 * red], -1).round().astype(np.uint8))


@pytest.fixture
def folder(tmp_path):
    root, shapes = tmp_path / "photos", [(90, 60), (60, 90), (64, 64), (33, 150)]
    for split, count in (("train", 8), ("test", 4)):
        for label in ("left", "right"):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                seed = hash((split, label)) % 97 + i
                photograph(*shapes[i % 4], seed).save(root / split / label / f"{i}.png")
    return root


def prepared(path, out, **settings) -> Prepared:
    settings = {"image_size": SIZE, "val": 4} | settings
    prepare(Prepare("imagefolder", str(path), **settings), out)
    return Prepared.open(out)


def packed(images, crop_mode="center", size=SIZE) -> Packed:
    encoded = [pixels.encode(image, "png") for image in images]
    data = np.frombuffer(b"".join(encoded), np.uint8)
    return Packed("images.bin", data, [len(e) for e in encoded], size, crop_mode)


def test_auto_stores_squares_raw_and_packs_what_would_lose_pixels(folder, tmp_path):
    squares = tmp_path / "squares"
    for path in folder.rglob("*.png"):
        target = squares / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).resize((28, 28)).save(target)
    raw = prepared(squares, tmp_path / "raw")
    assert isinstance(raw.images, Squares) and raw.images.array.shape[1:] == (SIZE, SIZE, 3)
    # One larger image, read last: the squares made so far are given up.
    photograph(90, 60, 1).save(squares / "train" / "right" / "z.png")
    mixed = prepared(squares, tmp_path / "mixed")
    assert isinstance(mixed.images, Packed)
    sizes = {mixed.images.image(row).size for row in range(len(mixed.images))}
    assert sizes == {(28, 28), (60, 40)}  # never enlarged; the shorter side at most 1.25 x 32
    assert not (mixed.folder / "images.npy").exists()
    assert sorted(p.name for p in mixed.folder.iterdir()) == [
        "images.bin",
        "index.json",
        "source.json",
    ]


def test_what_is_stored_is_the_image_with_its_shorter_side_reduced(folder, tmp_path):
    result = prepared(folder, tmp_path / "p", encoding="png", stored_side=48)
    origins = result.origins()
    for row, origin in enumerate(origins):
        own = Image.open(folder / origin).convert("RGB")
        scale = min(1, 48 / min(own.size))
        size = tuple(round(side * scale) for side in own.size)
        expected = own if scale == 1 else own.resize(size, Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(result.images.image(row)), np.asarray(expected))
    jpeg = prepared(folder, tmp_path / "j", stored_side=48)
    # The order is that of the pixels before encoding: the same rows, a few levels off.
    assert jpeg.origins() == origins and jpeg.sha256 == result.sha256
    off = [
        np.abs(np.asarray(a.image(row), int) - np.asarray(b.image(row), int)).mean()
        for a, b in [(result.images, jpeg.images)]
        for row in range(len(origins))
    ]
    assert 0 < max(off) < 4


def test_the_index_says_how_images_are_stored_and_the_notes_what_it_takes(folder, tmp_path):
    config = Prepare("imagefolder", str(folder), image_size=SIZE, val=4)
    header = prepare(config, tmp_path / "p")
    result = Prepared.open(tmp_path / "p")
    assert (header["stored"], header["crop_mode"], result.crop_mode) == ("jpeg", "center", "center")
    size = (tmp_path / "p" / "images.bin").stat().st_size
    note = f"images stored as jpeg, aspect kept, shorter side up to 40 px: {size / 1e6:.3g} MB"
    assert header["notes"] == [note]
    assert remarks(header)[-1].startswith("read 24 images")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stored_side": 16}, "got stored_side 16 with stored auto and image_size 32; expected 32"),
        ({"stored_side": 64, "stored": "raw"}, "got stored_side 64 with stored raw"),
        ({"stored": "zip"}, "stored: got 'zip'"),
        ({"encoding": "webp"}, "encoding: got 'webp'"),
        ({"crop_mode": "border"}, "crop_mode: got 'border'"),
    ],
)
def test_settings_of_the_pixels_that_cannot_be_are_named(values, message):
    with pytest.raises(UserError, match=message):
        parse(Prepare, {"source": "digits", "image_size": 32, **values}, "prepare")


# --- views -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(),
        Geometry(crop=(0.1, 0.3), aspect=2.0),
        Geometry(rotate=25),
        Geometry(crop=(0.9, 1.4), rotate=10, flip=False),
    ],
    ids=["crop", "small", "turned", "beyond"],
)
@pytest.mark.parametrize("size", [(96, 96), (160, 80), (60, 200)])
def test_each_pixel_of_a_view_is_where_its_map_says(size, geometry, crop_mode):
    """An image whose colour is its own coordinate: a view is then the picture of its map."""
    images = packed([coordinates(*size)], crop_mode)
    ratio = 1.0 if crop_mode == "squash" else size[0] / size[1]
    centre = (np.arange(SIZE) * 2 + 1) / SIZE - 1
    grid = np.stack([*np.meshgrid(centre, centre), np.ones((SIZE, SIZE))])
    for view in range(6):
        result = views.view_batch(images, geometry, 5, [0], [view], NONE)[0, :2].double().numpy()
        at = np.einsum("ij,jyx->iyx", views.affine(geometry, 5, 0, view, ratio), grid)
        expected = (at.clip(-1, 1) + 1) / 2 * 255
        # Half a pixel, of the image or of the view: at an edge there is nothing beyond to average with.
        tolerance = 255 * 0.75 / min(*size, 0.8 * SIZE) + 2
        assert np.abs(result - expected).max() <= tolerance
        assert np.abs(result - expected).mean() <= 1.5


def test_the_maps_of_square_images_are_those_that_were_always_drawn():
    """Frozen: the feature caches and figures of squares rest on them."""
    geometry = Geometry(crop=(0.7, 1.2), aspect=1.2, rotate=12.0, flip=False)
    maps = views.parameters(geometry, 0, [0, 7, 1000], [0, 3, 7])
    assert maps.dtype == np.float32
    digest = hashlib.sha256(np.round(maps.astype(np.float64), 5).tobytes()).hexdigest()
    assert digest[:16] == "5875d00f7ca64e69"


def test_no_crop_leaves_an_image_of_any_shape_and_none_is_distorted():
    geometry = Geometry(crop=(0.35, 1.0), aspect=1.33, flip=False)
    for ratio in (3.0, 1.5, 0.5, 0.2):
        for view in range(200):
            map_ = views.affine(geometry, 0, 1, view, ratio)
            half = np.abs(map_[:, :2]).sum(axis=1)
            assert (np.abs(map_[:, 2]) + half <= 1 + 1e-9).all()
            shape = map_[0, 0] / map_[1, 1] * ratio  # width over height, in pixels
            assert 1 / 1.34 <= shape**1 <= 1.34


def test_a_smaller_view_averages_where_a_square_once_skipped_pixels():
    """Antialiased: a checkerboard of single pixels, reduced eight times, is grey, not black and white."""
    board = np.indices((256, 256)).sum(0) % 2 * 255
    image = Image.fromarray(np.repeat(board[..., None], 3, 2).astype(np.uint8))
    for geometry in (Geometry(), Geometry(rotate=20)):
        view = views.view_batch(packed([image]), geometry, 0, [0], [1], NONE).double()
        assert view.std() < 12 and abs(view.mean() - 127.5) < 3
    skipped = views.render(
        np.asarray(image)[None], views.parameters(Geometry(rotate=20), 0, [0], [1]), SIZE
    )
    assert skipped.double().std() > 30


HASHES = """
import sys, numpy as np, torch
from pipeline.data import views
from pipeline.data.mixing import Mix
from pipeline.data.prepared import Prepared
torch.set_num_threads(2)
result = Prepared.open(sys.argv[1])
rows = result.rows("train")
geometry = views.Geometry(rotate=15, mix=Mix(mixup=1.0, cutmix=1.0))
batch = views.view_batch(result.images, geometry, 3, rows, rows * 0 + 2, rows)
print(*views.view_hashes(batch))
"""


def test_a_view_has_the_same_bits_in_any_batch_and_process(folder, tmp_path):
    result = prepared(folder, tmp_path / "p")
    rows = result.rows("train")
    for geometry in (Geometry(), Geometry(rotate=15, mix=Mix(mixup=1.0, cutmix=1.0))):
        together = views.view_batch(result.images, geometry, 3, rows, rows * 0 + 2, rows)
        alone = [views.view_batch(result.images, geometry, 3, [r], [2], rows) for r in rows[::-1]]
        assert torch.equal(together, torch.cat(alone[::-1]))
    done = subprocess.run(
        [sys.executable, "-c", HASHES, str(result.folder)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.split() == [str(h) for h in views.view_hashes(together)]


def test_squares_and_packed_images_are_never_taken_for_each_other(folder, tmp_path):
    raw, own = (
        prepared(folder, tmp_path / stored, stored=stored).images for stored in ("raw", "packed")
    )
    assert views.backend(raw) != views.backend(own)


# --- evaluation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(96, 96), (160, 80), (60, 200)])
def test_evaluation_sees_the_middle_or_the_whole_and_crop_pct_of_it(size):
    image = coordinates(*size)
    for crop_mode, crop_pct in (("center", 1.0), ("center", 0.5), ("squash", 1.0), ("squash", 0.8)):
        result = packed([image], crop_mode).squares([0], crop_pct)[0].astype(float)
        sides = np.array(size) if crop_mode == "squash" else np.array([min(size)] * 2)
        kept = sides * crop_pct / np.array(size)  # share of the width, of the height
        for axis, channel in ((1, 0), (0, 1)):
            line = result[..., channel].mean(axis=1 - axis)
            expected = 255 * (0.5 + kept[channel] * ((np.arange(SIZE) + 0.5) / SIZE - 0.5))
            assert np.abs(line - expected).max() < 3
    square = decoding.square_rgb(image, SIZE)
    assert np.array_equal(packed([image]).squares([0])[0], square)


def test_an_artefact_of_another_crop_is_named_before_an_image_is_read(folder):
    properties = {"image_size": "32", "mean": "0 0 0", "std": "1 1 1", "crop": "stretch"}
    session = SimpleNamespace(metadata=properties, input_shape=(1, 3, 32, 32))
    with pytest.raises(UserError, match="metadata crop: got 'stretch'; expected one of"):
        inputs.labelled_images(folder / "train", session, 4)


def test_squares_take_crop_pct_too():
    images = Squares(np.asarray(coordinates(SIZE, SIZE))[None])
    assert np.array_equal(images.squares([0])[0], images.array[0])
    half = images.squares([0], 0.5)[0].astype(float)
    assert half.shape == (SIZE, SIZE, 3)
    assert abs(half[..., 0].min() - 255 * 0.25) < 5 and abs(half[..., 0].max() - 255 * 0.75) < 5


# --- damage ------------------------------------------------------------------------------------------------


def test_a_damaged_or_older_folder_is_named_and_refused(folder, tmp_path):
    result = prepared(folder, tmp_path / "p")
    result.verify()
    file, whole = result.folder / "images.bin", (result.folder / "images.bin").read_bytes()
    start = int(result.images.starts[3])
    file.write_bytes(whole[:start] + b"\0" * 40 + whole[start + 40 :])
    damaged = Prepared.open(result.folder)
    with pytest.raises(UserError, match=r"images.bin: damaged: SHA-256: got .*run prepare again"):
        damaged.verify()
    with pytest.raises(UserError, match=r"images.bin: damaged: row 3: got .*run prepare again"):
        damaged.images.image(3)
    damaged.images.image(4)
    for rest in (whole[:-1], whole + b"x"):
        file.write_bytes(rest)
        with pytest.raises(UserError, match=r"images.bin: damaged: got \d+ bytes; expected \d+"):
            Prepared.open(result.folder)
    file.unlink()
    with pytest.raises(UserError, match=r"images.bin: damaged: No such file"):
        Prepared.open(result.folder)
    file.write_bytes(whole)
    index = json.loads((result.folder / "index.json").read_text())
    for key, value in (("stored", "webp"), ("crop_mode", "border")):
        (result.folder / "index.json").write_text(json.dumps(index | {key: value}))
        with pytest.raises(UserError, match=f"index.json: damaged: {key}: got '{value}'"):
            Prepared.open(result.folder)
    older = index | {"schema": "cakd.prepared/2"}
    (result.folder / "index.json").write_text(json.dumps(older))
    with pytest.raises(UserError, match=r"cakd.prepared/2.*prepare"):
        Prepared.open(result.folder)


def test_a_full_disk_is_one_line_and_nothing_stays(folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.prepare.decoded.encode", full)
    with pytest.raises(
        UserError, match=r"got No space left on device; expected room .*stored_side"
    ):
        prepared(folder, tmp_path / "p")
    assert not (tmp_path / "p").exists()


# --- what it is worth --------------------------------------------------------------------------------------


def panoramas(root, shape=(96, 32)):
    """3:1, the class mark at the right end: a bar that stands or lies."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 60), ("test", 60)):
        for label in ("lies", "stands"):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                picture = generator.integers(60, 120, (shape[1], shape[0], 3), dtype=np.uint8)
                y, x = generator.integers(4, 12), generator.integers(72, 80)
                height, width = (4, 14) if label == "lies" else (14, 4)
                picture[y : y + height, x : x + width] = 230
                Image.fromarray(picture).save(root / split / label / f"{i}.png")
    return root


def trained(result: Prepared, folder) -> dict[str, float]:
    """A plain student of a few steps, judged on val."""
    from pipeline import teach
    from pipeline.distill.distill import distill
    from pipeline.evaluate.selection import score
    from pipeline.models import checkpoint, teacher
    from pipeline.store import writing
    from tests.test_training import QUICK

    ours = teach.Teach("vit_tiny_patch16_224", kwargs=VIT, epochs=1)
    teach.teach(ours, result, folder / "teacher", folder / "work")
    path = folder / "teacher" / "teacher.safetensors"
    cache = Cache(mode="off", views=1, geometry=Geometry(crop=(0.8, 1.0)))
    writing.write(cache, result, teacher.load(path), folder / "f", folder / "w", lambda _: None)
    config = replace(QUICK, methods=("plain",), steps=100, batch=32, lr=0.01)
    distill(config, "plain", result, path, folder / "f", folder / "plain", folder / "d")
    model, description = checkpoint.load(folder / "plain" / "student.safetensors")
    return score(model, description["preprocess"], result)


def test_panoramas_with_their_mark_at_one_end_are_learnt_better_than_by_squares(tmp_path):
    """A centre crop never shows the mark; the default sees that the images are long and keeps both ends."""
    root = panoramas(tmp_path / "panoramas")
    top1 = {}
    for stored in ("raw", "auto"):
        result = prepared(root, tmp_path / stored, stored=stored, val=40)
        top1[stored] = trained(result, tmp_path / f"trained-{stored}")["top1"]
    assert Prepared.open(tmp_path / "auto").crop_mode == "squash"
    assert top1["raw"] <= 0.75 and top1["auto"] >= 0.95
