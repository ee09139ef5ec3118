"""Accuracy of several students against their latency, with the front, the teacher and the budgets. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.charts import canvas
from pipeline.report.charts.canvas import COLOUR, INK, LIMIT, LINE_HEIGHT, WIDTH
from pipeline.report.charts.tradeoff import Budget, budgets

BAND = 150  # px from the lowest accuracy drawn to the highest
LEAST = 0.5  # percentage points that the band spans at least
SELECTED, OTHERS = 8, 4  # size of a marker


def draw(summary: Mapping[str, Any], name: str = "students") -> str | None:
    """A column of points for each student, its methods; None where one was trained or nothing was measured.

    The selected method of each student is filled, the others are hollow; the dotted step is the front, dashed
    lines are the budgets. The teacher is drawn where that target measured it.
    """
    family = summary.get("family")
    rows = [r for r in family["rows"] if r["p50_ms"] is not None] if family else []
    if not family or not rows:
        return None
    teacher = _teacher(summary, family["target"])
    limits = budgets(summary, "wall_ms_max")
    floor = budgets(summary, "top1_min")
    milliseconds = [r["p50_ms"] for r in rows] + [b.at for b in limits]
    percents = [100 * v for r in rows for v in r["top1_ci"]] + [b.at for b in floor]
    if teacher:
        milliseconds.append(teacher[0])
        percents.append(teacher[1])
    selected = sorted((r for r in rows if r["selected"]), key=lambda r: r["p50_ms"])
    low, high = min(percents), max(percents)
    line = max(high - low, LEAST) * LINE_HEIGHT / BAND  # a line of text in percentage points
    flags = [high + line * (1 + len(selected) - i) for i in range(len(selected))]
    with canvas.styled():
        figure, axis = canvas.axes(WIDTH, BAND + LINE_HEIGHT * (len(selected) + 3) + 46)
        canvas.logarithmic(axis, min(milliseconds) / 1.5, max(milliseconds) * 4)
        axis.set_ylim(low - line, high + line * (len(selected) + 2))
        axis.set_yticks([tick for tick in axis.get_yticks() if low - line <= tick <= 100])
        _draw_front(axis, rows)
        for row in rows:
            _draw_point(axis, row)
        for row, flag in zip(selected, flags, strict=True):
            _draw_flag(axis, row, flag)
        if teacher:
            axis.plot(*([v] for v in teacher), "s", color=COLOUR["teacher"], markerfacecolor="none")
            canvas.write(axis, teacher, (6, 0), "teacher")
        _draw_limits(axis, limits, floor)
        axis.set_xlabel(f"latency p50 on {family['target']} (ms, log scale)")
        axis.set_ylabel("clean top-1 (%)")
        return canvas.svg(figure, name, "Clean top-1 of every student against its latency")


def _teacher(summary: Mapping[str, Any], target: str) -> tuple[float, float] | None:
    """p50 in ms and top-1 in percent of the teacher in that target; None where it was not measured there."""
    for found in summary["targets"]:
        if found["target"] == target and found["teacher"]["status"] == "measured":
            return found["teacher"]["wall_ms"]["p50"], 100 * summary["models"]["teacher"]["clean"][
                "top1"
            ]
    return None


def _draw_front(axis: Any, rows: list[dict[str, Any]]) -> None:
    best = sorted((r["p50_ms"], 100 * r["top1"]) for r in rows if r["front"])
    end = axis.get_xlim()[1]
    xs, ys = [x for x, _ in best], [y for _, y in best]
    axis.step([*xs, end], [*ys, ys[-1]], where="post", color=INK, lw=0.7, ls=(0, (1, 3)))


def _draw_point(axis: Any, row: Mapping[str, Any]) -> None:
    """A student by one method; of the selected one the intervals too."""
    x, y = row["p50_ms"], 100 * row["top1"]
    colour = _colour(row)
    if not row["selected"]:
        axis.plot([x], [y], "o", color=colour, markerfacecolor="none", markersize=OTHERS, alpha=0.6)
        return
    axis.plot([x, x], [100 * v for v in row["top1_ci"]], "_-", color=colour, lw=1.1, markersize=6)
    if row["p50_ci"]:
        axis.plot(row["p50_ci"], [y, y], "|-", color=colour, lw=1.1, markersize=9)
    axis.plot([x], [y], "D" if row["exported"] else "o", color=colour, markersize=SELECTED)


def _draw_flag(axis: Any, row: Mapping[str, Any], height: float) -> None:
    """The name of a student above all points, with a line down to its own."""
    x = row["p50_ms"]
    axis.plot([x, x], [100 * row["top1_ci"][1], height], color=_colour(row), lw=0.7, ls=":")
    text = f"{canvas.short(row['student'], 20)}{' (exported)' * row['exported']}  {x:.3g}"
    weight = "bold" if row["exported"] else "normal"
    canvas.write(axis, (x, height), (4, 0), text, color=_colour(row), fontweight=weight)


def _colour(row: Mapping[str, Any]) -> str:
    return LIMIT if row["over_budget"] else COLOUR["student"]


def _draw_limits(axis: Any, limits: Sequence[Budget], floor: Sequence[Budget]) -> None:
    right, bottom = axis.get_xlim()[1], axis.get_ylim()[0]
    for limit in limits:
        axis.axvline(limit.at, color=LIMIT, lw=1.1, ls="--")
        canvas.write(axis, (limit.at, bottom), (4, 8), limit.label, color=LIMIT)
    for limit in floor:
        axis.axhline(limit.at, color=LIMIT, lw=1.1, ls="--")
        canvas.write(axis, (right, limit.at), (-2, 7), limit.label, color=LIMIT, ha="right")
