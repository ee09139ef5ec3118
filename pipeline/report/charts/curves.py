"""Training curves: a chart for each loss term, a line for each method. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.charts import canvas

LINE = {"-": "none", "--": "6 3", "-.": "8 3 2 3", ":": "2 3"}  # and as dashes of an SVG


def keys(methods: Sequence[str]) -> list[tuple[str, str, str]]:
    """(method, CSS colour, dashes) of its line in every chart, for the legend."""
    dashes = list(LINE.values())
    colours = canvas.series_colours(methods)
    return [(method, colours[method], dashes[i % len(LINE)]) for i, method in enumerate(methods)]


def draw_all(training: Mapping[str, Any], name: str = "curves") -> list[tuple[str, str]]:
    """(term, chart) of each loss term and recorded accuracy: a line for each method that has it."""
    methods = list(training)
    terms = dict.fromkeys(t for m in methods for t in training[m].get("curves", {}))
    charts = []
    for number, term in enumerate(terms):
        lines = {m: training[m]["curves"][term] for m in methods if training[m]["curves"].get(term)}
        if lines:
            charts.append((term, _curve(lines, methods, f"{name}{number}", term)))
    return charts


def _curve(lines: Mapping[str, Any], methods: Sequence[str], name: str, term: str) -> str:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    with canvas.styled():
        figure, axis = canvas.axes(310, 190, 58, 10, 36)
        for method, line in lines.items():
            i = methods.index(method)
            steps, values = zip(*line, strict=True)
            axis.plot(steps, values, list(LINE)[i % len(LINE)], color=canvas.series(i), lw=1.6)
        low, high = axis.dataLim.y0, axis.dataLim.y1
        if low > 0 and high / low > 30:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axis.grid(axis="y")
        axis.set_xlabel("step")
        unit = "gradient ratio" if term.startswith("ratio_") else "loss"
        axis.set_ylabel("fraction" if term.endswith("accuracy") else unit)
        return canvas.svg(
            figure, name, f"Training curve of the loss term {term}: {', '.join(lines)}"
        )
