"""The timing protocol: warm-up until stable, several inputs in turn, percentiles only of enough calls."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK_SECONDS = 0.15
WARM_UP_SECONDS = 2.0
WARM_UP_AGREEMENT = 0.03  # three block medians within this share of each other
# Fewer calls leave less than ten beyond the percentile, too few to estimate it.
MIN_CALLS_P90, MIN_CALLS_P99 = 100, 1000
MIN_INPUTS = 4
MIN_BLOCKS = 5  # fewer do not give a bootstrap interval of the median
DRAWS = 1000  # of the bootstrap over blocks
MIN_CPU_SHARE = 0.9  # CPU over wall time below which other work disturbed a single thread


@dataclass(frozen=True)
class Block:
    """Calls timed one by one, in ms: wall and process-CPU time of each, and on a GPU the engine's own."""

    wall_ms: list[float]
    cpu_ms: list[float]
    engine_ms: list[float] = field(default_factory=list)  # empty off the GPU

    @classmethod
    def join(cls, blocks: Sequence[Block]) -> Block:
        """All calls of several blocks, in their order."""
        return cls(
            [ms for block in blocks for ms in block.wall_ms],
            [ms for block in blocks for ms in block.cpu_ms],
            [ms for block in blocks for ms in block.engine_ms],
        )


@dataclass(frozen=True)
class WarmUp:
    """Duration of the warm-up, and whether it ended because the medians agreed."""

    seconds: float
    stable: bool


def cycle_inputs(inputs: Sequence[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
    """The inputs in an endless cycle, so that no cache serves the same image twice in a row.

    Raises ValueError: fewer than MIN_INPUTS.
    """
    if len(inputs) < MIN_INPUTS:
        raise ValueError(f"got {len(inputs)} input buffers; expected {MIN_INPUTS} or more")
    return itertools.cycle(inputs)


def batched_inputs(x: NDArray[np.float32], size: int) -> list[NDArray[np.float32]]:
    """x (N, 3, H, W) -> at least MIN_INPUTS batches of `size` images, which repeat where N is too small."""
    rows = np.arange(size * max(MIN_INPUTS, len(x) // size)) % len(x)
    return [np.ascontiguousarray(x[r]) for r in rows.reshape(-1, size)]


def run_block(
    run: Callable[[NDArray[np.float32]], object],
    inputs: Iterator[NDArray[np.float32]],
    seconds: float = BLOCK_SECONDS,
    engine: Callable[[], float] | None = None,
) -> Block:
    """Time calls of `run(x)`, with its copies in and out, for `seconds`, at least one.

    engine: returns the device time in ms since its last call, by the device's own clock.
    """
    block = Block([], [])
    if engine is not None:
        engine()  # discards the time of the runs before this block
    end = time.perf_counter() + seconds
    while not block.wall_ms or time.perf_counter() < end:
        x = next(inputs)
        cpu, wall = time.process_time_ns(), time.perf_counter_ns()
        run(x)
        wall, cpu = time.perf_counter_ns() - wall, time.process_time_ns() - cpu
        block.wall_ms.append(wall / 1e6)
        block.cpu_ms.append(cpu / 1e6)
        if engine is not None:
            block.engine_ms.append(engine())
    return block


def warm_up(
    run: Callable[[NDArray[np.float32]], object],
    inputs: Iterator[NDArray[np.float32]],
    limit: float | None = None,
    engine: Callable[[], float] | None = None,
) -> WarmUp:
    """Run blocks until three wall medians in a row agree within 3 %, or for `limit` seconds (default 2)."""
    limit = WARM_UP_SECONDS if limit is None else limit
    began = time.perf_counter()
    medians: list[float] = []
    while True:
        medians.append(float(np.median(run_block(run, inputs, engine=engine).wall_ms)))
        seconds = time.perf_counter() - began
        last = medians[-3:]
        if len(last) == 3 and max(last) <= (1 + WARM_UP_AGREEMENT) * min(last):
            return WarmUp(seconds, True)
        if len(last) == 3 and seconds >= limit:
            return WarmUp(seconds, False)


def time_calls(
    run: Callable[[NDArray[np.float32]], object],
    inputs: Sequence[NDArray[np.float32]],
    seconds: float,
) -> dict[str, Any]:
    """Warm up, then time calls for `seconds`: `wall_ms`, `cpu_ms`, `cpu_share` of wall time, `warm_up`.

    Raises ValueError: fewer than four inputs.
    """
    cycle = cycle_inputs(inputs)
    warm = warm_up(run, cycle)
    block = run_block(run, cycle, seconds)
    return {
        "wall_ms": percentiles(block.wall_ms),
        "cpu_ms": {"p50": significant(float(np.median(block.cpu_ms)))},
        "cpu_share": significant(sum(block.cpu_ms) / sum(block.wall_ms)),
        "warm_up": {"seconds": round(warm.seconds, 3), "stable": warm.stable},
    }


def percentiles(milliseconds: Sequence[float]) -> dict[str, Any]:
    """Milliseconds per call -> p50, p90 from 100 calls on, p99 from 1,000, else None; min, n."""
    values = np.array(milliseconds)

    def percentile(q: int, min_calls: int) -> float | None:
        return significant(float(np.percentile(values, q))) if len(values) >= min_calls else None

    return {
        "p50": percentile(50, 1),
        "p90": percentile(90, MIN_CALLS_P90),
        "p99": percentile(99, MIN_CALLS_P99),
        "min": significant(float(values.min())),
        "n": len(values),
    }


def median_interval(blocks: Sequence[Sequence[float]], seed: int = 0) -> list[float] | None:
    """[low, high]: bootstrap 95 % interval of the median of all calls; None below MIN_BLOCKS blocks.

    Whole blocks are drawn: calls of one block share its disturbance and are not independent.
    """
    if len(blocks) < MIN_BLOCKS:
        return None
    values = np.concatenate([np.asarray(block) for block in blocks])
    of_block = np.repeat(np.arange(len(blocks)), [len(block) for block in blocks])
    order = np.argsort(values, kind="stable")
    values, of_block = values[order], of_block[order]
    generator = np.random.default_rng(seed)
    medians = []
    for _ in range(DRAWS):
        draw = generator.integers(len(blocks), size=len(blocks))
        # The weighted median of the sorted calls: a block drawn twice counts its calls twice.
        weights = np.cumsum(np.bincount(draw, minlength=len(blocks))[of_block])
        medians.append(values[np.searchsorted(weights, weights[-1] / 2)])
    return [significant(bound) for bound in np.percentile(medians, [2.5, 97.5])]


def schedule(runners: int, rounds: int, seed: int = 0) -> list[list[int]]:
    """`rounds` shuffled orders of the runners' indices, so that a drift of the machine affects all alike."""
    generator = np.random.default_rng(seed)
    return [generator.permutation(runners).tolist() for _ in range(rounds)]


def noise_flags(cpu_share: float, stable: bool, threads: int | None) -> list[str]:
    """Reasons why a row is noisy; `threads` is None where the work is not on the CPU."""
    reasons = []
    if threads == 1 and cpu_share < MIN_CPU_SHARE:
        reasons.append(f"cpu/wall {cpu_share:.2f} below {MIN_CPU_SHARE}")
    if not stable:
        reasons.append("warm-up not stable")
    return reasons


def significant(value: float) -> float:
    """Round to 4 significant digits, more than any of these measurements is precise to."""
    return float(f"{value:.4g}")
