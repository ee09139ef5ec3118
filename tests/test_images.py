"""Every kind of picture file becomes square RGB; what is no picture is named."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from PIL import Image

from pipeline.data.images import BrokenImage, decode, square_pixels, square_rgb


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


def truncated(path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-1000])


SPOILED = {
    "cut.jpg": (truncated, "truncated"),
    "empty.png": (lambda p: p.write_bytes(b""), "empty, or no format that is read here"),
    "text.png": (lambda p: p.write_text("no picture"), "empty, or no format that is read here"),
    "float.tif": (lambda p: Image.new("F", (9, 9), 0.5).save(p), "32-bit float pixels"),
    "gone.png": (lambda _: None, "No such file"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_no_picture_is_named_with_the_reason(name, tmp_path):
    spoil, reason = SPOILED[name]
    spoil(tmp_path / name)
    with pytest.raises(BrokenImage, match=f"{name}: not a readable image .*{reason}.*on_error"):
        square_pixels(partial(decode, tmp_path / name), name, 8)
