"""View k of image i as a pure function of (seed, i, k): the geometry that teacher and student share.

Crop, rotation and flip live here and nowhere else, so that a cached teacher token and a student pixel always
are of the same position (docs/decisions.md, 13). What only the student gets is in `pipeline.distill.robust`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from pipeline.core.config import STRICT
from pipeline.core.errors import UserError
from pipeline.data.mixing import Mix, Mixture, mixture
from pipeline.data.pixels import Packed, Rows, Squares
from pipeline.data.resident import Resident

BACKEND = "torch-grid-sample-bilinear-border/1"
PACKED_BACKEND = "pillow-box-bicubic/1"
EPSILON = 1e-9  # of an image's half side: what rounding may take a crop beyond an edge


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


def backend(images: Squares | Packed) -> str:
    """Name what renders the views of these images: a line of the feature cache's fingerprint."""
    if isinstance(images, Resident):
        return resident_backend(images.pixels.device)
    return BACKEND if isinstance(images, Squares) else PACKED_BACKEND


def resident_backend(device: torch.device) -> str:
    """Name what renders the views of images that lie on a device."""
    return f"{BACKEND} on {device.type}"


def parameters(geometry: Geometry, seed: int, rows: Rows, views: Rows) -> NDArray[np.float32]:
    """Draw affine maps (B, 2, 3) from view coordinates to coordinates of a square image, both in [-1, 1].

    A function of (seed, row, view) alone: batch order, batch size and process play no part.
    """
    return np.stack(
        [affine(geometry, seed, r, v) for r, v in zip(rows, views, strict=True)], dtype=np.float32
    )


def _uniforms(seed: int, row: int, view: int) -> NDArray[np.float64]:
    key = f"{seed}/{row}/{view}".encode()
    words = np.frombuffer(hashlib.blake2b(key, digest_size=48).digest(), dtype="<u8")
    uniforms: NDArray[np.float64] = (words >> np.uint64(11)).astype(np.float64) / (1 << 53)
    return uniforms


def affine(
    geometry: Geometry, seed: int, row: int, view: int, ratio: float = 1.0
) -> NDArray[np.float64]:
    """Draw the map (2, 3) from view coordinates to those of an image of width / height = ratio, both in [-1, 1].

    Area and aspect are of pixels. A crop that would leave an image on its short side is made smaller.
    """
    u = _uniforms(seed, row, view)
    low, high = geometry.crop
    area = low + (high - low) * u[0]
    stretch = math.exp((2 * u[1] - 1) * math.log(geometry.aspect) / 2)
    # Half sides in units of half the side of a square of the image's area.
    width, height = math.sqrt(area) * stretch, math.sqrt(area) / stretch
    side_x, side_y = math.sqrt(ratio), 1 / math.sqrt(ratio)
    if ratio != 1:
        allowed = max(1.0, math.sqrt(area))
        fit = min(1.0, allowed * side_x / width, allowed * side_y / height)
        width, height = width * fit, height * fit
    angle = math.radians(geometry.rotate) * (2 * u[2] - 1)
    x, y = ((1 - w) * (2 * v - 1) for w, v in ((width / side_x, u[3]), (height / side_y, u[4])))
    mirror = -1.0 if geometry.flip and u[5] < 0.5 else 1.0
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array(
        [
            [mirror * width * cos / side_x, -height * sin / side_x, x],
            [mirror * width * sin / side_y, height * cos / side_y, y],
        ]
    )


