"""The teacher's tokens of a batch, read from the feature store or computed by the live teacher."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data import views
from pipeline.distill.batches import Batch, Chosen
from pipeline.models import teacher
from pipeline.store.reading import Store
from pipeline.training import stopwatch


class Features:
    """The teacher's tokens of a batch: from the store and its replayed block, or from the live teacher."""

    CHECK_EVERY = 1000  # records between two whose view is held against the stored hash

    def __init__(self, opened: Store, teacher_path: Path, place: torch.device) -> None:
        self.store, self.place = opened, place
        self.live = None if opened.cached else teacher.load(teacher_path).to(place)
        replays = opened.cached and opened.replayed
        self.tail = teacher.load_tail(teacher_path).to(place) if replays else None
        self._checked = False

    def tokens(self, step: int, batch: Batch, watch: stopwatch.Stopwatch) -> teacher.Tokens:
        """Tokens of the batch. Raises UserError: damaged records, or views that are not the cached ones."""
        if self.live is not None:
            with watch.stage("replay"):
                return self.live(batch.views.to(self.place))  # type: ignore[no-any-return]
        with watch.stage("read"):
            found = self.store.read(self.store.records(batch.chosen.rows, batch.chosen.ks))
            self._check(step, batch, found.view_hash)
        with watch.stage("replay"):
            return found.to(self.place).tokens(self.tail)

    def prefetch(self, chosen: Chosen) -> None:
        """Let the store read what comes next."""
        if self.live is None:
            self.store.prefetch(self.store.records(chosen.rows, chosen.ks))

    def _check(self, step: int, batch: Batch, hashes: NDArray[np.uint64]) -> None:
        """Every view of the first batch, then one record in CHECK_EVERY."""
        seen = step * len(hashes) + np.arange(len(hashes))
        chosen = np.flatnonzero(seen % self.CHECK_EVERY == 0 if self._checked else seen >= 0)
        self._checked = True
        if len(chosen):
            views.check_hashes(batch.views[chosen], hashes[chosen], batch.chosen.rows[chosen])
