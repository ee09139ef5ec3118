"""Images per class: a bar for each class, or a histogram of many classes. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.report.charts import canvas

BARS = 30  # classes with a bar each


def draw(by_series: Mapping[str, Sequence[int]], classes: Sequence[str], name: str) -> str:
    """A stacked bar for each class; above BARS classes a histogram of the images per class."""
    series = {label: values for label, values in by_series.items() if any(values)}
    if len(classes) > BARS:
        return _histogram([sum(column) for column in zip(*series.values(), strict=True)], name)
    names = [c if len(c) <= 18 else f"{c[:17]}…" for c in classes]
    left = 32 + canvas.LETTER * 1.15 * max(map(len, names))
    with canvas.styled():
        figure, axis = canvas.axes(canvas.WIDTH, 20 * len(names) + 46, left, canvas.RIGHT + 8, 38)
        start = [0] * len(names)
        for i, values in enumerate(series.values()):
            axis.barh(range(len(names)), values, 0.7, left=start, color=canvas.series(i))
            start = [a + b for a, b in zip(start, values, strict=True)]
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.set_yticks(range(len(names)), names)
        axis.tick_params(axis="y", length=0)
        canvas.whole_numbers(axis.xaxis)
        axis.grid(axis="x")
        axis.set_xlabel("images")
        axis.set_ylabel("class")
        return canvas.svg(figure, name, f"Images per class: {', '.join(series)}")


def _histogram(totals: Sequence[int], name: str) -> str:
    with canvas.styled():
        figure, axis = canvas.axes(canvas.WIDTH, 220, canvas.LEFT, canvas.RIGHT + 8, 38)
        end = max(totals) * 1.05 + 1
        axis.hist(totals, bins=[end * i / 30 for i in range(31)], color=canvas.SERIES[1])
        axis.set_xlim(0, end)
        for scale in (axis.xaxis, axis.yaxis):
            canvas.whole_numbers(scale)
        axis.grid(axis="y")
        axis.set_xlabel("images per class")
        axis.set_ylabel("classes")
        return canvas.svg(figure, name, "Histogram of the images per class")
