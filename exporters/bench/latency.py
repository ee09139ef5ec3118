"""The timing protocol: warm-up, blocks of real inputs, honest percentiles, a paired verdict. NumPy only.

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
from exporters.device.timing import MIN_CPU_SHARE, percentiles, significant

Array = NDArray[np.float32]
Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]

Block = timing.Block
MIN_BLOCKS = 5  # of which an interval of the median is drawn
DRAWS = 1000  # of a bootstrap over blocks


def summarise_calls(blocks: Sequence[Block], seed: int = 0) -> dict[str, Any]:
    """`wall_ms` {p50, p90, p99, min, n, p50_ci}, `cpu_ms` {p50}, `engine_ms` as wall_ms without p50_ci, or None.

    p90 from 100 calls on, p99 from 1,000, else None.
    """
    calls = Block.join(blocks)
    return {
        "wall_ms": {
            **percentiles(calls.wall_ms),
            "p50_ci": median_interval([block.wall_ms for block in blocks], seed),
        },
        "cpu_ms": {"p50": significant(np.median(calls.cpu_ms))},
        "engine_ms": percentiles(calls.engine_ms) if calls.engine_ms else None,
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


def row_flags(
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


def worst_verdict(verdicts: Iterable[Verdict]) -> Verdict:
    """FAIL before INCONCLUSIVE before PASS."""
    return min(verdicts, key=("FAIL", "INCONCLUSIVE", "PASS").index)


def tolerance(baseline_ms: float) -> float:
    """5 % from 5 ms on, 10 % below: the processes of a small net differ by several percent."""
    return 0.05 if baseline_ms >= 5 else 0.10


def paired_ratio(
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


def cpu_ratio(
    candidate: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]], seed: int = 0
) -> Ratio:
    """The paired ratio of CPU p50 beside the tolerance of the baseline's time: what the verdict is of."""
    tol = tolerance(float(np.median(np.array(baseline))))
    return Ratio(**vars(paired_ratio(candidate, baseline, seed)), tol=tol)
