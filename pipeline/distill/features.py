"""The teacher's tokens of a batch, read from the feature store or computed by the live teacher."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data import views
from pipeline.distill.batches import BatchIndices
from pipeline.models import teacher
from pipeline.store.reading import Store
from pipeline.training.stopwatch import Stopwatch


class Features:
    """The teacher's outputs of a batch: from the store and its replayed block, or from the live teacher."""

    CHECK_EVERY = 1000  # one view in so many is compared with its stored hash

    def __init__(
        self,
        store: Store,
        teacher_path: Path,
        device: torch.device,
        layer: teacher.Layer,
        attention: bool = True,
    ) -> None:
        self.store, self.device = store, device
        self.live = None if store.cached else teacher.load(teacher_path).to(device)
        replays = store.cached and store.replayed
        self.tail = teacher.load_tail(teacher_path).to(device) if replays else None
        for network in (self.live, self.tail):
            if network is not None:
                network.read_at(layer, attention)
        self._checked = False

    def tokens(
        self, step: int, indices: BatchIndices, pixels: Tensor, timer: Stopwatch
    ) -> teacher.TeacherOutputs:
        """Return the teacher's outputs for these views, pixels (B, 3, S, S) uint8.

        Raises UserError: damaged records, or views that are not the cached ones.
        """
        if self.live is not None:
            with timer.stage("replay"):
                return self.live(pixels.to(self.device, non_blocking=True))  # type: ignore[no-any-return]
        with timer.stage("read"):
            records = self.store.read(indices.records, self.device)
            self._check(step, indices.rows, pixels, records.view_hash)
        with timer.stage("replay"):
            return records.tokens(self.tail)

    def prefetch(self, indices: BatchIndices) -> None:
        """Start reading the records of the next micro-batch."""
        if self.live is None:
            self.store.prefetch(indices.records)

    def _check(
        self, step: int, rows: NDArray[np.int64], pixels: Tensor, hashes: NDArray[np.uint64]
    ) -> None:
        """Compare every view of the first batch, then one in CHECK_EVERY, with its stored hash."""
        position = step * len(hashes) + np.arange(len(hashes))
        due = np.flatnonzero(position % self.CHECK_EVERY == 0 if self._checked else position >= 0)
        self._checked = True
        if len(due):
            views.check_hashes(pixels[due], hashes[due], rows[due])
