"""The share of calls done within so many milliseconds: a panel a target, student and teacher in it. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.report.charts import canvas
from pipeline.report.charts.canvas import COLOUR, RULE, WIDTH
from pipeline.report.verdict import MODELS, noisy

PANEL = 58  # px
FILLED = 0.8  # of a panel, from none of the calls to all of them
LINE = {"student": "-", "teacher": "--"}


def picture(summary: Mapping[str, Any], name: str = "ecdf") -> str | None:
    """Empirical distributions of the wall times; None without samples.

    The samples of a summary are evenly spaced in rank, both extremes among them: the i-th of n stands at
    i / (n - 1).
    """
    shown = [t for t in summary["targets"] if any(t[m]["samples_ms"] for m in MODELS)]
    if not shown:
        return None
    values = [v for t in shown for m in MODELS for v in t[m]["samples_ms"]]
    names = [t["target"] + " NOISY" * any(noisy(t[m]) for m in MODELS) for t in shown]
    with canvas.styled():
        figure, axis = canvas.axes(WIDTH, PANEL * len(shown) + 46, canvas.room_for(names))
        canvas.logarithmic(axis, min(values) / 1.3, max(values) * 1.3)
        axis.set_ylim(-len(shown), 0)
        for row, target in enumerate(shown):
            _panel(axis, target, -row - 0.9)
        canvas.named_rows(axis, names, [-row - 0.5 for row in range(len(shown))])
        axis.set_xlabel("latency (ms, log scale)")
        return canvas.svg(figure, name, "Share of calls by latency, by target, student and teacher")


def _panel(axis: Any, target: Mapping[str, Any], base: float) -> None:
    for share, style in ((0, "-"), (0.5, (0, (2, 3))), (1, "-")):
        axis.axhline(base + FILLED * share, color=RULE, lw=1, ls=style)
    for model in MODELS:
        samples = target[model]["samples_ms"]
        if samples:
            last = max(1, len(samples) - 1)
            ranks = [base + FILLED * i / last for i in range(len(samples))]
            line = {"color": COLOUR[model], "ls": LINE[model], "lw": 1.6}
            axis.plot(samples, ranks, drawstyle="steps-post", **line)