def render(
    images: NDArray[np.uint8], affine: NDArray[np.float32], size: int | None = None
) -> Tensor:
    """Sample images (B, H, W, 3) uint8 by affine maps (B, 2, 3): views (B, 3, size, size) uint8.

    Bilinear, edges repeated; size: H by default.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return _sample(pixels, torch.from_numpy(affine), size or pixels.shape[-1])


def _sample(pixels: Tensor, affine: Tensor, size: int) -> Tensor:
    """`render` for pixels (B, 3, H, W) uint8 and maps (B, 2, 3) on any device."""
    # Elementwise instead of F.affine_grid's batched matrix product: a view must have the same bits in any batch,
    # because the feature cache stores its hash.
    centre = (torch.arange(size, dtype=torch.float32, device=pixels.device) * 2 + 1) / size - 1
    y, x = centre[:, None], centre[None, :]
    a = affine[:, :, :, None, None]  # (B, 2, 3, 1, 1)
    grid = a[:, :, 0] * x + a[:, :, 1] * y + a[:, :, 2]  # (B, 2, S, S)
    sampled = F.grid_sample(
        pixels.float(),
        grid.permute(0, 2, 3, 1),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    return sampled.round_().clamp_(0, 255).to(torch.uint8)


def resample(image: Image.Image, affine: NDArray[np.float64], size: int) -> Tensor:
    """Sample one image of any shape by an affine map (2, 3): a view (3, size, size) uint8.

    The box around the crop is resized in one antialiased step (bicubic, in integers: the same bits on any
    machine); a rotated crop, or one that leaves the image, is then cut from it by `render`.
    """
    extent = np.abs(affine[:, :2]).sum(axis=1)  # half sides of the box, x and y
    low, high = affine[:, 2] - extent, affine[:, 2] + extent
    inside = bool((low >= -1 - EPSILON).all() and (high <= 1 + EPSILON).all())
    low, high = low.clip(-1, 1), high.clip(-1, 1)
    sides = np.array(image.size)
    (left, top), (right, bottom) = (low + 1) / 2 * sides, (high + 1) / 2 * sides
    box = (left, top, min(right, image.width), min(bottom, image.height))
    upright = affine[0, 1] == affine[1, 0] == 0
    if upright and inside:
        pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box))
        pixels = pixels[:, ::-1] if affine[0, 0] < 0 else pixels
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    # Pixels of the view for a unit of the image's x and y decide the size of the resized box.
    density = np.linalg.norm(np.linalg.inv(affine[:, :2]), axis=0) * size / 2
    width, height = np.maximum(1, np.ceil((high - low) * density)).astype(int).tolist()
    canvas = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box))
    within = affine.copy()
    within[:, 2] -= (high + low) / 2
    within /= ((high - low) / 2)[:, None]
    return render(canvas[None], within[None].astype(np.float32), size)[0]


def _rendered(
    images: Squares | Packed, geometry: Geometry, seed: int, rows: Rows, views: Rows
) -> Tensor:
    """Render each image's own view, (B, 3, S, S) uint8, without mixing."""
    if isinstance(images, Squares):
        maps = parameters(geometry, seed, rows, views)
        if isinstance(images, Resident):
            device = images.pixels.device
            chosen = torch.from_numpy(np.asarray(rows, dtype=np.int64)).to(device)
            return _sample(images.pixels[chosen], torch.from_numpy(maps).to(device), images.size)
        return render(images.array[np.asarray(rows)], maps)
    rendered = []
    for row, view in zip(rows, views, strict=True):
        image = images.image(int(row))
        ratio = 1.0 if images.crop_mode == "squash" else image.width / image.height
        rendered.append(resample(image, affine(geometry, seed, row, view, ratio), images.size))
    return torch.stack(rendered)


def view_batch(
    images: Squares | Packed,
    geometry: Geometry,
    seed: int,
    rows: Rows,
    views: Rows,
    partners: NDArray[np.int64],
    augment: Callable[[Tensor, NDArray[np.int64], NDArray[np.int64]], Tensor] | None = None,
) -> Tensor:
    """Render the views (B, 3, S, S) uint8 of these rows of `images`.

    partners: the rows that a mixed view may be mixed with. The partner shows its own view of the same number.
    augment: what is done to each view before it is mixed.
    """

    def rendered(of: Rows) -> Tensor:
        batch = _rendered(images, geometry, seed, of, views)
        return batch if augment is None else augment(batch, np.asarray(of), np.asarray(views))

    own = rendered(rows)
    mixed = mixed_with(geometry, seed, rows, views, partners, images.size)
    if mixed is None:
        return own
    return mixed.blend(own, rendered(mixed.partners))


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
    digests = (hashlib.blake2b(v.tobytes(), digest_size=8).digest() for v in views.cpu().numpy())
    return np.frombuffer(b"".join(digests), dtype="<u8")


def check_hashes(views: Tensor, stored: NDArray[np.uint64], rows: Rows) -> None:
    """Compare views (B, 3, S, S) with the hashes (B,) beside the features. Raises UserError: they differ."""
    wrong = np.flatnonzero(view_hashes(views) != stored)
    if wrong.size:
        raise UserError(
            f"feature cache: got {wrong.size} of {len(rows)} views with other pixels (first: image row "
            f"{rows[int(wrong[0])]}); expected those the teacher saw; data or view code changed: run cache again"
        )
