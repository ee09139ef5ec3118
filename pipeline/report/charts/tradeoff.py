"""Clean top-1 against latency, with the intervals of both, the Pareto front and the budgets. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.report.charts import canvas
from pipeline.report.charts.canvas import COLOUR, INK, LETTER, LIMIT, LINE_HEIGHT, WIDTH
from pipeline.report.pareto import Point, front, points
from pipeline.report.verdict import MODELS

MARKER = {"fp32": "o", "fp16": "D", "bf16": "D", "int8": "^"}
BAND = 120  # px from the lowest accuracy drawn to the highest
LEAST = 0.5  # percentage points that the band spans at least


@dataclass(frozen=True)
class Budget:
    """A limit as it is drawn: `at` in ms or in percent, with the words beside its line."""

    at: float
    label: str


def draw(summary: Mapping[str, Any], name: str = "tradeoff") -> str | None:
    """A point for each measured target and model, to scale; None where nothing was measured.

    A model is a row of points. Their labels are flags that never overlap: above the more accurate model's row,
    below the other's. The latency budgets are drawn above all of them.
    """
    measured = points(summary)
    rows = {m: [p for p in measured if p.model == m] for m in MODELS}
    order = sorted((m for m in MODELS if rows[m]), key=lambda m: rows[m][0].top1)
    if not order:
        return None
    below = LINE_HEIGHT * (len(rows[order[0]]) + 1) + 22 if len(order) == 2 else 12
    limits = budgets(summary, "wall_ms_max")
    above = LINE_HEIGHT * (len(rows[order[-1]]) + 1 + len(limits)) + 26
    floor = budgets(summary, "top1_min")
    with canvas.styled():
        figure, axis = canvas.axes(WIDTH, below + BAND + above + 46)
        labels = [(p.p50_ci[0], p.p50, _label(p)) for p in measured]
        canvas.logarithmic(axis, *_span([*labels, *((b.at, b.at, b.label) for b in limits)]))
        axis.set_ylim(0, below + BAND + above)
        height = _scale(axis, measured, floor, below)
        _draw_front(axis, front(measured), height)
        for model in order:
            sign = 1 if model == order[-1] else -1
            _row(axis, rows[model], height, sign, below + BAND if sign > 0 else below)
        _draw_budgets(axis, limits, floor, height, below + BAND + above)
        axis.set_xlabel("latency p50 (ms, log scale)")
        axis.set_ylabel("clean top-1 (%)")
        return canvas.svg(figure, name, "Clean top-1 against latency, by target, with intervals")


def budgets(summary: Mapping[str, Any], quantity: str) -> list[Budget]:
    """The limits of one quantity as lines; an accuracy in percent."""
    scale, sign = (100, "≥") if quantity == "top1_min" else (1, "≤")
    unit = {"top1_min": "%", "wall_ms_max": "ms", "size_mb_max": "MB"}[quantity]
    lines = []
    for budget in summary["budgets"]:
        target, _, kind = budget["name"].rpartition(".")
        if kind == quantity:
            where = f"{target} " if target else ""
            limit = scale * budget["limit"]
            lines.append(Budget(limit, f"budget {where}{sign} {limit:g} {unit}"))
    return lines


def _label(point: Point) -> str:
    ran = f" (ran {point.precision})" if point.fell_back else ""
    noise = " NOISY" * point.noisy
    return f"{canvas.short(point.target, 20)}{ran}{noise}  {point.p50:.3g}"


def _span(labels: Sequence[tuple[float, float, str]]) -> tuple[float, float]:
    """The shortest log axis, in ms, on which each label, (leftmost, anchor, text), ends inside the chart."""
    low = min(leftmost for leftmost, _, _ in labels) / 1.4
    width = WIDTH - canvas.LEFT - canvas.RIGHT
    decades = [math.log10(at / low) / (1 - LETTER * len(text) / width) for _, at, text in labels]
    return low, low * 10 ** max(decades)


def _scale(axis: Any, measured: Sequence[Point], floor: Sequence[Budget], below: float) -> Any:
    """Percent -> height in pixels within the band, with ticks at round percentages."""
    from matplotlib.ticker import MaxNLocator

    ends = [v for p in measured for v in p.top1_ci] + [b.at for b in floor]
    low, high = min(ends), max(ends)
    high = max(high, low + LEAST)

    def height(percent: float) -> float:
        return below + BAND * (percent - low) / (high - low)

    ticks = [
        t for t in MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= t <= high
    ]
    axis.set_yticks([height(t) for t in ticks], [f"{t:g}" for t in ticks])
    return height


def _draw_front(axis: Any, best: Sequence[Point], height: Any) -> None:
    xs = [p.p50 for p in best]
    ys = [height(p.top1) for p in best]
    end = axis.get_xlim()[1]
    axis.step([*xs, end], [*ys, ys[-1]], where="post", color=INK, lw=0.7, ls=(0, (1, 3)))


def _row(axis: Any, row: Sequence[Point], height: Any, sign: int, edge: float) -> None:
    """A model's points with intervals, flags outward from `edge`, and the accuracy in words over the flags."""
    colour = COLOUR[row[0].model]
    low, high = (height(v) for v in row[0].top1_ci)
    y = height(row[0].top1)
    for i, point in enumerate(row):
        top = edge + sign * (12 + LINE_HEIGHT * (len(row) - 1 - i))
        start = high if sign > 0 else low
        axis.plot([point.p50] * 2, [start, top + sign * 5], color=colour, lw=0.7, ls=":")
        _cross(axis, point, y, (low, high), colour)
        face = "none" if point.noisy else colour
        shape = MARKER.get(point.precision, "s")
        axis.plot([point.p50], [y], shape, color=colour, markerfacecolor=face, markersize=7)
        canvas.write(axis, (point.p50, top), (4, 0), _label(point))
    top = edge + sign * (16 + LINE_HEIGHT * len(row))
    ends = ", ".join(f"{v:.1f}" for v in row[0].top1_ci)
    who = row[0].model + f" {canvas.short(row[0].method, 14)}" * (row[0].model != row[0].method)
    label = f"{who}: {row[0].top1:.1f} % [{ends}]"
    canvas.write(axis, (axis.get_xlim()[0], top), (4, 0), label, color=colour, fontweight="bold")


def _cross(axis: Any, point: Point, y: float, ends: tuple[float, float], colour: str) -> None:
    axis.plot([point.p50] * 2, ends, "_-", color=colour, lw=1.1, markersize=6)
    if point.p50_ci[0] < point.p50_ci[1]:
        axis.plot(point.p50_ci, [y, y], "|-", color=colour, lw=1.1, markersize=9)


def _draw_budgets(
    axis: Any, limits: Sequence[Budget], floor: Sequence[Budget], height: Any, top: float
) -> None:
    for i, limit in enumerate(sorted(limits, key=lambda b: b.at)):
        y = top - 8 - LINE_HEIGHT * i
        axis.plot([limit.at] * 2, [0, y + 5], color=LIMIT, lw=1.1, ls="--")
        canvas.write(axis, (limit.at, y), (4, 0), limit.label, color=LIMIT)
    for limit in floor:
        axis.axhline(height(limit.at), color=LIMIT, lw=1.1, ls="--")
        position = (axis.get_xlim()[1], height(limit.at))
        canvas.write(axis, position, (-2, 7), limit.label, color=LIMIT, ha="right")
