"""Measurement of rows: warmed-up workers, their blocks in shuffled rounds, one JSON row each.

Every row has its own process (`exporters.bench.worker`), which idles between its blocks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from exporters.artifact import counts
from exporters.artifact.placement import unplaced
from exporters.artifact.session import Target
from exporters.bench import latency
from exporters.bench.conditions import conditions
from exporters.bench.energy import Meter, energy_of, find_meter
from exporters.bench.worker import Worker, WorkerFailed, start_worker
from exporters.device.timing import schedule, significant
from exporters.open import RUNTIMES
from pipeline.core.atomic import atomic
from pipeline.core.machine import usable_cores

NO_TIMES: dict[str, Any] = {
    "wall_ms": {**dict.fromkeys(("p50", "p90", "p99", "min")), "n": 0, "p50_ci": None},
    "cpu_ms": {"p50": None},
    "engine_ms": None,
}


@dataclass(frozen=True)
class Subject:
    """One row to measure: a model in a target at a thread count and batch.

    skip: why there is nothing to run, where that is known beforehand; batch: None is the artefact's own, or 1.
    """

    model: str
    artefact: Path
    target: Target
    threads: int = 1
    skip: str | None = None
    batch: int | None = None


@dataclass
class Runner:
    """One worker of a subject with its answers so far. `reason` is set once it has failed.

    watts: mean power during each block by the meter, None where it was not read.
    """

    subject: Subject
    worker: Worker | None
    reason: str | None
    meter: Meter
    facts: dict[str, Any] = field(default_factory=dict)
    blocks: list[latency.Block] = field(default_factory=list)
    watts: list[float | None] = field(default_factory=list)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The worker's answer; empty once it has failed: the failure is recorded in `reason`, not raised."""
        if self.worker is None or self.reason is not None:
            return {}
        try:
            return self.worker.ask(do, **arguments)
        except WorkerFailed as failure:
            self.reason = str(failure)
            return {}

    def placement(self) -> dict[str, Any]:
        """Which operators ran where; a worker that fails over it has answered everything else."""
        assert self.worker
        try:
            return self.worker.ask("placement")
        except WorkerFailed as failure:
            return unplaced(str(failure))

    def block(self, seconds: float) -> None:
        """Run one block and record it."""
        self.meter.begin()
        if answer := self.ask("block", seconds=seconds):
            self.watts.append(self.meter.watts())
            self.blocks.append(latency.Block(**answer))


@contextmanager
def warmed_runners(subjects: Sequence[Subject], reference: Path | None) -> Iterator[list[Runner]]:
    """One runner per subject, loaded and warmed up one after the other; the processes end with the block."""
    with ExitStack() as stack:
        meter = stack.enter_context(closing(find_meter()))
        runners = []
        for subject in subjects:
            reason = subject.skip or _too_many_threads(subject)
            process = start_worker(
                subject.artefact, subject.target, subject.threads, reference, subject.batch
            )
            worker = None if reason else stack.enter_context(process)
            runner = Runner(subject, worker, reason, meter)
            runner.facts |= runner.ask("open")
            runner.facts |= runner.ask("warm_up")
            runners.append(runner)
        meter.measure_idle()
        yield runners


def _too_many_threads(subject: Subject) -> str | None:
    cores = usable_cores()
    if subject.threads <= cores:
        return None
    return f"threads: got {subject.threads}; expected {cores} at most, the usable cores"


def run_rounds(runners: Sequence[Runner], rounds: int, seconds: float, seed: int) -> None:
    """A block of `seconds` of every runner in each of the shuffled rounds."""
    for order in schedule(len(runners), rounds, seed):
        for i in order:
            runners[i].block(seconds)


@dataclass(frozen=True)
class Measurement:
    """A subject's JSON row, the blocks of each of its processes, and the counts of its file."""

    row: dict[str, Any]
    processes: list[list[latency.Block]]
    counts: counts.ModelCounts

    @property
    def measured(self) -> bool:
        """Whether it ran to the end."""
        return bool(self.row["status"] == "measured")


