"""Timing of the stages of a training step, and the peak memory of the process."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Milliseconds of each named stage, for every training step.

    On a CUDA device the time between two events of its stream, of one step in `every` (the others are {}): no
    stage and no step waits for the device.
    """

    def __init__(self, device: torch.device | None = None, every: int = 1) -> None:
        self._every = every
        self._steps: list[dict[str, float]] = [{}]
        self._cuda = device is not None and device.type == "cuda"
        self._events: list[tuple[int, str, torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def steps(self) -> list[dict[str, float]]:
        """Milliseconds by stage, a step each; waits for the device."""
        self.wait()
        return self._steps

    def wait(self) -> None:
        """Wait until the device has passed every stage."""
        if self._events:
            torch.cuda.synchronize()
            self._resolve()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the body to `name` of the current step."""
        step = len(self._steps) - 1
        if self._cuda and step % self._every:
            yield
            return
        if self._cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((step, name, start, end))
            return
        begun = time.perf_counter()
        yield
        self._add(step, name, 1e3 * (time.perf_counter() - begun))

    def _add(self, step: int, name: str, ms: float) -> None:
        times = self._steps[step]
        times[name] = times.get(name, 0.0) + ms

    def next_step(self) -> None:
        """Close the current step."""
        self._resolve()
        self._steps.append({})

    def _resolve(self) -> None:
        """Take the times of the events that the device has passed, without waiting for the others."""
        while self._events and self._events[0][3].query():
            step, name, start, end = self._events.pop(0)
            self._add(step, name, start.elapsed_time(end))


def peak_memory_mb() -> float:
    """Return the peak resident memory of this process so far, in MB."""
    import resource

    scale = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
