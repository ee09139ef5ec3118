"""A picture file -> what the network takes. The one part of the runner that needs Pillow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import UserError, one_line

BICUBIC = 3  # Pillow's number of the filter, the same in every version
CROP = "resize the shorter side, centre crop"


def read(path: Path, notes: dict[str, Any]) -> NDArray[np.float32]:
    """(1, 3, S, S) float32: EXIF rotation applied, alpha on white, shorter side resized, centre crop, normalised.

    Raises UserError: no Pillow, no such file, not readable, a preprocessing this runner does not know.
    """
    if (notes["interpolation"], notes["crop"]) != ("bicubic", CROP):
        raise UserError(
            f"preprocessing is {notes['interpolation']!r} and {notes['crop']!r}; this runner does "
            f"'bicubic' and {CROP!r} only"
        )
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise UserError(
            f"--image needs Pillow ({error}); `pip install pillow`; --bench and --verify do without"
        ) from None
    try:
        with Image.open(path) as image:
            pixels = _square(image, int(notes["image_size"]), Image, ImageOps)
    except (OSError, Image.DecompressionBombError, SyntaxError, ValueError, EOFError) as error:
        raise UserError(
            f"--image {path}: cannot be read ({one_line(error)}); give a picture file"
        ) from None
    x = pixels.astype(np.float32) / np.float32(255)
    x = (x - np.array(notes["mean"], np.float32)) / np.array(notes["std"], np.float32)
    return np.ascontiguousarray(x.transpose(2, 0, 1)[None])


def _square(image: Any, size: int, pil: Any, ops: Any) -> NDArray[np.uint8]:
    """Any Pillow image -> (size, size, 3) uint8 RGB, as the training prepared its own."""
    image = ops.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("32-bit float pixels have no defined range")
    if image.mode.startswith("I"):
        scaled = (np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8)
        image = pil.fromarray(scaled)
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = pil.alpha_composite(pil.new("RGBA", rgba.size, "white"), rgba)
    fitted = ops.fit(image.convert("RGB"), (size, size), BICUBIC)
    return np.asarray(fitted)
