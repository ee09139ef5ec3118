"""Latency by the protocol of the project: warm-up until it is stable, real inputs in turn, honest percentiles."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK_SECONDS = 0.15
WARM_UP_SECONDS = 2.0
AGREEMENT = 0.03  # three block medians within this share of each other end the warm-up
P90_FROM, P99_FROM = 100, 1000  # calls below which the tail is not known
MIN_INPUTS = 4
MIN_CPU_SHARE = 0.9  # CPU over wall time below which one thread was disturbed


def measure(
    run: Callable[[NDArray[np.float32]], object],
    inputs: Sequence[NDArray[np.float32]],
    seconds: float,
) -> dict[str, Any]:
    """Warm up, then time calls for `seconds`: `wall_ms`, `cpu_ms`, `cpu_share` of wall time, `warm_up`.

    The copies in and out that `run` makes are part of a call. Raises ValueError: fewer than four inputs.
    """
    if len(inputs) < MIN_INPUTS:
        raise ValueError(f"{len(inputs)} input buffers; at least {MIN_INPUTS} are needed")
    turns = itertools.cycle(inputs)
    began = time.perf_counter()
    medians: list[float] = []
    stable = False
    while not stable and (len(medians) < 3 or time.perf_counter() - began < WARM_UP_SECONDS):
        medians.append(float(np.median(_block(run, turns, BLOCK_SECONDS)[0])))
        last = medians[-3:]
        stable = len(last) == 3 and max(last) <= (1 + AGREEMENT) * min(last)
    warm = time.perf_counter() - began
    wall, cpu = _block(run, turns, seconds)
    return {**summarise(wall, cpu), "warm_up": {"seconds": round(warm, 3), "stable": stable}}


def _block(
    run: Callable[[NDArray[np.float32]], object],
    turns: Iterator[NDArray[np.float32]],
    seconds: float,
) -> tuple[list[float], list[float]]:
    """Calls for `seconds`, one at least: ms of wall and of process-CPU time of each."""
    wall_ms: list[float] = []
    cpu_ms: list[float] = []
    end = time.perf_counter() + seconds
    while not wall_ms or time.perf_counter() < end:
        x = next(turns)
        cpu, wall = time.process_time_ns(), time.perf_counter_ns()
        run(x)
        wall, cpu = time.perf_counter_ns() - wall, time.process_time_ns() - cpu
        wall_ms.append(wall / 1e6)
        cpu_ms.append(cpu / 1e6)
    return wall_ms, cpu_ms


def summarise(wall: Sequence[float], cpu: Sequence[float]) -> dict[str, Any]:
    """ms of each call -> percentiles; p90 from 100 calls on, p99 from 1,000, else None."""

    def percentile(q: int, least: int) -> float | None:
        return significant(float(np.percentile(wall, q))) if len(wall) >= least else None

    return {
        "wall_ms": {
            "p50": percentile(50, 1),
            "p90": percentile(90, P90_FROM),
            "p99": percentile(99, P99_FROM),
            "min": significant(min(wall)),
            "n": len(wall),
        },
        "cpu_ms": {"p50": significant(float(np.median(cpu)))},
        "cpu_share": significant(sum(cpu) / sum(wall)),
    }


def flags(found: dict[str, Any], threads: int | None) -> list[str]:
    """Why a row is noisy; `threads` is None where the work is not on the CPU."""
    reasons = []
    if threads == 1 and found["cpu_share"] < MIN_CPU_SHARE:
        reasons.append(f"cpu/wall {found['cpu_share']:.2f} below {MIN_CPU_SHARE}")
    if not found["warm_up"]["stable"]:
        reasons.append("warm-up not stable")
    return reasons


def significant(value: float) -> float:
    """Rounded to 4 significant digits, more than any of these figures carries."""
    return float(f"{value:.4g}")
