"""Comparison of two artefacts of one target: hard gates, then CPU time in interleaved rounds, one verdict.

Protocol: `exporters.bench.latency`; why CPU time, and how to read a verdict: docs/latency.md.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exporters.bench import checks, latency
from exporters.bench.conditions import conditions
from exporters.bench.measure import (
    Measurement,
    Runner,
    Subject,
    finish_measurement,
    run_rounds,
    warmed_runners,
)
from exporters.device import timing
from pipeline.core.errors import UserError

# Processes of one side: two processes of one artefact differ by several percent (memory layout, cores).
PROCESSES = 3
ROUNDS = 8  # doubled once where they do not decide

Sides = list[list[list[float]]]  # candidate and baseline: CPU p50 in ms, (processes, rounds) each


def compare_artefacts(
    candidate: Subject,
    baseline: Subject,
    seed: int,
    reference: Path | None,
    allowed: Collection[str] = (),
) -> tuple[dict[str, Any], list[Measurement]]:
    """(The comparison for the JSON, the measurements of candidate and baseline).

    A side that cannot run, or dies, is the `reason`: FAIL where only the candidate does, else INCONCLUSIVE.
    Raises UserError: the sides run batches of different sizes.
    """
    before = conditions()
    with warmed_runners([candidate, baseline] * PROCESSES, reference) as runners:
        _check_batches(runners[:2])
        ratio, times, rounds = _timed(runners, seed)
        logits = [runner.ask("logits").get("logits") for runner in runners[:2]]
        described = [runner.ask("describe").get("metadata", {}) for runner in runners[:2]]
        after = conditions()
        results = [finish_measurement(runners[side::2], before, after) for side in (0, 1)]
    reason = _stop_reasons(results)
    same = (candidate.target, candidate.threads) == (baseline.target, baseline.threads)
    subjects = (candidate, baseline)
    sides = [_side(*s) for s in zip(results, subjects, described, logits, strict=True)]
    rows = checks.compare_checks(sides[0], sides[1], allowed) if same else []
    comparison = {
        "model": candidate.model,
        "target": candidate.target.name,
        "threads": candidate.threads,
        "batch": results[0].row["batch"],
        "verdict": _verdict(results, ratio, rows),
        "reason": reason,
        "ratio": None if ratio is None or reason else {**vars(ratio), "verdict": ratio.verdict},
        "gates": rows,
        "rounds": rounds,
        "processes": PROCESSES,
        "process_spread": dict(zip(("candidate", "baseline"), map(_spread, times), strict=True)),
    }
    return comparison, results


def _check_batches(sides: Sequence[Runner]) -> None:
    """Raise UserError where both sides run, each with a batch of its own."""
    a, b = (side.facts.get("batch") for side in sides)
    if a and b and a != b:
        raise UserError(
            f"batch: got {a} for {sides[0].subject.artefact}, {b} for {sides[1].subject.artefact}; expected one; "
            f"pass --batch {max(a, b)}, or export both with the same batch"
        )


def _timed(runners: Sequence[Runner], seed: int) -> tuple[latency.Ratio | None, Sides, int]:
    """(Ratio, CPU p50 of both sides, rounds). ROUNDS are doubled where they do not decide."""
    ratio: latency.Ratio | None = None
    sides: Sides = [[], []]
    rounds = 0
    for attempt in (seed, seed + 1):
        run_rounds(runners, ROUNDS, timing.BLOCK_SECONDS, attempt)
        if any(runner.reason for runner in runners):
            return None, [[], []], rounds
        rounds += ROUNDS
        sides = [_medians([r.blocks for r in runners[side::2]], "cpu") for side in (0, 1)]
        ratio = latency.cpu_ratio(sides[0], sides[1], seed)
        if ratio.verdict != "INCONCLUSIVE":
            break
    return ratio, sides, rounds


def _stop_reasons(results: Sequence[Measurement]) -> str | None:
    """The sides that could not run to the end, with the reasons; None where both did."""
    reasons = [
        f"{side} {one.row['artefact']}: {one.row['reason']}"
        for side, one in zip(("candidate", "baseline"), results, strict=True)
        if not one.measured
    ]
    return "; ".join(reasons) or None


def _verdict(
    results: Sequence[Measurement], ratio: latency.Ratio | None, rows: Sequence[dict[str, Any]]
) -> latency.Verdict:
    candidate_ran, baseline_ran = (one.measured for one in results)
    time: latency.Verdict = "FAIL" if baseline_ran and not candidate_ran else "INCONCLUSIVE"
    if candidate_ran and baseline_ran and ratio is not None:
        time = ratio.verdict
    return "FAIL" if any(row["verdict"] == "FAIL" for row in rows) else time


def _side(
    one: Measurement, subject: Subject, described: dict[str, str], logits: list[list[float]] | None
) -> checks.Side:
    return checks.Side(
        artefact=subject.artefact,
        precision=one.row["precision_effective"],
        params=one.row["params"],
        macs=one.row["macs"],
        counts=one.counts,
        metadata=described,
        logits=None if logits is None else np.array(logits, dtype=np.float32),
    )


def _spread(side: Sequence[Sequence[float]]) -> float | None:
    """CPU p50 of the slowest process of one side over the fastest, minus 1."""
    if not side:
        return None
    medians = np.median(np.array(side), axis=1)
    return round(float(medians.max() / medians.min() - 1), 4)


def student_over_teacher(results: Sequence[Measurement], seed: int) -> list[dict[str, Any]]:
    """Student over teacher for each batch where both ran, at the fewest threads, paired round by round.

    By CPU time; on a GPU by the engine's own. One process a side, so the interval leaves out the difference
    between processes.
    """
    threads = min(one.row["threads"] for one in results)
    sides = {
        (one.row["model"], one.row["batch"]): one
        for one in results
        if one.measured and one.row["threads"] == threads
    }
    rows = []
    for (model, batch), student in sides.items():
        teacher = sides.get(("teacher", batch))
        if model != "student" or teacher is None:
            continue
        clock = "engine" if student.row["engine_ms"] else "cpu"
        a, b = (_medians(one.processes, clock) for one in (student, teacher))
        ratio = latency.paired_ratio(a, b, seed)
        rows.append(
            {
                "target": student.row["target"],
                "threads": threads,
                "batch": batch,
                "candidate": "student",
                "baseline": "teacher",
                "clock": clock,
                "ratio": vars(ratio),
            }
        )
    return rows


def _medians(processes: Sequence[Sequence[latency.Block]], clock: str) -> list[list[float]]:
    """(processes, rounds) of blocks -> the median of each by that clock (wall, cpu, engine), in ms."""
    return [[float(np.median(getattr(b, f"{clock}_ms"))) for b in p] for p in processes]
