"""An image file as the network's input. The one part of the runner that needs Pillow."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import UserError, one_line

# A bundle carries a copy of the pipeline's decoder beside this file.
HOME = __package__ if Path(__file__).with_name("decoding.py").exists() else "pipeline.data"
CROP = "resize the shorter side, centre crop"
CROPS = (CROP, "resize both sides, centre crop")


def read_image(path: Path, preprocess: dict[str, Any]) -> NDArray[np.float32]:
    """(1, 3, S, S) float32: EXIF rotation applied, alpha on white, resized and cropped, normalised.

    Raises UserError: no Pillow, no such file, not readable, a preprocessing this runner does not have.
    """
    if preprocess["interpolation"] != "bicubic" or preprocess["crop"] not in CROPS:
        raise UserError(
            f"preprocessing: got {preprocess['interpolation']!r}, {preprocess['crop']!r}; expected "
            f"'bicubic', {CROP!r}; prepare the images yourself"
        )
    try:
        decoding = importlib.import_module(f"{HOME}.decoding")
    except ImportError as error:
        raise UserError(
            f"--image needs Pillow ({error}); `pip install pillow`; --bench and --verify do without"
        ) from None
    try:
        pixels = decoding.square_for(decoding.decode(path), preprocess)
    except Exception as error:  # a decoder raises whatever the bytes lead it to
        raise UserError(
            f"--image {path}: cannot be read ({one_line(error)}); give an image file"
        ) from None
    x = pixels.astype(np.float32) / np.float32(255)
    x = (x - np.array(preprocess["mean"], np.float32)) / np.array(preprocess["std"], np.float32)
    return np.ascontiguousarray(x.transpose(2, 0, 1)[None])
