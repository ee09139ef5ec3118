"""Accuracy against latency: the points of a summary with their intervals, the front, a CSV. Torch-free."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.report.verdict import MODELS, fell_back, noisy

Z = 1.959964  # of a two-sided 95 % interval
COLUMNS = (
    *("target", "model", "method", "precision", "noisy", "p50_ms", "p50_low_ms", "p50_high_ms"),
    *("top1_percent", "top1_low_percent", "top1_high_percent"),
)


@dataclass(frozen=True)
class Point:
    """A measured model in a target: p50 in ms and clean top-1 in percent, each with its 95 % interval.

    An interval of the p50 that was not measured has no width.
    """

    target: str
    model: str
    method: str
    precision: str
    noisy: bool
    fell_back: bool
    p50: float
    p50_ci: tuple[float, float]
    top1: float
    top1_ci: tuple[float, float]


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % score interval of a share of `n` independent images, both fractions.

    Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927): unlike
    share ± 2 standard errors it stays inside 0..1 and has a width at 100 %.
    """
    centre = share + Z**2 / (2 * n)
    half = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    scale = 1 + Z**2 / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def points(summary: Mapping[str, Any]) -> list[Point]:
    """The exported student and the teacher in every target where they were measured, fastest first."""
    methods = {"student": summary["shipped"], "teacher": "teacher"}
    all_points = [
        _point(target, model, methods[model], summary["models"][methods[model]]["clean"])
        for target in summary["targets"]
        for model in MODELS
        if target[model]["status"] == "measured" and methods[model] in summary["models"]
    ]
    return sorted(all_points, key=lambda p: (p.p50, p.target, p.model))


def _point(target: Mapping[str, Any], model: str, method: str, clean: Mapping[str, Any]) -> Point:
    row = target[model]
    p50 = row["wall_ms"]["p50"]
    low, high = row["wall_ms"].get("p50_ci") or (p50, p50)
    top1 = [100 * v for v in (clean["top1"], *wilson(clean["top1"], clean["n"]))]
    return Point(
        target=target["target"],
        model=model,
        method=method,
        precision=row["precision_effective"],
        noisy=noisy(row),
        fell_back=fell_back(row),
        p50=p50,
        p50_ci=(low, high),
        top1=top1[0],
        top1_ci=(top1[1], top1[2]),
    )


def front(ordered: Iterable[Point]) -> list[Point]:
    """Of points, fastest first, those that no faster one equals in accuracy."""
    best: list[Point] = []
    for point in ordered:
        if not best or point.top1 > best[-1].top1:
            best.append(point)
    return best


def table(all_points: Sequence[Point]) -> str:
    """The points as CSV for `dvc plots`, a column each of COLUMNS."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for p in all_points:
        latency = (p.p50, *p.p50_ci)
        top1 = [f"{v:.4g}" for v in (p.top1, *p.top1_ci)]
        noise = "yes" if p.noisy else "no"
        writer.writerow([p.target, p.model, p.method, p.precision, noise, *latency, *top1])
    return text.getvalue()
