"""Earlier runs and this one: p50 of every target, and top-1 with its interval, run by run. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.charts import canvas
from pipeline.report.charts.canvas import COLOUR, SMALL, WIDTH

MARKERS = "osD^vPX*"
LINE = ("-", "--", "-.", ":")
PLOT, NAMES = 180, 58  # px: of the axes, and below them of the names of the runs
Run = Mapping[str, Any]


def latencies(history: Mapping[str, Any], name: str) -> str | None:
    """p50 in ms over the runs, a line a target; a NOISY row is ringed. None without a figure."""
    runs = history["runs"]
    lines = {
        t: [(i, r) for i, r in enumerate(runs) if t in r["p50_ms"]] for t in history["targets"]
    }
    lines = {target: line for target, line in lines.items() if line}
    if not lines:
        return None
    values = [run["p50_ms"][target] for target, line in lines.items() for _, run in line]
    below = NAMES + 14 * -(-len(lines) // 2)
    with canvas.styled():
        figure, axis = canvas.axes(WIDTH, PLOT + below, below=below)
        canvas.logarithmic(axis, min(values) / 1.3, max(values) * 1.3, "y")
        for i, (target, line) in enumerate(lines.items()):
            _line(axis, target, line, i)
        axis.set_ylabel("latency p50 (ms, log scale)")
        _runs(axis, runs)
        options = {"loc": "upper center", "bbox_to_anchor": (0.45, -(NAMES - 14) / PLOT)}
        axis.legend(ncols=2, frameon=False, fontsize=SMALL, handlelength=3, **options)
        return canvas.svg(figure, name, f"p50 of the student over {len(runs)} runs, by target")


def _line(axis: Any, target: str, line: Sequence[tuple[int, Run]], i: int) -> None:
    values = [run["p50_ms"][target] for _, run in line]
    style = {"color": canvas.series(i), "ls": LINE[i % len(LINE)], "lw": 1.4, "markersize": 5}
    style |= {"marker": MARKERS[i % len(MARKERS)], "label": canvas.short(target, 18)}
    axis.plot([x for x, _ in line], values, **style)
    for (x, run), value in zip(line, values, strict=True):
        if target in run["noisy"]:
            axis.plot([x], [value], "o", color=canvas.INK, markerfacecolor="none", markersize=9)


def accuracies(history: Mapping[str, Any], name: str) -> str | None:
    """Clean top-1 in percent of the exported student of each run, with its interval. None without a figure."""
    runs = history["runs"]
    line = [(i, run) for i, run in enumerate(runs) if run["top1"] is not None]
    if not line:
        return None
    with canvas.styled():
        figure, axis = canvas.axes(WIDTH, PLOT + NAMES, below=NAMES)
        for x, run in line:
            ends = [100 * v for v in run["top1_ci"]]
            axis.plot([x, x], ends, "_-", color=COLOUR["student"], lw=1.1, markersize=7)
        values = [100 * run["top1"] for _, run in line]
        axis.plot([x for x, _ in line], values, "o-", color=COLOUR["student"], lw=1.4)
        axis.set_ylabel("clean top-1 (%)")
        _runs(axis, runs)
        return canvas.svg(figure, name, f"Clean top-1 of the student over {len(runs)} runs")


def _runs(axis: Any, runs: Sequence[Run]) -> None:
    """Names of the runs under the axis, at most five of them, the last always."""
    last = len(runs) - 1
    step = max(1, -(-last // 4))
    ticks = list(range(last, -1, -step))
    names = [canvas.short(runs[i]["name"], 12) for i in ticks]
    axis.set_xticks(ticks, names, rotation=25, ha="right", fontsize=SMALL)
    axis.set_xlim(-0.4, last + 0.4)
    axis.grid(axis="y")
