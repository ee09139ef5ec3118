"""Rows, views and labels of every training step, as functions of (seed, step)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

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
    """Of a step or of a part of it (B,): image rows, view numbers, labels (-1 for none), record numbers."""

    rows: NDArray[np.int64]
    view_numbers: NDArray[np.int64]
    labels: NDArray[np.int64]
    records: NDArray[np.int64]  # of the store, and the keys of an image's random draws

    def part(self, number: int, of: int) -> BatchIndices:
        """Every `of`-th image from `number` on: labelled images are spread over the parts."""
        mine = slice(number, None, of)
        columns = (self.rows, self.view_numbers, self.labels, self.records)
        return BatchIndices(*(column[mine] for column in columns))


class Batches:
    """Which rows and views make the batch of a step, and which of them show a label (decision 17)."""

    def __init__(self, config: Distill, prepared: Prepared, distilled: bool, n_views: int) -> None:
        rows = prepared.rows("train")
        shown = rows[prepared.student_label[rows]]
        self.prepared, self.train, self.n_views = prepared, rows, n_views
        self.steps = config.epochs * -(-len(rows) // config.batch)
        self.distilled = distilled
        self.labels_seen = len(shown)
        self._drawn: dict[int, BatchIndices] = {}
        if not distilled:
            self.streams = [(Stream(shown, config.seed, "labelled"), config.batch, True)]
        elif len(shown) == len(rows):
            self.streams = [(Stream(rows, config.seed, "all"), config.batch, True)]
        else:
            share = max(config.labelled_share, len(shown) / len(rows))
            labelled = min(max(1, round(share * config.batch)), config.batch - 1)
            self.streams = [
                (Stream(shown, config.seed, "labelled"), labelled, True),
                (Stream(rows, config.seed, "all"), config.batch - labelled, False),
            ]

    def __call__(self, step: int) -> BatchIndices:
        """The batch of a step, drawn once: kept until the step after the next is asked for."""
        if step not in self._drawn:
            kept = {s: indices for s, indices in self._drawn.items() if s == step - 1}
            self._drawn = kept | {step: self._draw(step)}
        return self._drawn[step]

    def _draw(self, step: int) -> BatchIndices:
        """With a teacher the view is one of the V the store knows; without one every pass draws a fresh view."""
        drawn = [stream.take(step * count, count) for stream, count, _ in self.streams]
        rows, passes = (np.concatenate(column) for column in zip(*drawn, strict=True))
        shown = np.concatenate(
            [np.full(count, with_label) for _, count, with_label in self.streams]
        )
        labels = np.where(shown, self.prepared.labels[rows], UNLABELLED)
        numbers = passes % self.n_views if self.distilled else passes
        records = record_numbers(self.train, rows, numbers, self.n_views)
        return BatchIndices(rows, numbers, labels, records)
