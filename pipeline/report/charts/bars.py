"""File size and resident memory by target: bars of student and teacher. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.report.charts import canvas
from pipeline.report.charts.canvas import COLOUR, LETTER, LIMIT, LINE_HEIGHT, SMALL, WIDTH
from pipeline.report.charts.tradeoff import budgets
from pipeline.report.verdict import MODELS

ROW = 44  # px
LABELS = {"size_mb": "file (MB)", "rss_mb": "resident memory (MB)"}


def draw(summary: Mapping[str, Any], key: str, name: str) -> str | None:
    """A pair of bars a target, of `size_mb` with its budgets or of `rss_mb`; None where none was measured."""
    targets = [t for t in summary["targets"] if any(_value(t[m], key) for m in MODELS)]
    if not targets:
        return None
    limits = budgets(summary, "size_mb_max") if key == "size_mb" else []
    names = [t["target"] for t in targets]
    end = max(_value(t[m], key) or 0 for t in targets for m in MODELS)
    end = max([end * 1.24, *(limit.at * 1.05 for limit in limits)])
    above = LINE_HEIGHT * len(limits)
    with canvas.styled():
        figure, axis = canvas.axes(WIDTH, ROW * len(targets) + above + 46, canvas.room_for(names))
        axis.set_xlim(0, end)
        axis.set_ylim(len(targets) - 0.5, -0.5 - above / ROW)
        for row, target in enumerate(targets):
            for model, shift in zip(MODELS, (-0.19, 0.19), strict=True):
                _bar(axis, _value(target[model], key), row + shift, model)
        for i, limit in enumerate(limits):
            _limit(axis, limit.at, limit.label, -0.5 - (i + 0.5) * LINE_HEIGHT / ROW)
        canvas.named_rows(axis, names, range(len(targets)))
        axis.locator_params(axis="x", nbins=5)
        axis.grid(axis="x")
        axis.set_xlabel(LABELS[key])
        return canvas.svg(figure, name, f"{LABELS[key]} by target, student and teacher")


def _value(row: Mapping[str, Any], key: str) -> float | None:
    return row.get(key)


def _bar(axis: Any, value: float | None, y: float, model: str) -> None:
    """The student's bar is full, the teacher's an outline."""
    if value is None:
        return
    colour = COLOUR[model]
    face = colour if model == "student" else "none"
    axis.barh(y, value, 0.32, facecolor=face, edgecolor=colour, linewidth=1.2)
    options = {"textcoords": "offset points", "va": "center", "fontsize": SMALL}
    axis.annotate(f"{value:.3g}", (value, y), (4, 0), **options)


def _limit(axis: Any, at: float, label: str, y: float) -> None:
    axis.plot([at, at], [axis.get_ylim()[0], y], color=LIMIT, lw=1.1, ls="--")
    width = axis.get_window_extent().width
    left = at / axis.get_xlim()[1] * width + LETTER * len(label) > width
    options = {"textcoords": "offset points", "va": "center", "fontsize": SMALL, "color": LIMIT}
    axis.annotate(label, (at, y), (-4 if left else 4, 0), ha="right" if left else "left", **options)
