"""A whole set of small squares on a GPU, where its views are then rendered and mixed.

An image of 32 px takes 3 kB: a million fit in the memory of one GPU, and no view crosses the bus. The bits of such
views are the GPU's own, so the feature cache is written by the same (`view_backend` of its fingerprint).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from pipeline.data.pixels import Squares
from pipeline.data.prepared import Prepared

SHARE = 0.25  # of a GPU's free memory that images may take


class Resident(Squares):
    """Squares with a copy on `device`."""

    def __init__(self, squares: Squares, device: torch.device) -> None:
        super().__init__(squares.array)
        channels_first: Any = np.ascontiguousarray(squares.array.transpose(0, 3, 1, 2))
        self.pixels = torch.from_numpy(channels_first).to(device)  # (N, 3, S, S) uint8


def resident(prepared: Prepared, device: torch.device) -> Prepared:
    """Return the prepared images with their squares on the device."""
    assert isinstance(prepared.images, Squares)
    return dataclasses.replace(prepared, images=Resident(prepared.images, device))


def resident_where_it_fits(prepared: Prepared, device: torch.device) -> Prepared:
    """`resident` on a GPU with memory for it; packed images, large sets and a CPU's stay as they are."""
    if device.type != "cuda" or not isinstance(prepared.images, Squares):
        return prepared
    free, _ = torch.cuda.mem_get_info(device)
    return prepared if prepared.images.array.nbytes > SHARE * free else resident(prepared, device)


def workers_for(prepared: Prepared, requested: int) -> int:
    """Return the worker processes that render: none for images on a GPU, which are rendered there."""
    return 0 if isinstance(prepared.images, Resident) else requested
