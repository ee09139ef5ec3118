"""Rows, views and labels of every training step, as functions of (seed, step)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import UserError
from pipeline.data import views
from pipeline.data.prepared import UNLABELLED, Prepared
from pipeline.distill.settings import Distill
from pipeline.store.reading import record_numbers
from pipeline.training import seeds


@dataclass(frozen=True)
class Stream:
    """An endless order of rows, pass after pass, each pass a permutation: a function of (seed, name, position)."""

    rows: NDArray[np.int64]
    seed: int
    name: str

    def take(self, start: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows at positions start .. start + count, and the pass each belongs to."""
        n = len(self.rows)
        positions = np.arange(start, start + count)
        passes = positions // n
        first = int(passes[0])
        orders = [_order(n, self.seed, self.name, p) for p in range(first, int(passes[-1]) + 1)]
        return self.rows[np.concatenate(orders)[positions - first * n]], passes


@lru_cache(maxsize=4)
def _order(n: int, seed: int, name: str, epoch: int) -> NDArray[np.int64]:
    return seeds.permutation(n, seed, name, epoch)


@dataclass(frozen=True)
class BatchIndices:
    """The images of a step or of a micro-batch, the `fresh` ones first; every column is (B,).

    A fresh view is the student's alone; the others are cached views, for which the teacher's features exist.
    """

    fresh: int
    rows: NDArray[np.int64]
    view_numbers: NDArray[np.int64]
    labels: NDArray[np.int64]  # -1 where the student gets none
    partner_labels: NDArray[np.int64]  # of the image it is mixed with
    shares: NDArray[np.float32]  # of the label in a mixed view; 1 in one that is not
    records: NDArray[np.int64]  # of the store, and the keys of an image's random draws

    @property
    def mixed(self) -> bool:
        """Whether any view is mixed."""
        return bool((self.shares < 1).any())

    def part(self, number: int, of: int) -> BatchIndices:
        """Return every `of`-th image from `number` on, so that fresh views are spread over the micro-batches."""
        return self._take(slice(number, None, of), len(range(number, self.fresh, of)))

    @property
    def cached(self) -> BatchIndices:
        """The images in cached views."""
        return self._take(slice(self.fresh, None), 0)

    def _take(self, which: slice, fresh: int) -> BatchIndices:
        columns = {f.name: getattr(self, f.name)[which] for f in fields(self)[1:]}
        return BatchIndices(fresh, **columns)


@dataclass(frozen=True)
class _Part:
    """A stream's share of every batch."""

    stream: Stream
    count: int
    cached: bool
    labelled: bool


class Batches:
    """The rows and views of each step's batch, and which of them have a label (decision 17).

    A paired batch has a labelled part in fresh views, for the cross-entropy, and a part of all training images in
    cached views, for the distillation terms. Another batch is all labelled, in fresh views.
    Raises UserError: no labelled part where the cross-entropy needs one.
    """

    def __init__(
        self,
        config: Distill,
        prepared: Prepared,
        paired: bool,
        n_views: int,
        geometry: views.Geometry,
        seed: int,
    ) -> None:
        train = prepared.rows("train")
        labelled_rows = train[prepared.student_label[train]]
        self.prepared, self.train, self.n_views = prepared, train, n_views
        self.labelled_rows = labelled_rows
        self.geometry, self.seed = geometry, seed
        self.steps = config.step_count(len(train))
        self.labels_seen = len(labelled_rows)
        self._drawn: dict[int, BatchIndices] = {}
        fresh = _labelled_count(config) if paired else config.batch
        if paired and not fresh and len(labelled_rows) < len(train) and config.cross_entropy.weight:
            raise UserError(
                f"distill.labelled_share: got {config.labelled_share}, with {len(labelled_rows)} of {len(train)} "
                "images labelled; expected above 0; raise it, label all images, or set cross_entropy.weight: 0"
            )
        labelled = Stream(labelled_rows, config.seed, "labelled")
        every = Stream(train, config.seed, "all")
        parts = (
            _Part(labelled, fresh, cached=False, labelled=True),
            _Part(
                every, config.batch - fresh, cached=True, labelled=len(labelled_rows) == len(train)
            ),
        )
        self.parts = [part for part in parts if part.count]

    @property
    def cached(self) -> int:
        """Images of a batch in cached views."""
        return sum(part.count for part in self.parts if part.cached)

    def __call__(self, step: int) -> BatchIndices:
        """Draw the batch of a step, cached until the step after the next."""
        if step not in self._drawn:
            previous = {s: indices for s, indices in self._drawn.items() if s == step - 1}
            self._drawn = previous | {step: self._draw(step)}
        return self._drawn[step]

    def _draw(self, step: int) -> BatchIndices:
        columns = [self._draw_part(part, step) for part in self.parts]
        fresh = sum(part.count for part in self.parts) - self.cached
        return BatchIndices(fresh, *(np.concatenate(c) for c in zip(*columns, strict=True)))

    def _draw_part(self, part: _Part, step: int) -> tuple[NDArray[np.generic], ...]:
        """The columns of a part. A cached view is one of V; a fresh one is new at every pass."""
        rows, passes = part.stream.take(step * part.count, part.count)
        numbers = passes % self.n_views if part.cached else passes
        size = self.prepared.image_size
        mixed = views.mixed_with(self.geometry, self.seed, rows, numbers, part.stream.rows, size)
        shares = np.ones(len(rows), np.float32) if mixed is None else mixed.shares
        partners = rows if mixed is None else mixed.partners
        records = record_numbers(self.train, rows, numbers, self.n_views)
        labels, partner_labels = self._labels(part, rows), self._labels(part, partners)
        return rows, numbers, labels, partner_labels, shares, records

    def _labels(self, part: _Part, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The labels of these rows, UNLABELLED in a part without labels."""
        return self.prepared.labels[rows] if part.labelled else np.full(len(rows), UNLABELLED)


def _labelled_count(config: Distill) -> int:
    """Labelled images of a paired batch: the share, rounded, with at least two cached views left."""
    if not config.labelled_share:
        return 0
    return min(max(1, round(config.labelled_share * config.batch)), config.batch - 2)
