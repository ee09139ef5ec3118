"""Batches of consecutive steps, made ahead by worker processes or, without any, in this one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.core.errors import UserError
from pipeline.training import resume

SIGNAL_SECONDS = 1.0  # wait for torch's signal handler after a worker's pipe has closed


class HasViews(Protocol):
    """A batch with rendered views."""

    @property
    def views(self) -> Tensor:
        """(B, 3, S, S) uint8."""


B = TypeVar("B", bound=HasViews)


class Ahead(Generic[B]):
    """The batches `source[step]`, a function of the step in any process, made by `workers` processes ahead.

    section: of params.yaml, whose `workers` and `batch` the messages name.
    """

    def __init__(self, source: Dataset[list[B]], steps: int, workers: int, section: str) -> None:
        self.source, self.steps, self.workers, self.section = source, steps, workers, section
        self._next = -1
        self._ahead: Iterator[list[B] | UserError] = iter(())

    def __call__(self, step: int) -> list[B]:
        """Return the batches of a step; fastest when the steps are consecutive.

        Raises UserError: a worker that was killed, or without shared memory.
        """
        if self.workers == 0:
            return self.source[step]
        if step != self._next:
            self._ahead = iter(self._loader(step))
        self._next = step + 1
        try:
            batches = next(self._ahead)
        except (EOFError, OSError) as error:  # the worker's end of a pipe or socket has closed
            if str(error).startswith("Caught"):
                raise
            # Raised by torch's signal handler: here, not in a destructor.
            with suppress(RuntimeError):
                time.sleep(SIGNAL_SECONDS)
            raise self._killed(error) from None
        if isinstance(batches, UserError):
            raise batches
        return batches

    def close(self) -> None:
        """End the workers."""
        self._ahead, self._next = iter(()), -1

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Raise UserError where a worker dies: torch raises in a signal handler, so anywhere in the body."""
        try:
            yield
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise self._killed(error) from None

    def _killed(self, error: Exception) -> UserError:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:80]
        name = self.section
        return UserError(
            f"{name}.workers: one of {self.workers} was killed ({reason}); free memory, or lower {name}.workers "
            f"or {name}.batch, then run again to go on"
        )

    def _loader(self, start: int) -> DataLoader[Any]:
        return DataLoader(
            self.source,
            batch_size=None,
            sampler=range(start, max(start + 1, self.steps)),
            num_workers=self.workers,
            collate_fn=partial(_shared, section=self.section),
            worker_init_fn=resume.as_worker,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its own: the step's random numbers stay untouched
        )


def _shared(batches: Sequence[B], section: str) -> Sequence[B] | UserError:
    """Move the views to shared memory, or return the error: raised in the queue, it would hang the training."""
    try:
        for batch in batches:
            batch.views.share_memory_()
    except RuntimeError as error:
        return UserError(
            f"{section}.workers: no shared memory for a worker ({str(error).splitlines()[0]}); enlarge /dev/shm "
            f"(docker: --shm-size), or set {section}.workers: 0, then run again to go on"
        )
    return batches
