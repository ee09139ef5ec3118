"""Rows, views and labels of every training step, as functions of (seed, step)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.prepared import UNLABELLED, Prepared
from pipeline.distill.settings import Distill
from pipeline.training import seeds


@dataclass(frozen=True)
class Stream:
    """An endless order of rows, pass after pass, each pass a permutation: a function of (seed, name, position)."""

    rows: NDArray[np.int64]
    seed: int
    name: str

    def take(self, start: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows at positions start .. start + count, and the pass each belongs to."""
        passes, places = np.divmod(np.arange(start, start + count), len(self.rows))
        order = np.array(
            [
                _order(len(self.rows), self.seed, self.name, int(e))[p]
                for e, p in zip(passes, places, strict=True)
            ],
            dtype=np.int64,
        )
        return self.rows[order], passes


@lru_cache(maxsize=4)
def _order(n: int, seed: int, name: str, epoch: int) -> NDArray[np.int64]:
    return seeds.permutation(n, seed, name, epoch)


class Batches:
    """Which rows and views make the batch of a step, and which of them show a label (decision 17)."""

    def __init__(self, config: Distill, prepared: Prepared, distilled: bool, n_views: int) -> None:
        rows = prepared.rows("train")
        shown = rows[prepared.student_label[rows]]
        self.prepared, self.batch, self.n_views = prepared, config.batch, n_views
        self.steps = config.epochs * -(-len(rows) // config.batch)
        self.distilled = distilled
        self.labels_seen = len(shown)
        if not distilled:
            self.parts = [(Stream(shown, config.seed, "labelled"), config.batch, True)]
        elif len(shown) == len(rows):
            self.parts = [(Stream(rows, config.seed, "all"), config.batch, True)]
        else:
            share = max(config.labelled_share, len(shown) / len(rows))
            labelled = min(max(1, round(share * config.batch)), config.batch - 1)
            self.parts = [
                (Stream(shown, config.seed, "labelled"), labelled, True),
                (Stream(rows, config.seed, "all"), config.batch - labelled, False),
            ]

    def __call__(self, step: int) -> Chosen:
        """What makes the batch of a step; labels are -1 where the student is shown none.

        With a teacher the view is one of the V the store knows; without one every pass draws a fresh view.
        """
        rows, ks, labels = [], [], []
        for stream, count, with_label in self.parts:
            part, passes = stream.take(step * count, count)
            rows.append(part)
            ks.append(passes % self.n_views if self.distilled else passes)
            known = self.prepared.labels[part]
            labels.append(known if with_label else np.full_like(known, UNLABELLED))
        return Chosen(np.concatenate(rows), np.concatenate(ks), np.concatenate(labels))


@dataclass(frozen=True)
class Chosen:
    """Rows (B,), view numbers (B,) and labels (B,) of a step, or of a part of it."""

    rows: NDArray[np.int64]
    ks: NDArray[np.int64]
    labels: NDArray[np.int64]

    def part(self, number: int, of: int) -> Chosen:
        """Every `of`-th image from `number` on: labelled images are spread over the parts."""
        mine = slice(number, None, of)
        return Chosen(self.rows[mine], self.ks[mine], self.labels[mine])


@dataclass(frozen=True)
class Batch:
    """A part of one step: what was chosen, its views (B, 3, S, S) uint8, labelled images a part on average."""

    chosen: Chosen
    views: Tensor
    labelled: float
