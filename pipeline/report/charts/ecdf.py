"""Latency distribution: a panel for each target, with the curves of student and teacher. Torch-free.

The samples of a summary are evenly spaced in rank, both extremes included: the i-th of n is at i / (n - 1).
A row without samples is drawn by its percentiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.report.charts import canvas
from pipeline.report.charts.canvas import COLOUR, RULE, WIDTH
from pipeline.report.raw import sampled
from pipeline.report.verdict import MODELS, noisy

PANEL = 58  # px
FILLED = 0.8  # of a panel, from none of the calls to all of them
LINE = {"student": "-", "teacher": "--"}
SHARES = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99}  # of the calls, by the keys of `wall_ms`


def draw(summary: Mapping[str, Any], name: str = "ecdf") -> str | None:
    """Empirical distributions of the wall times; None where nothing was measured."""
    targets = [t for t in summary["targets"] if any(points(t[m]) for m in MODELS)]
    if not targets:
        return None
    values = [ms for t in targets for m in MODELS for ms, _ in points(t[m])]
    names = [t["target"] + " NOISY" * any(noisy(t[m]) for m in MODELS) for t in targets]
    with canvas.styled():
        figure, axis = canvas.axes(WIDTH, PANEL * len(targets) + 46, canvas.room_for(names))
        canvas.logarithmic(axis, min(values) / 1.3, max(values) * 1.3)
        axis.set_ylim(-len(targets), 0)
        for row, target in enumerate(targets):
            _panel(axis, target, -row - 0.9)
        canvas.named_rows(axis, names, [-row - 0.5 for row in range(len(targets))])
        axis.set_xlabel("latency (ms, log scale)")
        return canvas.svg(figure, name, "Share of calls by latency, by target, student and teacher")


def _panel(axis: Any, target: Mapping[str, Any], base: float) -> None:
    for share, style in ((0, "-"), (0.5, (0, (2, 3))), (1, "-")):
        axis.axhline(base + FILLED * share, color=RULE, lw=1, ls=style)
    for model in MODELS:
        if curve := points(target[model]):
            times, shares = zip(*curve, strict=True)
            line: dict[str, Any] = {"color": COLOUR[model], "ls": LINE[model], "lw": 1.6}
            line |= {"drawstyle": "steps-post"} if sampled([target[model]]) else {"marker": "."}
            axis.plot(times, [base + FILLED * share for share in shares], **line)


def points(row: Mapping[str, Any]) -> list[tuple[float, float]]:
    """(ms, share of the calls done by then) of a row, by its samples or percentiles; empty unless measured."""
    if row["status"] != "measured":
        return []
    if samples := row.get("samples_ms"):
        last = max(1, len(samples) - 1)
        return [(ms, i / last) for i, ms in enumerate(samples)]
    wall = row["wall_ms"]
    return [(wall[key], share) for key, share in SHARES.items() if wall.get(key)]
