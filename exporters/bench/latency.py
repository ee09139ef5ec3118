"""Statistics of timed blocks: percentiles, intervals, noise flags, and the paired verdict. NumPy only.

A machine shared with others makes unpaired wall times differ by tens of percent; the ratio of process-CPU
times, taken between blocks that ran next to each other, stays within a few (docs/latency.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from exporters.device import timing
from exporters.device.timing import median_interval, noise_flags, percentiles, significant

Array = NDArray[np.float32]
Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]

Block = timing.Block


def summarise_calls(blocks: Sequence[Block], seed: int = 0) -> dict[str, Any]:
    """`wall_ms` {p50, p90, p99, min, n, p50_ci}, `cpu_ms` {p50}, `engine_ms` {p50, ..., n} or None."""
    calls = Block.join(blocks)
    return {
        "wall_ms": {
            **percentiles(calls.wall_ms),
            "p50_ci": median_interval([block.wall_ms for block in blocks], seed),
        },
        "cpu_ms": {"p50": significant(np.median(calls.cpu_ms))},
        "engine_ms": percentiles(calls.engine_ms) if calls.engine_ms else None,
    }


def row_flags(
    calls: Block,
    *,
    stable: bool,
    threads: int | None,
    load: float | None,
    cores: int,
    throttled: int = 0,
) -> list[str]:
    """`NOISY` and the reasons; empty for a quiet row.

    threads: None where the work is not on the CPU; load: the host's load average, compared with its `cores`;
    throttled: periods in which the CPU quota stopped the process.
    """
    reasons = noise_flags(sum(calls.cpu_ms) / sum(calls.wall_ms), stable, threads)
    if load is not None and load > cores:
        reasons.append(f"load {load:.1f} above {cores} cores")
    if throttled:
        reasons.append(f"stopped {throttled} times by the CPU quota")
    return ["NOISY", *reasons] if reasons else []


@dataclass(frozen=True)
class Interval:
    """Candidate over baseline: median over the rounds with its bootstrap 95 % interval."""

    median: float
    ci_low: float
    ci_high: float


@dataclass(frozen=True)
class Ratio(Interval):
    """An interval with the tolerated slow-down."""

    tol: float

    @property
    def verdict(self) -> Verdict:
        """FAIL only if the whole interval lies above 1 + tol, PASS only if it lies below."""
        if self.ci_low > 1 + self.tol:
            return "FAIL"
        return "PASS" if self.ci_high < 1 + self.tol else "INCONCLUSIVE"


def worst_verdict(verdicts: Iterable[Verdict]) -> Verdict:
    """FAIL before INCONCLUSIVE before PASS."""
    return min(verdicts, key=("FAIL", "INCONCLUSIVE", "PASS").index)


def tolerance(baseline_ms: float) -> float:
    """The tolerated slow-down: 5 % from 5 ms on, 10 % below, where processes differ by several percent."""
    return 0.05 if baseline_ms >= 5 else 0.10


def paired_ratio(
    candidate: Sequence[Sequence[float]],
    baseline: Sequence[Sequence[float]],
    seed: int = 0,
    draws: int = 4000,
) -> Interval:
    """p50 per process and round, (processes, rounds) a side -> the ratio, paired round by round.

    The ratio of a round is that of the sides' medians over processes.
    """
    a, b = np.array(candidate), np.array(baseline)
    generator = np.random.default_rng(seed)
    # The bootstrap draws rounds and, on each side, processes: two processes of one artefact differ, and more
    # rounds cannot tell that from a difference between the artefacts.
    rounds = generator.integers(a.shape[1], size=(draws, 1, a.shape[1]))
    side = [generator.integers(len(x), size=(draws, len(x), 1)) for x in (a, b)]
    ratios = np.median(a[side[0], rounds], axis=1) / np.median(b[side[1], rounds], axis=1)
    low, high = np.percentile(np.median(ratios, axis=1), [2.5, 97.5])
    middle = np.median(np.median(a, axis=0) / np.median(b, axis=0))
    return Interval(round(float(middle), 4), round(float(low), 4), round(float(high), 4))


def cpu_ratio(
    candidate: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]], seed: int = 0
) -> Ratio:
    """The paired ratio of CPU p50, with the tolerance for the baseline's time."""
    tol = tolerance(float(np.median(np.array(baseline))))
    return Ratio(**vars(paired_ratio(candidate, baseline, seed)), tol=tol)
