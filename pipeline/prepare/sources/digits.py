"""The offline default: the handwritten digits that scikit-learn carries."""

from __future__ import annotations

from functools import partial

import numpy as np
from PIL import Image

from pipeline.prepare.sources.sample import Columns, Sample, SourceImages


def read(_: str | None, columns: Columns) -> SourceImages:
    """1,797 grey digits, 8x8 pixels with values 0 to 16, in one split (Alpaydin and Kaynak, UCI, 1998)."""
    from sklearn.datasets import load_digits

    columns.only("digits")
    bunch = load_digits()
    pixels = (bunch.images * (255 / 16)).round().astype(np.uint8)
    samples = [
        Sample(f"digits/{i:04d}", partial(Image.fromarray, a), int(label), None)
        for i, (a, label) in enumerate(zip(pixels, bunch.target, strict=True))
    ]
    return SourceImages([str(c) for c in range(10)], samples)
