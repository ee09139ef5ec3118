"""Any picture file -> square 8-bit RGB: the one decoder of the pipeline. Torch-free."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.core.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF")  # no others: EPS runs Ghostscript
MAX_PIXELS = 2**27  # pixels of a picture that is decoded: 0.5 GB in memory


class BrokenImage(UserError):
    """A picture that cannot be decoded; under `prepare.on_error: skip` the run goes on without it."""

    def __init__(self, origin: str, reason: str) -> None:
        super().__init__(
            f"{origin}: not a readable image ({reason}); repair or remove it, or set prepare.on_error: skip"
        )
        self.origin, self.reason = origin, reason


def decode(source: Path | BinaryIO) -> Image.Image:
    """A picture file, decoded whole (of an animation its first frame); raises what Pillow raises.

    Pillow's warnings of a large or crooked file are not shown: it is decoded whole or not at all, and what is
    larger than LARGEST is not begun. Raises ValueError: too large.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(source, formats=FORMATS)
        try:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(
                    f"{image.width} x {image.height} pixels; allowed: {MAX_PIXELS} in all"
                )
            image.load()
        except BaseException:
            image.close()
            raise
    return image


def square_pixels(read: Callable[[], Image.Image], origin: str, size: int) -> NDArray[np.uint8]:
    """What `read` gives, as (size, size, 3) uint8 RGB.

    Raises BrokenImage naming `origin`: missing, empty, truncated, no picture, too large to be one.
    """
    try:
        with read() as image:
            return square_rgb(image, size)
    except UnidentifiedImageError:
        raise BrokenImage(origin, "empty, or no format that is read here") from None
    except Exception as error:  # a decoder raises whatever the bytes lead it to
        raise BrokenImage(origin, str(error) or type(error).__name__) from None


def square_rgb(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Any PIL image -> (size, size, 3) uint8 RGB: EXIF rotation applied, alpha on white, 16 bit scaled to 8;

    shorter side resized (bicubic, antialiased), centre crop. Raises ValueError: 32-bit float pixels, which
    have no range of their own.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("32-bit float pixels have no defined range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC))


def image_files(folder: Path) -> list[Path]:
    """The picture files anywhere below `folder`, in name order; none where it does not exist."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


def other_suffixes(folder: Path) -> Counter[str]:
    """How many files below `folder` are no pictures that we read, by suffix; hidden files are not counted."""
    return Counter(
        p.suffix.lower() or p.name
        for p in folder.rglob("*")
        if p.suffix.lower() not in SUFFIXES and p.name[0] != "." and p.is_file()
    )
