"""Batches in order, made ahead by worker processes or when they are needed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.core.errors import UserError
from pipeline.data import views
from pipeline.distill.batches import Batch, Batches, Chosen
from pipeline.training import ranks, resume

SIGNAL_SECONDS = 1.0  # to wait for the signal that tells of a worker whose pipe has gone


class Feed(Dataset[list[Batch]]):
    """This rank's parts of every step, made ahead by `workers` processes, or here; the same bits either way."""

    def __init__(
        self,
        batches: Batches,
        geometry: views.Geometry,
        seed: int,
        workers: int,
        parts: int = 1,
        among: ranks.Ranks = ranks.ALONE,
    ) -> None:
        self.batches, self.geometry, self.seed, self.workers = batches, geometry, seed, workers
        self.parts, self.among = parts, among
        self._next = -1
        self._coming: Iterator[list[Batch] | UserError] = iter(())

    def chosen(self, step: int) -> list[Chosen]:
        """What makes this rank's parts of a step."""
        whole = self.batches(step)
        mine = range(self.among.rank, self.parts, self.among.size)
        return [whole.part(number, self.parts) for number in mine]

    def __getitem__(self, step: int) -> list[Batch]:
        labelled = float((self.batches(step).labels >= 0).sum()) / self.parts
        images = self.batches.prepared.images
        return [
            Batch(c, views.view_batch(images, self.geometry, self.seed, c.rows, c.ks), labelled)
            for c in self.chosen(step)
        ]

    def at(self, step: int) -> list[Batch]:
        """This rank's parts of a step; cheapest when asked in turn."""
        if self.workers == 0:
            return self[step]
        if step != self._next:
            self._coming = iter(self._loader(step))
        self._next = step + 1
        try:
            coming = next(self._coming)
        except (EOFError, OSError) as error:  # its end of a pipe or of a socket has gone
            if str(error).startswith("Caught"):
                raise
            with suppress(RuntimeError):  # torch's own word of it: taken here, not in a destructor
                time.sleep(SIGNAL_SECONDS)
            raise self._killed(error) from None
        if isinstance(coming, UserError):
            raise coming
        return coming

    def close(self) -> None:
        """Let the workers go."""
        self._coming, self._next = iter(()), -1

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Raise UserError where a worker dies: torch tells it by a signal, so anywhere in the body."""
        try:
            yield
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise self._killed(error) from None

    def _killed(self, error: Exception) -> UserError:
        found = f"{type(error).__name__}: {error}".splitlines()[0][:80]
        return UserError(
            f"distill.workers: one of {self.workers} was killed ({found}); free memory, or lower distill.workers "
            "or distill.batch, then run again to go on"
        )

    def _loader(self, start: int) -> DataLoader[Any]:
        return DataLoader(
            self,
            batch_size=None,
            sampler=range(start, max(start + 1, self.batches.steps)),
            num_workers=self.workers,
            collate_fn=_shared,
            worker_init_fn=resume.as_worker,
            generator=torch.Generator(),  # its own: the step's random numbers stay untouched
        )


def _shared(parts: list[Batch]) -> list[Batch] | UserError:
    """The views in shared memory, or why not. Left to the queue, a failure would be waited for without end."""
    try:
        for part in parts:
            part.views.share_memory_()
    except RuntimeError as error:
        return UserError(
            f"distill.workers: a worker found no shared memory ({str(error).splitlines()[0]}); enlarge /dev/shm "
            "(docker: --shm-size), or set distill.workers: 0, then run again to go on"
        )
    return parts
