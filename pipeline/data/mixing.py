"""Mixup (Zhang et al., ICLR 2018) and CutMix (Yun et al., ICCV 2019) as part of a view.

Partner, share and box are pure functions of (seed, image, view), so that a cached teacher saw the very mix that
the student sees.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pydantic.dataclasses
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, arange, from_numpy, where

from pipeline.core.config import STRICT, Share

Alpha = Annotated[float, Field(ge=0, le=100)]


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Mix:
    """How many views are mixed, and how; with both kinds on, either is equally likely."""

    mixup: Alpha = 0.0  # alpha of Beta(alpha, alpha), from which an image's share is drawn; 0: off
    cutmix: Alpha = 0.0  # the same for the share of the area; 0: off
    probability: Share = 1.0  # of a view to be mixed, where one of them is on

    @property
    def on(self) -> bool:
        """Whether any view is mixed."""
        return bool((self.mixup or self.cutmix) and self.probability)


@dataclass(frozen=True)
class Mixture:
    """The partner, share and box of each view of a batch."""

    partners: NDArray[np.int64]  # (B,), rows
    shares: NDArray[np.float32]  # (B,), of the image's own pixels
    boxes: NDArray[
        np.int64
    ]  # (B, 4), top, bottom, left, right in pixels; empty: blended by the share

    def blend(self, own: Tensor, partner: Tensor) -> Tensor:
        """Mix two batches of views (B, 3, S, S) uint8; elementwise, so a view has the same bits in any batch."""
        if own.device.type != "cpu":
            return self.blend_on_device(own, partner)
        a, b = own.numpy(), partner.numpy()
        share = self.shares[:, None, None, None]
        blended = a.astype(np.float32) * share + b.astype(np.float32) * (1 - share)
        mixed = np.rint(blended).astype(np.uint8)
        for i, (top, bottom, left, right) in enumerate(self.boxes):
            if bottom > top:
                mixed[i] = a[i]
                mixed[i, :, top:bottom, left:right] = b[i, :, top:bottom, left:right]
        return from_numpy(mixed)

    def blend_on_device(self, own: Tensor, partner: Tensor) -> Tensor:
        """`blend` on the device of the views, for the whole batch at once."""
        share = from_numpy(self.shares).to(own.device)[:, None, None, None]
        blended = (own.float() * share + partner.float() * (1 - share)).round().to(own.dtype)
        top, bottom, left, right = from_numpy(self.boxes).to(own.device)[:, :, None].unbind(1)
        at = arange(own.shape[-1], device=own.device)
        inside = ((at >= top) & (at < bottom))[:, :, None] & ((at >= left) & (at < right))[:, None]
        cut = (bottom > top)[:, :, None, None]
        return where(cut, where(inside[:, None], partner, own), blended)


def mixture(
    mix: Mix,
    seed: int,
    rows: NDArray[np.int64],
    views: NDArray[np.int64],
    partners: NDArray[np.int64],
    size: int,
) -> Mixture:
    """Draw what each view (row, view) is mixed with; `partners`: the rows to draw from, `size`: pixels a side."""
    drawn = [_draw(mix, f"{seed}/mix/{r}/{v}", size) for r, v in zip(rows, views, strict=True)]
    at, shares, boxes = zip(*drawn, strict=True)
    selected = partners[(np.array(at) * len(partners)).astype(np.int64)]
    return Mixture(selected, np.array(shares, np.float32), np.array(boxes, np.int64))


def _draw(mix: Mix, key: str, size: int) -> tuple[float, float, tuple[int, int, int, int]]:
    """Draw a partner's position in the pool in [0, 1), the share of the image's own pixels, the partner's box."""
    digest = hashlib.blake2b(key.encode(), digest_size=48).digest()
    words = np.frombuffer(digest, dtype="<u8")
    mixed, partner, kind, share, y, x = (words >> np.uint64(11)).astype(np.float64) / (1 << 53)
    if mixed >= mix.probability:
        return partner, 1.0, (0, 0, 0, 0)
    cut = bool(mix.cutmix) and (not mix.mixup or kind < 0.5)
    alpha = mix.cutmix if cut else mix.mixup
    if alpha != 1:  # Beta(1, 1) is uniform
        share = np.random.default_rng(int.from_bytes(digest[:16], "little")).beta(alpha, alpha)
    if not cut:
        return partner, share, (0, 0, 0, 0)
    half = size * np.sqrt(1 - share) / 2
    top, left = (max(0, round(c * size - half)) for c in (y, x))
    bottom, right = (min(size, round(c * size + half)) for c in (y, x))
    own = 1 - max(0, bottom - top) * max(0, right - left) / size**2
    return partner, own, (top, bottom, left, right) if own < 1 else (0, 0, 0, 0)
