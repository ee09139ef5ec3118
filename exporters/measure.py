"""Rows and verdicts: workers warmed up, blocks of all of them in shuffled rounds, one JSON row each.

Every row has its own process (`exporters.worker`), idle but for its blocks. Protocol: `pipeline.latency`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from exporters.session import Target
from exporters.worker import Worker, WorkerFailed, started
from pipeline import latency
from pipeline.device import conditions, usable_cores
from pipeline.errors import UserError

PROCESSES = 3  # a side, of a comparison
COMPARE_ROUNDS = 8
BESIDE = {".xml": (".bin",), ".onnx": (".onnx.data", ".onnx_data")}  # where the weights may lie
NO_FIGURES: dict[str, Any] = {
    "wall_ms": {"p50": None, "p90": None, "p99": None, "min": None, "n": 0},
    "cpu_ms": {"p50": None},
}


@dataclass(frozen=True)
class Subject:
    """What a row is about. `skip`: why there is nothing to run, where that is known beforehand."""

    model: str
    artefact: Path
    target: Target
    threads: int = 1
    skip: str | None = None


@dataclass
class Runner:
    """One worker of a subject and what it has told so far. `reason` is set when it can tell no more."""

    subject: Subject
    worker: Worker | None
    reason: str | None
    facts: dict[str, Any] = field(default_factory=dict)
    blocks: list[latency.Block] = field(default_factory=list)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The worker's answer; empty once it has failed, which is remembered, never raised."""
        if self.worker is None or self.reason is not None:
            return {}
        try:
            return self.worker.ask(do, **arguments)
        except WorkerFailed as failure:
            self.reason = str(failure)
            return {}

    def block(self, seconds: float) -> None:
        """Run and keep one block."""
        if answer := self.ask("block", seconds=seconds):
            self.blocks.append(latency.Block(**answer))


@contextmanager
def warmed(subjects: Sequence[Subject], reference: Path | None) -> Iterator[list[Runner]]:
    """A runner per subject, loaded and warmed up while the others idle; the processes end with the block."""
    with ExitStack() as stack:
        runners = []
        for subject in subjects:
            reason = subject.skip or _too_many_threads(subject)
            process = started(subject.artefact, subject.target, subject.threads, reference)
            runner = Runner(subject, None if reason else stack.enter_context(process), reason)
            runner.facts |= runner.ask("open")
            runner.facts |= runner.ask("warm_up")
            runners.append(runner)
        yield runners


def _too_many_threads(subject: Subject) -> str | None:
    cores = usable_cores()
    if subject.threads <= cores:
        return None
    return f"{subject.threads} threads asked for, {cores} cores usable"


def run_rounds(runners: Sequence[Runner], rounds: int, seconds: float, seed: int) -> None:
    """A block of `seconds` of every runner in each of the shuffled rounds."""
    for order in latency.schedule(len(runners), rounds, seed):
        for i in order:
            runners[i].block(seconds)


def measure(
    subjects: Sequence[Subject], rounds: int, seconds: float, seed: int, reference: Path | None
) -> list[dict[str, Any]]:
    """A row per subject, in their order, from `rounds` blocks of `seconds`; one that cannot run is a row too.

    reference: an .npz whose `x` holds the pictures to run; None: seeded smooth ones.
    """
    before = conditions()
    with warmed(subjects, reference) as runners:
        run_rounds(runners, rounds, seconds, seed)
        after = conditions()
        return [row([runner], before, after) for runner in runners]


def compare(
    candidate: Subject, baseline: Subject, seed: int, reference: Path | None
) -> dict[str, Any]:
    """Both interleaved, PROCESSES a side: rows, ratio of CPU p50, verdict; as long again when INCONCLUSIVE.

    Raises UserError: one of the two cannot run here.
    """
    before = conditions()
    with warmed([candidate, baseline] * PROCESSES, reference) as runners:
        _all_run(runners)
        rounds = 0
        for attempt in (seed, seed + 1):
            run_rounds(runners, COMPARE_ROUNDS, latency.BLOCK_SECONDS, attempt)
            _all_run(runners)
            rounds += COMPARE_ROUNDS
            sides = [
                [[float(np.median(b.cpu_ms)) for b in r.blocks] for r in runners[s::2]]
                for s in (0, 1)
            ]
            ratio = latency.compare(sides[0], sides[1], seed)
            if ratio.verdict != "INCONCLUSIVE":
                break
        after = conditions()
        return {
            "verdict": ratio.verdict,
            "ratio": vars(ratio),
            "rounds": rounds,
            "processes": PROCESSES,
            "process_spread": {"candidate": _spread(sides[0]), "baseline": _spread(sides[1])},
            "rows": [row(runners[0::2], before, after), row(runners[1::2], before, after)],
        }


def _all_run(runners: Sequence[Runner]) -> None:
    for runner in runners:
        if runner.reason:
            raise UserError(f"{runner.subject.artefact}: not comparable: {runner.reason}")


def _spread(side: Sequence[Sequence[float]]) -> float:
    """How far the processes of one side lie apart in CPU p50: slowest over fastest, less 1."""
    medians = np.median(np.array(side), axis=1)
    return round(float(medians.max() / medians.min() - 1), 4)


def row(runners: Sequence[Runner], before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The JSON row of one subject, measured by one process or several (figures of a process: the median)."""
    subject = runners[0].subject
    told = [runner.facts | runner.ask("describe") for runner in runners]
    reason = next((r.reason for r in runners if r.reason), None)
    calls = latency.Block.join([b for r in runners for b in r.blocks])
    measured = reason is None

    def median(name: str) -> float | None:
        return latency.significant(np.median([t[name] for t in told])) if measured else None

    summary = latency.summarise(calls) if measured else NO_FIGURES
    p50 = summary["wall_ms"]["p50"]
    batch = told[0].get("batch", 1)
    return {
        "model": subject.model,
        "artefact": subject.artefact.name,
        "target": subject.target.name,
        "runtime": told[0].get("runtime"),
        "threads": subject.threads,
        "batch": batch,
        "status": "measured" if measured else "skipped",
        "reason": reason,
        "precision_requested": subject.target.precision,
        "precision_effective": told[0].get("precision_effective"),
        **summary,
        "img_per_s": latency.significant(1e3 * batch / p50) if measured else None,
        "load_ms": median("load_ms"),
        "first_ms": median("first_ms"),
        "size_mb": size_mb(subject.artefact),
        "rss_mb": median("rss_mb"),
        "warm_up_seconds": median("seconds"),
        "flags": _flags(subject, calls, told, before, after) if measured else [],
        "conditions": after,
        "samples_ms": latency.thin(calls.wall_ms) if measured else [],
    }


def _flags(
    subject: Subject,
    calls: latency.Block,
    told: Sequence[dict[str, Any]],
    before: dict[str, Any],
    after: dict[str, Any],
) -> list[str]:
    return latency.flags(
        calls,
        stable=all(t["stable"] for t in told),
        threads=None if subject.target.runtime == "trt" else subject.threads,
        load=max((c["load_1m"] for c in (before, after) if c["load_1m"] is not None), default=None),
        cores=os.cpu_count() or 1,
        throttled=(after["throttled"] or 0) - (before["throttled"] or 0),
    )


def size_mb(artefact: Path) -> float | None:
    """Bytes of the artefact and of the weights beside it, in 1e6; None where there is no file."""
    beside = [artefact.with_suffix(suffix) for suffix in BESIDE.get(artefact.suffix, ())]
    sizes = [path.stat().st_size for path in (artefact, *beside) if path.is_file()]
    return latency.significant(sum(sizes) / 1e6) if sizes else None
