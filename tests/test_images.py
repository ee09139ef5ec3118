"""Every kind of image file becomes square RGB, here and on the device; what is no image is named."""

from __future__ import annotations

import os
from functools import partial

import numpy as np
import pytest
from PIL import Image, features

from exporters.device import errors, image
from pipeline.core.errors import UserError
from pipeline.data import tree
from pipeline.data.decoding import decode, square_rgb
from pipeline.data.images import SUFFIXES, BrokenImage, image_files, read_pixels
from tests import image_files as files


def square_pixels(read, origin, size):
    """An image as evaluation sees it, read as prepare reads it."""
    return read_pixels(read, origin, partial(square_rgb, size=size))


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
    found = square_rgb(image, 8)
    assert found.shape == (8, 8, 3) and tuple(found[4, 4]) == expected


def stripe(mode="RGB"):
    """Black with a white top quarter."""
    image = Image.new("RGB", (40, 40), "black")
    image.paste("white", (0, 0, 40, 10))
    return image.convert(mode)


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: what was the top is the right
    return exif


FILES = {  # name -> (mode, options): all of them the same picture once they are read
    "grey.png": ("L", {}),
    "palette.png": ("P", {}),
    "alpha.png": ("RGBA", {}),
    "grey and alpha.png": ("LA", {}),
    "sixteen bits.png": ("I;16", {}),
    "one bit.bmp": ("1", {}),
    "animated.gif": ("P", {"save_all": True, "append_images": [Image.new("P", (40, 40), 7)]}),
    "print.jpg": ("CMYK", {"quality": 95}),
    "print.tif": ("CMYK", {}),
    "lossless.webp": ("RGB", {"lossless": True}),
    "ünï-日本.png": ("RGB", {}),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_is_read_as_the_same_picture(name, tmp_path):
    mode, options = FILES[name]
    image = stripe("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    image.save(tmp_path / name, **options)
    assert Image.open(tmp_path / name).mode == mode
    found = square_pixels(partial(decode, tmp_path / name), name, 16)
    assert np.abs(found.astype(int) - square_rgb(stripe(), 16)).max() <= 12  # JPEG is not exact


def test_an_exif_rotation_is_applied(tmp_path):
    stripe().save(tmp_path / "turned.jpg", exif=rotated(), quality=95)
    found = square_pixels(partial(decode, tmp_path / "turned.jpg"), "turned.jpg", 8)
    assert found[4, 7, 0] > 200 and found[0, 3, 0] < 50


def test_a_truncated_photograph_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    (tmp_path / "cut.jpg").write_bytes(files.saved(Image.fromarray(noise), "JPEG")[:-1000])
    with pytest.raises(BrokenImage, match="cut.jpg: not a readable image .*truncated"):
        square_pixels(partial(decode, tmp_path / "cut.jpg"), "cut.jpg", 8)


NOTES = {"image_size": 8, "interpolation": "bicubic", "crop": image.CROP}
NOTES |= {"mean": [0.0] * 3, "std": [1 / 255] * 3}


def on_device(path):
    """What the bundle's runner gives the network, as pixels."""
    return image.read_image(path, NOTES)[0].transpose(1, 2, 0).round().astype(np.uint8)


@pytest.mark.parametrize("name", files.READ)
def test_pipeline_and_runner_read_a_file_alike_and_as_a_viewer_shows_it(name, tmp_path):
    made = files.READ[name]
    data, above, below = made if isinstance(made, tuple) else (made, files.GREY, 0)
    (tmp_path / name).write_bytes(data)
    pixels = square_pixels(partial(decode, tmp_path / name), name, 8)
    assert np.abs(pixels[1].astype(int) - above).max() <= 3  # JPEG is not exact
    assert np.abs(pixels[6].astype(int) - below).max() <= 3
    assert np.array_equal(on_device(tmp_path / name), pixels)


@pytest.mark.parametrize("name", files.REFUSED)
def test_pipeline_and_runner_name_what_is_no_image(name, tmp_path):
    data, reason = files.REFUSED[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(
        BrokenImage, match=f"{name}: not a readable image .*({reason}).*repair or remove it"
    ):
        square_pixels(partial(decode, tmp_path / name), name, 8)
    with pytest.raises(errors.UserError, match=f"{name}: cannot be read .*({reason})"):
        image.read_image(tmp_path / name, NOTES)


def test_pipeline_and_runner_name_a_file_that_is_gone_and_a_dead_link(tmp_path):
    (tmp_path / "dead.png").symlink_to("/not/mounted/0.png")
    for name, reason in (
        ("gone.png", "No such file"),
        ("dead.png", "a link to /not/mounted/0.png, which is not there"),
    ):
        with pytest.raises(BrokenImage, match=f"{name}: not a readable image .*{reason}"):
            square_pixels(partial(decode, tmp_path / name), name, 8)
        with pytest.raises(errors.UserError, match=reason):
            image.read_image(tmp_path / name, NOTES)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_read_where_pillow_can(tmp_path, monkeypatch):
    files.plain().save(tmp_path / "a.avif", quality=100)
    pixels = square_pixels(partial(decode, tmp_path / "a.avif"), "a.avif", 8)
    assert np.abs(pixels[1].astype(int) - files.GREY).max() <= 3
    assert np.array_equal(on_device(tmp_path / "a.avif"), pixels)
    monkeypatch.delitem(Image.OPEN, "AVIF")
    with pytest.raises(BrokenImage, match="AVIF, which this Pillow cannot read; install pillow"):
        square_pixels(partial(decode, tmp_path / "a.avif"), "a.avif", 8)


@pytest.mark.parametrize("name", ["animated.gif", "animated.webp", "animated.png", "pages.tif"])
def test_a_file_of_several_frames_is_marked(name, tmp_path):
    (tmp_path / name).write_bytes(files.READ[name])
    assert decode(tmp_path / name).info["frames"] == "several"


@pytest.mark.parametrize(
    "name", ["plain.png", "palette, opaque.gif", "two pictures of a phone.jpg"]
)
def test_a_file_of_one_frame_is_not_marked(name, tmp_path):
    (tmp_path / name).write_bytes(files.READ[name])
    assert "frames" not in decode(tmp_path / name).info


def test_a_pipe_a_loop_and_a_folder_that_cannot_be_listed_stop_nothing_in_silence(
    tmp_path, monkeypatch
):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "self.png").symlink_to("self.png")
    (tmp_path / "0.png").write_bytes(b"")
    files_by_name = {f.name: f for f in tree.walk(tmp_path)}
    assert files_by_name["pipe.png"].reason == "no regular file"
    assert files_by_name["self.png"].dead and files_by_name["0.png"].reason is None
    assert [p.name for p in image_files(tmp_path)] == ["0.png", "self.png"]

    def denied(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UserError, match="cannot be listed .Permission denied.; expected a folder"):
        image_files(tmp_path)


def test_the_images_of_a_folder_are_those_of_the_user(tmp_path):
    for name in ("a/0.png", "b/1.JPG", "2.avif", "a/._0.png", ".hidden/0.png", "__MACOSX/0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for name in ("b/@eaDir/1.jpg", "a/.ipynb_checkpoints/0.png", "a/notes.txt", "Thumbs.db"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path / "b")
    found = [p.relative_to(tmp_path).as_posix() for p in image_files(tmp_path)]
    assert found == ["2.avif", "a/0.png", "b/1.JPG", "linked/1.JPG"]
    assert {".jfif", ".avif", ".ppm"} < SUFFIXES and image_files(tmp_path / "none") == []
