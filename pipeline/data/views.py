"""View k of image i as a pure function of (seed, i, k): the geometry that teacher and student share.

Crop, rotation and flip live here and nowhere else, so that a cached teacher token and a student pixel always
are of the same position (docs/decisions.md, 13). What only the student gets is in `pipeline.distill.robust`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from pipeline.core.config import STRICT
from pipeline.core.errors import UserError
from pipeline.data.mixing import Mix, Mixture, mixture

Rows = Sequence[int] | NDArray[np.int64]

BACKEND = "torch-grid-sample-bilinear-border/1"


@dataclass(frozen=True, config=STRICT)
class Geometry:
    """A view policy. All draws are uniform."""

    crop: tuple[float, float] = (0.35, 1.0)  # share of the image's area; above 1 zooms out
    aspect: float = Field(default=1.33, ge=1, le=4)  # width / height between 1/aspect and aspect
    rotate: float = Field(default=0.0, ge=0, le=180)  # degrees, between -rotate and +rotate
    flip: bool = True  # mirror left-right, one half of the views
    mix: Mix = Mix()  # with another image

    @field_validator("crop")
    @classmethod
    def _check_crop(cls, crop: tuple[float, float]) -> tuple[float, float]:
        if not 0 < crop[0] <= crop[1] <= 2:
            raise ValueError(f"got {list(crop)}; expected 0 < low <= high <= 2, shares of the area")
        return crop


def parameters(geometry: Geometry, seed: int, rows: Rows, views: Rows) -> NDArray[np.float32]:
    """Draw affine maps (B, 2, 3) from view coordinates to image coordinates, both in [-1, 1].

    A function of (seed, row, view) alone: batch order, batch size and process play no part.
    """
    return np.stack(
        [_affine(geometry, _uniforms(seed, r, v)) for r, v in zip(rows, views, strict=True)]
    )


def _uniforms(seed: int, row: int, view: int) -> NDArray[np.float64]:
    key = f"{seed}/{row}/{view}".encode()
    words = np.frombuffer(hashlib.blake2b(key, digest_size=48).digest(), dtype="<u8")
    uniforms: NDArray[np.float64] = (words >> np.uint64(11)).astype(np.float64) / (1 << 53)
    return uniforms


def _affine(geometry: Geometry, u: NDArray[np.float64]) -> NDArray[np.float32]:
    low, high = geometry.crop
    area = low + (high - low) * u[0]
    stretch = math.exp((2 * u[1] - 1) * math.log(geometry.aspect) / 2)
    width, height = math.sqrt(area) * stretch, math.sqrt(area) / stretch
    angle = math.radians(geometry.rotate) * (2 * u[2] - 1)
    x, y = ((1 - w) * (2 * v - 1) for w, v in ((width, u[3]), (height, u[4])))
    mirror = -1.0 if geometry.flip and u[5] < 0.5 else 1.0
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array(
        [[mirror * width * cos, -height * sin, x], [mirror * width * sin, height * cos, y]],
        dtype=np.float32,
    )


def render(images: NDArray[np.uint8], affine: NDArray[np.float32]) -> Tensor:
    """Sample images (B, S, S, 3) uint8 by affine maps (B, 2, 3): views (B, 3, S, S) uint8.

    Bilinear, edges repeated.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float()
    # Elementwise instead of F.affine_grid's batched matrix product: a view must have the same bits in any batch,
    # because the feature cache stores its hash.
    size = pixels.shape[-1]
    centre = (torch.arange(size, dtype=torch.float32) * 2 + 1) / size - 1
    y, x = centre[:, None], centre[None, :]
    a = torch.from_numpy(affine)[:, :, :, None, None]  # (B, 2, 3, 1, 1)
    grid = a[:, :, 0] * x + a[:, :, 1] * y + a[:, :, 2]  # (B, 2, S, S)
    sampled = F.grid_sample(
        pixels,
        grid.permute(0, 2, 3, 1),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    return sampled.round_().clamp_(0, 255).to(torch.uint8)


def view_batch(
    images: NDArray[np.uint8],
    geometry: Geometry,
    seed: int,
    rows: Rows,
    views: Rows,
    partners: NDArray[np.int64],
) -> Tensor:
    """Render the views (B, 3, S, S) uint8 of these rows of `images` (N, S, S, 3).

    partners: the rows that a mixed view may be mixed with. The partner shows its own view of the same number.
    """
    own = render(images[np.asarray(rows)], parameters(geometry, seed, rows, views))
    mixed = mixed_with(geometry, seed, rows, views, partners, images.shape[1])
    if mixed is None:
        return own
    affine = parameters(geometry, seed, mixed.partners, views)
    return mixed.blend(own, render(images[mixed.partners], affine))


def mixed_with(
    geometry: Geometry,
    seed: int,
    rows: Rows,
    views: Rows,
    partners: NDArray[np.int64],
    size: int,
) -> Mixture | None:
    """Draw what the views of these rows are mixed with; None where the geometry mixes none. `size` in pixels."""
    if not geometry.mix.on:
        return None
    return mixture(geometry.mix, seed, np.asarray(rows), np.asarray(views), partners, size)


def whole(images: NDArray[np.uint8]) -> Tensor:
    """Return the whole images as views, for evaluation: (B, S, S, 3) -> (B, 3, S, S) uint8."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def normalise(views: Tensor, preprocess: dict[str, Sequence[float]]) -> Tensor:
    """Normalise uint8 or [0, 255] float (B, 3, S, S) to float32: / 255, minus the model's mean, over its std."""
    mean, std = (
        torch.tensor(preprocess[k], dtype=torch.float32, device=views.device)[:, None, None]
        for k in ("mean", "std")
    )
    return (views.float() / 255 - mean) / std


def view_hashes(views: Tensor) -> NDArray[np.uint64]:
    """Hash views (B, 3, S, S) uint8: (B,) 64-bit BLAKE2b, stored with each cached record."""
    digests = (hashlib.blake2b(v.tobytes(), digest_size=8).digest() for v in views.numpy())
    return np.frombuffer(b"".join(digests), dtype="<u8")


def check_hashes(views: Tensor, stored: NDArray[np.uint64], rows: Rows) -> None:
    """Compare views (B, 3, S, S) with the hashes (B,) beside the features. Raises UserError: they differ."""
    wrong = np.flatnonzero(view_hashes(views) != stored)
    if wrong.size:
        raise UserError(
            f"feature cache: got {wrong.size} of {len(rows)} views with other pixels (first: image row "
            f"{rows[int(wrong[0])]}); expected those the teacher saw; data or view code changed: run cache again"
        )
