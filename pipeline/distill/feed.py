"""Batches in order: views rendered ahead by worker processes or in this one, with the teacher's tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.data import views
from pipeline.data.resident import workers_for
from pipeline.distill.batches import Batches, BatchIndices
from pipeline.distill.features import Features
from pipeline.models.teacher import TeacherOutputs
from pipeline.training.ahead import Ahead
from pipeline.training.ranks import SINGLE_PROCESS, Ranks
from pipeline.training.stopwatch import Stopwatch


@dataclass(frozen=True)
class Batch:
    """One micro-batch of a step: the inputs of its losses."""

    indices: BatchIndices
    views: Tensor  # (B, 3, S, S) uint8
    labelled: float  # mean number of labelled images in a micro-batch of the step
    share: float  # cached views over the mean of the step's micro-batches; 1 without any
    teacher: TeacherOutputs | None = None  # of the cached views, behind the fresh ones

    def pin_memory(self) -> Batch:
        """Pin the views, as a data loader asks where there is a GPU."""
        return replace(self, views=self.views.pin_memory())


class Views(Dataset[list[Batch]]):
    """This rank's micro-batches of a step, without the teacher: a function of the step, in any process."""

    def __init__(
        self, batches: Batches, micro_batches: int = 1, ranks: Ranks = SINGLE_PROCESS
    ) -> None:
        self.batches, self.micro_batches, self.ranks = batches, micro_batches, ranks

    def indices(self, step: int) -> list[BatchIndices]:
        """Return the indices of each micro-batch of this rank."""
        whole = self.batches(step)
        mine = range(self.ranks.rank, self.micro_batches, self.ranks.size)
        return [whole.part(number, self.micro_batches) for number in mine]

    def __getitem__(self, step: int) -> list[Batch]:
        labelled = float((self.batches(step).labels >= 0).sum()) / self.micro_batches
        return [
            Batch(part, self._pixels(part), labelled, self._share(part))
            for part in self.indices(step)
        ]

    def _share(self, part: BatchIndices) -> float:
        cached = self.batches.cached
        return (len(part.rows) - part.fresh) * self.micro_batches / cached if cached else 1.0

    def _pixels(self, part: BatchIndices) -> Tensor:
        """Render the views; fresh ones are mixed with labelled images only, as their mixed label must be known."""
        batches = self.batches
        pools = (slice(part.fresh), batches.labelled_rows), (slice(part.fresh, None), batches.train)
        return torch.cat(
            [
                views.view_batch(
                    batches.prepared.images,
                    batches.geometry,
                    batches.seed,
                    part.rows[which],
                    part.view_numbers[which],
                    pool,
                )
                for which, pool in pools
                if len(part.rows[which])
            ]
        )


class Feed:
    """Micro-batches with the teacher's tokens; rendered by `workers` processes ahead; with 0 in this one."""

    def __init__(self, batches: Views, features: Features | None, workers: int) -> None:
        self.views, self.features = batches, features
        workers = workers_for(batches.batches.prepared, workers)
        self._ahead = Ahead(batches, batches.batches.steps, workers, "distill")

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        return self.views.batches.steps

    @property
    def labels_seen(self) -> int:
        """Training images whose label the student may use."""
        return self.views.batches.labels_seen

    def batches(self, step: int, timer: Stopwatch) -> Iterator[Batch]:
        """Yield this rank's micro-batches of a step; fastest when the steps are consecutive.

        Raises UserError: a worker that was killed, damaged records, views that are not the cached ones.
        """
        with timer.stage("view"):
            batches = self._ahead(step)
        for number, batch in enumerate(batches):
            if self.features is None:
                yield batch
                continue
            cached = batch.indices.cached
            tokens = self.features.tokens(step, cached, batch.views[batch.indices.fresh :], timer)
            self._prefetch(step, number)
            yield replace(batch, teacher=tokens)

    def _prefetch(self, step: int, number: int) -> None:
        """Start reading the records of the next micro-batch."""
        assert self.features is not None
        coming = self.views.indices(step)[number + 1 :]
        if not coming and step + 1 < self.steps:
            coming = self.views.indices(step + 1)
        if coming:
            self.features.prefetch(coming[0].cached)

    def close(self) -> None:
        """End the workers."""
        self._ahead.close()

    def watched(self) -> AbstractContextManager[None]:
        """Raise UserError where a worker dies."""
        return self._ahead.watched()
