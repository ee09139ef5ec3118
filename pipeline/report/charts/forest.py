"""Forest plot: ratios of times with their 95 % intervals and the tolerated slowdown. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.report.charts import canvas
from pipeline.report.charts.canvas import INK, RULE, SERIES, SMALL, WIDTH
from pipeline.report.verdict import of_latency
from pipeline.report.wording import figure

ROW = 40  # px
MARKER = {"PASS": "o", "FAIL": "X", "INCONCLUSIVE": "D"}
LETTERS = 32  # of a row's name


@dataclass(frozen=True)
class Row:
    """A ratio of times; `tol`: the tolerated slowdown, a fraction, None where nothing is judged."""

    name: str
    median: float
    low: float
    high: float
    tol: float | None = None
    verdict: str | None = None


def of_pairs(pairs: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows of the student/teacher ratios, one for each pair that has a ratio."""
    return [
        Row(_label(p), r["median"], r["ci_low"], r["ci_high"])
        for p in pairs
        if (r := p.get("ratio"))
    ]


def of_comparisons(comparisons: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows of the ratios to the baseline, one for each comparison that has one; named by model if they differ."""
    several = len({c["model"] for c in comparisons}) > 1
    rows = []
    for comparison in comparisons:
        name = _label(comparison)
        name = f"{comparison['model']} {name}" if several else name
        if r := comparison.get("ratio"):
            values = (r["median"], r["ci_low"], r["ci_high"], r["tol"])
            rows.append(Row(name, *values, verdict=of_latency(comparison)))
    return rows


def _label(comparison: Mapping[str, Any]) -> str:
    """The target, with threads and batch where they are not 1."""
    threads, batch = comparison["threads"], comparison.get("batch", 1)
    more = [f"{threads} threads"] * (threads != 1) + [f"batch {batch}"] * (batch != 1)
    return ", ".join([comparison["target"], *more])


def draw(rows: Sequence[Row], name: str, what: str) -> str | None:
    """A line of text and an interval each row; None without rows. `what` names the ratio on the axis."""
    if not rows:
        return None
    with canvas.styled():
        drawing, axis = canvas.axes(WIDTH, ROW * len(rows) + 46, 12, 12)
        _limits(axis, rows)
        axis.set_ylim(len(rows) - 0.4, -0.55)
        for y, row in enumerate(rows):
            _row(axis, row, y)
        axis.set_yticks([])
        axis.spines["left"].set_visible(False)
        axis.set_xlabel(what)
        return canvas.svg(drawing, name, f"{what}: {', '.join(row.name for row in rows)}")


def _limits(axis: Any, rows: Sequence[Row]) -> None:
    """A log axis where the ratios span more than a factor of two, a linear one around 1 elsewhere."""
    low = min(1.0, *(row.low for row in rows))
    high = max(1.0, *(max(row.high, 1 + (row.tol or 0)) for row in rows))
    if low > 0 and high / low > 2:
        canvas.logarithmic(axis, low / 1.15, high * 1.15)
        axis.grid(visible=False)
        return
    margin = 0.12 * max(high - low, 0.02)
    axis.set_xlim(low - margin, high + margin)
    axis.locator_params(axis="x", nbins=6)


def _row(axis: Any, row: Row, y: float) -> None:
    """A line of text, and under it the interval, the line of equal times and the tolerance."""
    at, colour = y + 0.14, SERIES[1]
    if row.tol is not None:
        axis.barh(at, row.tol, 0.44, left=1, color=RULE)
    axis.plot([1, 1], [at - 0.22, at + 0.22], color=INK, lw=1)
    axis.plot([row.low, row.high], [at] * 2, "|-", color=colour, lw=1.6, markersize=8)
    face = "none" if row.verdict == "INCONCLUSIVE" else colour
    shape = MARKER.get(row.verdict or "PASS", "s")
    axis.plot([row.median], [at], shape, color=colour, markerfacecolor=face, markersize=8)
    options = {"transform": axis.get_yaxis_transform(), "va": "center", "fontsize": SMALL}
    axis.text(0, y - 0.32, canvas.short(row.name, LETTERS), ha="left", **options)
    text = f"{figure(row.median)} [{figure(row.low)}, {figure(row.high)}] {row.verdict or ''}"
    axis.text(1, y - 0.32, text.strip(), ha="right", **options)
