"""Timing of the stages of a training step, and the peak memory of the process."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Milliseconds of each named stage, for every training step.

    On a CUDA device the time between two events of its stream, read when the step ends, so that no stage waits for
    the device.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.steps: list[dict[str, float]] = [{}]
        self._cuda = device is not None and device.type == "cuda"
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the body to `name` of the current step."""
        if self._cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
            return
        begun = time.perf_counter()
        yield
        self._add(name, 1e3 * (time.perf_counter() - begun))

    def _add(self, name: str, ms: float) -> None:
        now = self.steps[-1]
        now[name] = now.get(name, 0.0) + ms

    def next_step(self) -> None:
        """Close the current step."""
        if self._events:
            torch.cuda.synchronize()
        for name, start, end in self._events:
            self._add(name, start.elapsed_time(end))
        self._events.clear()
        self.steps.append({})


def peak_memory_mb() -> float:
    """Return the peak resident memory of this process so far, in MB."""
    import resource

    scale = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
