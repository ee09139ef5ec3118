"""Image corruptions for evaluation under noise, disjoint from the transforms that students are trained on."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Pixels = NDArray[np.uint8]  # (S, S, 3)


def jpeg(image: Pixels, draw: np.random.Generator) -> Pixels:
    """Compress as JPEG at quality 5 to 20."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=int(draw.integers(5, 21)))
    return np.asarray(Image.open(buffer).convert("RGB"))


def contrast(image: Pixels, draw: np.random.Generator) -> Pixels:
    """Reduce contrast about the image's mean to 15 to 40 %."""
    mean = image.mean()
    return _to_bytes(mean + (image - mean) * draw.uniform(0.15, 0.4))


def shot_noise(image: Pixels, draw: np.random.Generator) -> Pixels:
    """Add Poisson noise of 8 to 25 photons at white."""
    photons = draw.uniform(8, 25)
    return _to_bytes(draw.poisson(image / 255 * photons) * (255 / photons))


def pixelation(image: Pixels, draw: np.random.Generator) -> Pixels:
    """Resize to 30 to 50 % of the side by box averaging, and back by nearest neighbour."""
    size = image.shape[0]
    small = max(2, round(size * draw.uniform(0.3, 0.5)))
    coarse = Image.fromarray(image).resize((small, small), Image.Resampling.BOX)
    return np.asarray(coarse.resize((size, size), Image.Resampling.NEAREST))


def lines(image: Pixels, draw: np.random.Generator) -> Pixels:
    """Draw two to four straight grey lines across the image, 1/16 of its side wide."""
    canvas = Image.fromarray(image)
    pen, size = ImageDraw.Draw(canvas), image.shape[0]
    for _ in range(draw.integers(2, 5)):
        a, b, grey = draw.uniform(0, size, 2), draw.uniform(0, size, 2), int(draw.integers(0, 256))
        ends = [(a[0], 0), (b[0], size)] if draw.random() < 0.5 else [(0, a[1]), (size, b[1])]
        pen.line(ends, fill=(grey, grey, grey), width=max(1, size // 16))
    return np.asarray(canvas)


def _to_bytes(values: NDArray[np.floating[Any]]) -> Pixels:
    pixels: Pixels = values.clip(0, 255).round().astype(np.uint8)
    return pixels


NOISE: dict[str, Callable[[Pixels, np.random.Generator], Pixels]] = {
    "jpeg": jpeg,
    "contrast": contrast,
    "shot_noise": shot_noise,
    "pixelation": pixelation,
    "lines": lines,
}


def noisy(images: Pixels, ids: tuple[str, ...], kind: str, seed: int) -> Pixels:
    """Corrupt images (n, S, S, 3) uint8 by one kind of noise; a function of (seed, kind, image id)."""
    corrupted = []
    for image, name in zip(images, ids, strict=True):
        key = hashlib.blake2b(f"{seed}/{kind}/{name}".encode(), digest_size=16).digest()
        generator = np.random.default_rng(int.from_bytes(key, "little"))
        corrupted.append(NOISE[kind](image, generator))
    return np.stack(corrupted)
