"""The pixels of a prepared folder: squares in one array, or images of their own shape in one file. Torch-free.

Packed: JPEG or PNG files one behind the other, their lengths in the index; a row is read by one decode, from a
memory map, in any order and process. Small images stay squares, which need no decoding.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.core.errors import UserError
from pipeline.data.decoding import rgb, square_rgb

SQUARES_FILE, PACKED_FILE = "images.npy", "images.bin"
ENCODINGS = ("jpeg", "png")
QUALITY = 95  # of JPEG; chroma at half the resolution, as cameras store it
MAX_STORED_SIDE = 8192  # pixels of the longer side: a strip of 100:1 is stored smaller
# The stored shorter side over the network's: a crop of 64 % of the area loses nothing.
OVERSIZE = 1.25
# Longer over shorter side, median: above it a centre crop would leave out most of an image.
ELONGATED = 2.0
REMEDY = "run prepare again (`dvc repro prepare`)"

Rows = Sequence[int] | NDArray[np.int64]


class Squares:
    """Images that are prepared at the network's size."""

    def __init__(self, array: NDArray[np.uint8]) -> None:
        self.array = array  # (N, S, S, 3), memory-mapped
        self.size = int(array.shape[1])  # S

    def __len__(self) -> int:
        return len(self.array)

    def image(self, row: int) -> Image.Image:
        """Return one image."""
        return Image.fromarray(self.array[row])

    def squares(self, rows: Rows, crop_pct: float = 1.0) -> NDArray[np.uint8]:
        """Return what the network is evaluated on, (n, S, S, 3), as `Packed.squares`."""
        selected: NDArray[np.uint8] = self.array[np.asarray(rows, dtype=np.int64)]
        if crop_pct == 1:
            return selected
        return _stacked(
            [square_rgb(Image.fromarray(p), self.size, crop_pct) for p in selected], self.size
        )


class Packed:
    """Images of their own shape, the shorter side some pixels above the network's."""

    def __init__(
        self, path: Path, data: NDArray[np.uint8], lengths: Rows, size: int, crop_mode: str
    ) -> None:
        self.path, self.data = path, data
        self.ends = np.cumsum(lengths, dtype=np.int64)
        self.starts = self.ends - np.asarray(lengths, dtype=np.int64)
        self.size = size  # S, of the network
        self.crop_mode = crop_mode  # center | squash

    def __len__(self) -> int:
        return len(self.ends)

    def image(self, row: int) -> Image.Image:
        """Decode one image, RGB. Raises UserError: damaged."""
        encoded = self.data[self.starts[row] : self.ends[row]].tobytes()
        try:
            image = Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG"))
            image.load()
        except Exception as error:  # a decoder raises whatever the bytes lead it to
            raise UserError(
                f"{self.path}: damaged: row {row}: got {type(error).__name__} ({error}); expected an image that "
                f"prepare wrote; {REMEDY}"
            ) from None
        return image if image.mode == "RGB" else image.convert("RGB")

    def squares(self, rows: Rows, crop_pct: float = 1.0) -> NDArray[np.uint8]:
        """Return what the network is evaluated on, (n, S, S, 3): resized and cropped as crop_mode says.

        `crop_pct`: the share of each side that is kept (`evaluate.crop_pct`).
        """
        pixels = [
            square_rgb(self.image(int(row)), self.size, crop_pct, self.crop_mode) for row in rows
        ]
        return _stacked(pixels, self.size)


def _stacked(pixels: list[NDArray[np.uint8]], size: int) -> NDArray[np.uint8]:
    return np.stack(pixels) if pixels else np.empty((0, size, size, 3), np.uint8)


def default_stored_side(size: int) -> int:
    """Return the shorter side that is stored for a network of `size` pixels, where none is asked for."""
    return math.ceil(OVERSIZE * size)


def reduced(image: Image.Image, side: int) -> Image.Image:
    """Convert to RGB with a shorter side of at most `side` pixels, aspect kept; never enlarged.

    Raises ValueError as `decoding.rgb`.
    """
    image = rgb(image)
    scale = min(1.0, side / min(image.size), MAX_STORED_SIDE / max(image.size))
    if scale == 1:
        return image
    width, height = (max(1, round(length * scale)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, encoding: str) -> bytes:
    """Encode an RGB image as JPEG of quality 95, or losslessly as PNG."""
    buffer = io.BytesIO()
    if encoding == "png":
        image.save(buffer, "PNG", compress_level=6)
    else:
        image.save(buffer, "JPEG", quality=QUALITY, subsampling="4:2:0")
    return buffer.getvalue()
