"""Speed of one training for train/<method>.json, its loss curves for curves/<method>.csv."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path
from typing import Any

from pipeline.core.atomic import atomic
from pipeline.distill.trainer import Trainer
from pipeline.training import resume, stopwatch

STAGES = (
    *("read", "view", "replay", "student", "projector", "terms", "adversarial"),
    *("ratios", "backward", "optimizer"),
)


def summarise(
    trainer: Trainer, timer: stopwatch.Stopwatch, curves: list[resume.Figures]
) -> dict[str, Any]:
    """Speed of one training, as train/<method>.json holds it, and `curves`: term -> [[step, mean loss], ...]."""
    timed = [s for s in timer.steps if s][2:] or [s for s in timer.steps if s]
    totals = [sum(s.values()) for s in timed] or [float("nan")]
    rates = [1e3 * trainer.config.batch / t for t in totals]
    quartiles = statistics.quantiles(rates, n=4) if len(rates) > 1 else [rates[0]] * 3
    stage_ms = {
        n: statistics.median(s.get(n, 0.0) for s in timed) if timed else 0.0 for n in STAGES
    }
    waiting = sum(s.get("read", 0.0) + s.get("view", 0.0) for s in timed)
    return {
        "img_per_s": {"median": statistics.median(rates), "iqr": quartiles[2] - quartiles[0]},
        "stall_fraction": waiting / sum(totals),
        "peak_mb": stopwatch.peak_memory_mb(),
        "steps": trainer.feed.steps,
        "batch": trainer.config.batch,
        "labels_seen": trainer.feed.labels_seen,
        "weights": trainer.objective.weights(1.0),
        "stage_ms": stage_ms,
        "curves": _thinned(curves),
    }


def _thinned(curves: list[dict[str, float]], points: int = 200) -> dict[str, list[list[float]]]:
    """term -> [[step, mean], ...]: each of at most `points` windows by its mean."""
    terms = sorted({t for row in curves for t in row} - {"step"})
    window = max(1, -(-len(curves) // points))
    thin: dict[str, list[list[float]]] = {t: [] for t in terms}
    for at in range(0, len(curves), window):
        rows = curves[at : at + window]
        for term in terms:
            values = [r[term] for r in rows if term in r]
            if values:
                thin[term].append([rows[-1]["step"] + 1, statistics.fmean(values)])
    return thin


def final(curves: dict[str, list[list[float]]]) -> dict[str, float]:
    """term -> its mean loss over the last window."""
    return {term: points[-1][1] for term, points in curves.items() if points}


def write_csv(curves: dict[str, list[list[float]]], path: Path) -> None:
    """Write every loss over the steps, a column a term: for `dvc plots` and the report."""
    steps: dict[float, dict[str, float]] = {}
    for name, points in curves.items():
        for step, value in points:
            steps.setdefault(step, {"step": int(step)})[name] = value
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["step", *curves], lineterminator="\n")
        table.writeheader()
        table.writerows(steps[step] for step in sorted(steps))
