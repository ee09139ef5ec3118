"""The timing protocol: warm-up, blocks of real inputs, honest percentiles, a paired verdict. NumPy only.

A machine shared with others makes unpaired wall times differ by tens of percent; the ratio of process-CPU
times, taken between blocks that ran next to each other, stays within a few (docs/latency.md).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]

BLOCK_SECONDS = 0.15
WARM_UP_SECONDS = 2.0
WARM_UP_AGREEMENT = 0.03  # three block medians within this share of each other
MIN_INPUTS = 4
MIN_CPU_SHARE = 0.9  # CPU over wall time below which one thread was disturbed
MIN_BLOCKS = 5  # of which an interval of the median is drawn
DRAWS = 1000  # of a bootstrap over blocks


@dataclass(frozen=True)
class Block:
    """Calls timed one by one: wall and process-CPU time of each, and the engine's own on a GPU, in ms."""

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
    """How long the warm-up took, and whether it ended because the medians agreed."""

    seconds: float
    stable: bool


def turns(inputs: Sequence[Array]) -> Iterator[Array]:
    """The inputs round and round, so that no cache serves the same picture twice running.

    Raises ValueError: fewer than MIN_INPUTS.
    """
    if len(inputs) < MIN_INPUTS:
        raise ValueError(f"{len(inputs)} input buffers; at least {MIN_INPUTS} are needed")
    return itertools.cycle(inputs)


def run_block(
    run: Callable[[Array], object],
    inputs: Iterator[Array],
    seconds: float = BLOCK_SECONDS,
    engine: Callable[[], float] | None = None,
) -> Block:
    """Time `run(x)` over and over for `seconds`, once at least. What `run` copies in and out is included.

    engine: gives the ms that the device took since it was last asked, by its own clock.
    """
    block = Block([], [])
    if engine is not None:
        engine()  # what ran before is not of this block
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
    run: Callable[[Array], object],
    inputs: Iterator[Array],
    limit: float = WARM_UP_SECONDS,
    engine: Callable[[], float] | None = None,
) -> WarmUp:
    """Run blocks until three wall medians in a row agree within 3 %, or `limit` seconds have passed."""
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


def summarise(blocks: Sequence[Block], seed: int = 0) -> dict[str, Any]:
    """`wall_ms` {p50, p90, p99, min, n, p50_ci}, `cpu_ms` {p50}, `engine_ms` as wall_ms without p50_ci, or None.

    p90 from 100 calls on, p99 from 1,000, else None.
    """
    calls = Block.join(blocks)
    return {
        "wall_ms": {
            **_percentiles(calls.wall_ms),
            "p50_ci": median_interval([block.wall_ms for block in blocks], seed),
        },
        "cpu_ms": {"p50": significant(np.median(calls.cpu_ms))},
        "engine_ms": _percentiles(calls.engine_ms) if calls.engine_ms else None,
    }


def _percentiles(milliseconds: Sequence[float]) -> dict[str, Any]:
    values = np.array(milliseconds)

    def percentile(q: int, least: int) -> float | None:
        return significant(np.percentile(values, q)) if len(values) >= least else None

    return {
        "p50": percentile(50, 1),
        "p90": percentile(90, 100),
        "p99": percentile(99, 1000),
        "min": significant(values.min()),
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
        drawn = np.bincount(
            generator.integers(len(blocks), size=len(blocks)), minlength=len(blocks)
        )
        reached = np.cumsum(drawn[of_block])
        medians.append(values[np.searchsorted(reached, reached[-1] / 2)])
    return [significant(bound) for bound in np.percentile(medians, [2.5, 97.5])]


def significant(value: float, digits: int = 4) -> float:
    """Rounded to so many significant digits, more than any of these figures carries."""
    return float(f"{value:.{digits}g}")


def flags(
    calls: Block,
    *,
    stable: bool,
    threads: int | None,
    load: float | None,
    cores: int,
    throttled: int = 0,
) -> list[str]:
    """Why a row is NOISY: that word first, then the reasons; empty for a quiet row.

    threads: None where the work is not on the CPU; load: the host's load average, beside its `cores`;
    throttled: periods in which the CPU quota stopped us.
    """
    reasons = []
    share = sum(calls.cpu_ms) / sum(calls.wall_ms)
    if threads == 1 and share < MIN_CPU_SHARE:
        reasons.append(f"cpu/wall {share:.2f} below {MIN_CPU_SHARE}")
    if load is not None and load > cores:
        reasons.append(f"load {load:.1f} above {cores} cores")
    if throttled:
        reasons.append(f"stopped {throttled} times by the CPU quota")
    if not stable:
        reasons.append("warm-up unstable")
    return ["NOISY", *reasons] if reasons else []


def schedule(runners: int, rounds: int, seed: int = 0) -> list[list[int]]:
    """`rounds` orders of the numbers of `runners`, each shuffled: whom to run when, so that drift hits all."""
    generator = np.random.default_rng(seed)
    return [generator.permutation(runners).tolist() for _ in range(rounds)]


@dataclass(frozen=True)
class Interval:
    """Candidate over baseline: median of the rounds, bootstrap 95 % interval."""

    median: float
    ci_low: float
    ci_high: float


@dataclass(frozen=True)
class Ratio(Interval):
    """An interval beside the slow-down tolerated."""

    tol: float

    @property
    def verdict(self) -> Verdict:
        """FAIL only if the whole interval lies above 1 + tol, PASS only if it lies below."""
        if self.ci_low > 1 + self.tol:
            return "FAIL"
        return "PASS" if self.ci_high < 1 + self.tol else "INCONCLUSIVE"


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """FAIL before INCONCLUSIVE before PASS."""
    return min(verdicts, key=("FAIL", "INCONCLUSIVE", "PASS").index)


def tolerance(baseline_ms: float) -> float:
    """5 % from 5 ms on, 10 % below: the processes of a small net differ by several percent among themselves."""
    return 0.05 if baseline_ms >= 5 else 0.10


def paired(
    candidate: Sequence[Sequence[float]],
    baseline: Sequence[Sequence[float]],
    seed: int = 0,
    draws: int = 4000,
) -> Interval:
    """p50 of each process and round, (processes, rounds) a side -> the ratio, paired round by round.

    The ratio of a round is that of the sides' medians over processes. The bootstrap draws rounds and, on each
    side, processes again: two processes of one artefact differ, and more rounds do not tell that apart from
    a difference between the artefacts.
    """
    a, b = np.array(candidate), np.array(baseline)
    generator = np.random.default_rng(seed)
    rounds = generator.integers(a.shape[1], size=(draws, 1, a.shape[1]))
    side = [generator.integers(len(x), size=(draws, len(x), 1)) for x in (a, b)]
    drawn = np.median(a[side[0], rounds], axis=1) / np.median(b[side[1], rounds], axis=1)
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    middle = np.median(np.median(a, axis=0) / np.median(b, axis=0))
    return Interval(round(float(middle), 4), round(float(low), 4), round(float(high), 4))


def compare(
    candidate: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]], seed: int = 0
) -> Ratio:
    """The paired ratio of CPU p50 beside the tolerance of the baseline's time: what the verdict is of."""
    tol = tolerance(float(np.median(np.array(baseline))))
    return Ratio(**vars(paired(candidate, baseline, seed)), tol=tol)
