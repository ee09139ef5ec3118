"""Two artefacts of one target side by side: hard gates, then CPU time in interleaved rounds, one verdict.

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

PROCESSES = 3  # a side
ROUNDS = 8  # and as many again where they do not decide

Sides = list[list[list[float]]]  # candidate and baseline: CPU p50 in ms, (processes, rounds) each


def compare_artefacts(
    candidate: Subject,
    baseline: Subject,
    seed: int,
    reference: Path | None,
    allowed: Collection[str] = (),
) -> tuple[dict[str, Any], list[Measurement]]:
    """The comparison, and what was measured of candidate and baseline.

    A side that cannot run, or dies, is told in `reason`: FAIL where only the candidate does, else INCONCLUSIVE.
    """
    before = conditions()
    with warmed_runners([candidate, baseline] * PROCESSES, reference) as runners:
        ratio, times, rounds = _timed(runners, seed)
        logits = [runner.ask("logits").get("logits") for runner in runners[:2]]
        notes = [runner.ask("describe").get("notes", {}) for runner in runners[:2]]
        after = conditions()
        found = [finish_measurement(runners[side::2], before, after) for side in (0, 1)]
    reason = _stopped(found)
    same = (candidate.target, candidate.threads) == (baseline.target, baseline.threads)
    sides = [_side(*told) for told in zip(found, (candidate, baseline), notes, logits, strict=True)]
    rows = checks.compare_checks(sides[0], sides[1], allowed) if same else []
    comparison = {
        "model": candidate.model,
        "target": candidate.target.name,
        "threads": candidate.threads,
        "verdict": _verdict(found, ratio, rows),
        "reason": reason,
        "ratio": None if ratio is None or reason else {**vars(ratio), "verdict": ratio.verdict},
        "gates": rows,
        "rounds": rounds,
        "processes": PROCESSES,
        "process_spread": dict(zip(("candidate", "baseline"), map(_spread, times), strict=True)),
    }
    return comparison, found


def _timed(runners: Sequence[Runner], seed: int) -> tuple[latency.Ratio | None, Sides, int]:
    """The ratio after ROUNDS, or twice as many where those do not decide; no ratio once a side has stopped."""
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


def _stopped(found: Sequence[Measurement]) -> str | None:
    """Which side could not run to the end, and why."""
    told = [
        f"{side} {one.row['artefact']}: {one.row['reason']}"
        for side, one in zip(("candidate", "baseline"), found, strict=True)
        if not one.measured
    ]
    return "; ".join(told) or None


def _verdict(
    found: Sequence[Measurement], ratio: latency.Ratio | None, rows: Sequence[dict[str, Any]]
) -> latency.Verdict:
    runs, ran = (one.measured for one in found)
    time: latency.Verdict = "INCONCLUSIVE" if runs or not ran else "FAIL"
    if runs and ran and ratio is not None:
        time = ratio.verdict
    return "FAIL" if any(row["verdict"] == "FAIL" for row in rows) else time


def _side(
    one: Measurement, subject: Subject, notes: dict[str, str], logits: list[list[float]] | None
) -> checks.Side:
    return checks.Side(
        artefact=subject.artefact,
        precision=one.row["precision_effective"],
        params=one.row["params"],
        macs=one.row["macs"],
        figures=one.figures,
        notes=notes,
        logits=None if logits is None else np.array(logits, dtype=np.float32),
    )


def _spread(side: Sequence[Sequence[float]]) -> float | None:
    """How far the processes of one side lie apart in CPU p50: slowest over fastest, less 1."""
    if not side:
        return None
    medians = np.median(np.array(side), axis=1)
    return round(float(medians.max() / medians.min() - 1), 4)


def student_over_teacher(found: Sequence[Measurement], seed: int) -> list[dict[str, Any]]:
    """Student over teacher where both ran at the fewest threads, batch by batch, paired round by round.

    By CPU time; on a GPU by the engine's own. One process a side: what two processes differ by is not in it.
    """
    fewest = min(one.row["threads"] for one in found)
    sides = {
        (one.row["model"], one.row["batch"]): one
        for one in found
        if one.measured and one.row["threads"] == fewest
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
                "threads": fewest,
                "batch": batch,
                "candidate": "student",
                "baseline": "teacher",
                "clock": clock,
                "ratio": vars(ratio),
            }
        )
    return rows


def _medians(processes: Sequence[Sequence[latency.Block]], clock: str) -> list[list[float]]:
    """(processes, rounds): the median of each block by that clock, in ms."""
    return [[float(np.median(getattr(b, f"{clock}_ms"))) for b in p] for p in processes]
