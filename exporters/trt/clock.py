"""A TensorRT session that tells the engine's own time of a call: CUDA events around it, the copies left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exporters.trt.session import Lane, TrtSession


class Timed:
    """Stands in for a lane's graph: replays it, or enqueues where there is none, between two events."""

    def __init__(self, torch: Any, stream: Any, play: Callable[[], None]) -> None:
        self._torch, self._stream, self._play = torch, stream, play
        self._spans: list[tuple[Any, Any]] = []

    def replay(self) -> None:
        """One run of the engine."""
        span = tuple(self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        span[0].record(self._stream)
        self._play()
        span[1].record(self._stream)
        self._spans.append((span[0], span[1]))

    def taken(self) -> float:
        """ms of the runs since the last question; the stream must have been waited for."""
        spans, self._spans = self._spans, []
        return float(sum(began.elapsed_time(ended) for began, ended in spans))


class ClockedSession(TrtSession):
    """`engine_ms()` after a `run`: what the GPU took for it; `run` itself waits for its logits."""

    def __init__(self, plan: Path) -> None:
        super().__init__(plan)
        self._timed: list[Timed] = []

    def _lane(self, batch: int) -> Lane:
        lane = super()._lane(batch)
        play = lane.graph.replay if lane.graph else lambda: self._enqueue(lane.context)
        self._timed.append(Timed(self._torch, self._stream, play))
        self._lanes[batch] = dataclasses.replace(lane, graph=self._timed[-1])
        return self._lanes[batch]

    def engine_ms(self) -> float:
        """ms on the GPU of the last call, the parts of a large batch together."""
        return sum(timed.taken() for timed in self._timed)