def measure_rows(
    subjects: Sequence[Subject], rounds: int, seconds: float, seed: int, reference: Path | None
) -> list[Measurement]:
    """Measure `rounds` blocks of `seconds` of each subject; one that cannot run has a row too.

    reference: an .npz whose `x` holds the images to run; None: seeded smooth ones.
    """
    before = conditions()
    with warmed_runners(subjects, reference) as runners:
        run_rounds(runners, rounds, seconds, seed)
        after = conditions()
        return [finish_measurement([runner], before, after) for runner in runners]


def finish_measurement(
    runners: Sequence[Runner], before: dict[str, Any], after: dict[str, Any]
) -> Measurement:
    """The result of one subject from its processes; of what each process reports, the median."""
    subject = runners[0].subject
    facts = [runner.facts | runner.ask("describe") for runner in runners]
    reason = next((r.reason for r in runners if r.reason), None)
    model_counts = counts.count_model(subject.artefact)
    blocks = [b for r in runners for b in r.blocks] if reason is None else []

    def median(name: str) -> float | None:
        return significant(np.median([f[name] for f in facts])) if blocks else None

    summary = latency.summarise_calls(blocks) if blocks else NO_TIMES
    p50 = summary["wall_ms"]["p50"]
    batch = facts[0].get("batch", subject.batch or 1)
    size = counts.size_bytes(subject.artefact)
    watts = [w for runner in runners for w in runner.watts]
    on_gpu = RUNTIMES[subject.target.runtime].needs_gpu
    row = {
        "model": subject.model,
        "artefact": subject.artefact.name,
        "target": subject.target.name,
        "runtime": facts[0].get("runtime"),
        "threads": subject.threads,
        "batch": batch,
        "status": "measured" if blocks else "skipped",
        "reason": reason,
        "precision_requested": subject.target.precision,
        "precision_effective": facts[0].get("precision_effective"),
        **summary,
        "img_per_s": significant(1e3 * batch / p50) if blocks else None,
        "load_ms": median("load_ms"),
        "first_ms": median("first_ms"),
        "rss_mb": median("rss_mb"),
        "size_mb": size and significant(size / 1e6),
        "params": facts[0].get("params", model_counts.params),
        "macs": facts[0].get("macs", model_counts.macs),
        "warm_up_seconds": median("seconds"),
        "placed_on": runners[0].placement() if blocks else None,
        "energy": energy_of(runners[0].meter, blocks, watts, on_gpu) if blocks else None,
        "flags": _flags(subject, latency.Block.join(blocks), facts, before, after)
        if blocks
        else [],
        "conditions": after,
    }
    return Measurement(row, [r.blocks for r in runners], model_counts)


def save_samples(path: Path, results: Sequence[Measurement]) -> None:
    """Write every call of every row into one .npz; docs/latency.md names the arrays."""
    arrays: dict[str, Any] = {}
    for i, result in enumerate(results):
        blocks = [b for process in result.processes for b in process]
        calls = latency.Block.join(blocks)
        for name, values in vars(calls).items():
            arrays[f"{i}.{name}"] = np.array(values, dtype=np.float32)
        lengths = [len(b.wall_ms) for b in blocks]
        arrays[f"{i}.block_start"] = np.cumsum([0, *lengths])[:-1].astype(np.int64)
        process = [k for k, own in enumerate(result.processes) for _ in own]
        arrays[f"{i}.block_process"] = np.array(process, dtype=np.int64)
    with atomic(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, **arrays)


def _flags(
    subject: Subject,
    calls: latency.Block,
    facts: Sequence[dict[str, Any]],
    before: dict[str, Any],
    after: dict[str, Any],
) -> list[str]:
    return latency.row_flags(
        calls,
        stable=all(f["stable"] for f in facts),
        threads=None if RUNTIMES[subject.target.runtime].needs_gpu else subject.threads,
        load=max((c["load_1m"] for c in (before, after) if c["load_1m"] is not None), default=None),
        cores=os.cpu_count() or 1,
        throttled=(after["throttled"] or 0) - (before["throttled"] or 0),
    )
