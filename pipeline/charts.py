"""The report's pictures: matplotlib figures turned into SVG that sits inline in one HTML page. Torch-free.

Colours leave here as CSS variables (`--ink`, `--rule`, `--s0` ... `--s5`), so that one picture is readable on a
light and on a dark page; ids carry the picture's name, so that several pictures share a page.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report import MODELS, fell_back, noisy

INK, RULE = "#010101", "#020202"  # stand-ins that matplotlib understands, replaced by CSS variables
SERIES = [f"#0300{i}0" for i in range(6)]
CSS = {INK: "var(--ink)", RULE: "var(--rule)"} | {s: f"var(--s{i})" for i, s in enumerate(SERIES)}
COLOUR = {"student": SERIES[1], "teacher": SERIES[0]}
MARKER = {"fp32": "o", "fp16": "D", "bf16": "D", "int8": "^"}
LEFT, RIGHT = 56, 8
LINE = ("-", "--", "-.", ":")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cakd",  # ids that do not change from run to run
    "text.parse_math": False,  # a `$` in a name is a `$`
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}
BARS = 30  # classes with a bar each
WIDTH, LINE_HEIGHT, LETTER = 400, 15, 5.6  # CSS pixels, at 72 to the inch


def _canvas(width: float, height: float, left: float, right: float, below: float) -> Any:
    """A figure of width x height pixels and its axes, with that many pixels left free around them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    box = (left / width, below / height, 1 - (left + right) / width, 1 - (below + 8) / height)
    return figure, figure.add_axes(box)


def _svg(figure: Any, name: str, label: str) -> str:
    """The figure as an `<svg>` element: same figure, same bytes; no date, no links, ids that begin with `name`."""
    buffer = io.StringIO()
    with warnings.catch_warnings():  # the page's fonts draw the text, not matplotlib's
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(buffer, format="svg", transparent=True)
    drop = r"<!--.*?-->\s*|<metadata>.*?</metadata>\s*|<defs>\s*<style.*?</style>\s*</defs>\s*"
    svg = re.sub(drop, "", buffer.getvalue(), flags=re.S)
    svg = svg[svg.index("<svg") :].replace("'DejaVu Sans'", "system-ui")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for stand_in, colour in CSS.items():
        svg = svg.replace(stand_in, colour)
    role = f' role="img" aria-label="{html.escape(label)}"'
    return re.sub(r' width="\S+" height="\S+"', lambda _: role, svg, count=1)


def _styled() -> Any:
    from matplotlib import style

    return style.context(["default", STYLE])


def _milliseconds(axis: Any, low: float, high: float) -> None:
    """A log axis from `low` to `high` ms with plain numbers at 1, 2, 5 of each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_xscale("log")
    axis.set_xlim(low, high)
    subs = (1, 2, 5) if high / low < 1000 else (1,)
    axis.xaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.grid(axis="x")
    axis.set_axisbelow(True)


def scatter(summary: Mapping[str, Any], name: str = "scatter") -> str | None:
    """Clean top-1 against latency, a point for each measured target and model; None where there is nothing.

    Both models are a row of points, labelled by flags that never overlap: above the upper, below the lower.
    """
    rows = {m: _points(summary, m) for m in MODELS}
    top1 = _accuracies(summary)
    if top1 is None or not all(rows.values()):
        return None
    lower, upper = sorted(MODELS, key=lambda m: top1[m])
    room = {m: LINE_HEIGHT * len(rows[m]) + 22 for m in MODELS}
    gap = min(110.0, max(34.0, 8 * (top1[upper] - top1[lower])))
    height = room[lower] + gap + room[upper]
    with _styled():
        figure, axis = _canvas(WIDTH, height + 46, LEFT, RIGHT, 38)
        _milliseconds(axis, *_span([p for row in rows.values() for p in row]))
        axis.set_ylim(0, height)
        levels = {lower: room[lower], upper: room[lower] + gap}
        for model, sign in ((lower, -1), (upper, 1)):
            _flags(axis, rows[model], levels[model], sign, COLOUR[model])
        axis.set_yticks([levels[m] for m in MODELS], [f"{top1[m]:.1f}" for m in MODELS])
        axis.set_xlabel("latency p50 (ms, log scale)")
        axis.set_ylabel("clean top-1 (%)")
        return _svg(figure, name, "Clean top-1 against latency of student and teacher, by target")


def _accuracies(summary: Mapping[str, Any]) -> dict[str, float] | None:
    names = {"student": summary["shipped"], "teacher": "teacher"}
    if not all(n in summary["models"] for n in names.values()):
        return None
    return {m: 100 * summary["models"][n]["clean"]["top1"] for m, n in names.items()}


def _points(summary: Mapping[str, Any], model: str) -> list[tuple[float, str, str, bool]]:
    """(p50 ms, label, marker, noisy) of each measured target, fastest first."""
    points = []
    for target in summary["targets"]:
        row = target[model]
        if row["status"] == "measured":
            p50, precision = row["wall_ms"]["p50"], row["precision_effective"]
            ran = f" (ran {precision})" if fell_back(row) else ""
            label = f"{target['target']}{ran}  {p50:.3g}"
            points.append((p50, label, MARKER.get(precision, "s"), noisy(row)))
    return sorted(points)


def _span(points: Sequence[tuple[float, str, str, bool]]) -> tuple[float, float]:
    """The shortest log axis, in ms, on which each label ends inside the picture."""
    low = min(p[0] for p in points) / 1.4
    width = WIDTH - LEFT - RIGHT
    decades = [math.log10(p[0] / low) / (1 - LETTER * len(p[1]) / width) for p in points]
    return low, low * 10 ** max(decades)


def _flags(axis: Any, points: Sequence[Any], y: float, sign: int, colour: str) -> None:
    """Points at height `y`, each with a pole and a label; the fastest flies highest, so no label meets a pole."""
    for i, (x, label, marker, is_noisy) in enumerate(points):
        top = y + sign * (14 + LINE_HEIGHT * (len(points) - 1 - i))
        axis.plot([x, x], [y, top + sign * 5], color=colour, lw=0.7)
        face = "none" if is_noisy else colour
        axis.plot([x], [y], marker, color=colour, markerfacecolor=face, markersize=7)
        axis.annotate(label, (x, top), (3, 0), textcoords="offset points", va="center", fontsize=9)


def strips(summary: Mapping[str, Any], name: str = "strips") -> str | None:
    """Latency distributions: a strip of samples per target and model with its median; None without samples."""
    shown = [t for t in summary["targets"] if any(t[m]["samples_ms"] for m in MODELS)]
    if not shown:
        return None
    values = [v for t in shown for m in MODELS for v in t[m]["samples_ms"]]
    height = 46 * len(shown)
    with _styled():
        figure, axis = _canvas(WIDTH, height + 46, 76, RIGHT, 38)
        _milliseconds(axis, min(values) / 1.3, max(values) * 1.3)
        axis.set_ylim(len(shown) - 0.5, -0.5)
        for y, target in enumerate(shown):
            for model, shift in zip(MODELS, (-0.17, 0.17)):
                _strip(axis, target[model], y + shift, COLOUR[model])
        axis.set_yticks(range(len(shown)), [t["target"] for t in shown])
        axis.tick_params(axis="y", length=0)
        axis.set_xlabel("latency (ms, log scale)")
        return _svg(figure, name, "Distribution of latency by target, student and teacher")


def _strip(axis: Any, row: Mapping[str, Any], y: float, colour: str) -> None:
    samples = row["samples_ms"]
    if not samples:
        return
    axis.plot(samples, [y] * len(samples), "o", color=colour, alpha=0.3, markersize=4, mew=0)
    p50 = row["wall_ms"]["p50"]
    axis.plot([p50, p50], [y - 0.16, y + 0.16], color=INK, lw=1.6)


def counts(by_series: Mapping[str, Sequence[int]], classes: Sequence[str], name: str) -> str:
    """Pictures a class: a stacked bar each, or above BARS classes how many classes have how many pictures."""
    series = {label: values for label, values in by_series.items() if any(values)}
    if len(classes) > BARS:
        return _histogram([sum(column) for column in zip(*series.values())], name)
    names = [c if len(c) <= 18 else f"{c[:17]}…" for c in classes]
    left = 32 + LETTER * 1.15 * max(map(len, names))
    with _styled():
        figure, axis = _canvas(WIDTH, 20 * len(names) + 46, left, RIGHT + 8, 38)
        start = [0] * len(names)
        for i, values in enumerate(series.values()):
            axis.barh(range(len(names)), values, 0.7, left=start, color=_series(i))
            start = [a + b for a, b in zip(start, values)]
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.set_yticks(range(len(names)), names)
        axis.tick_params(axis="y", length=0)
        _whole_numbers(axis.xaxis)
        axis.grid(axis="x")
        axis.set_axisbelow(True)
        axis.set_xlabel("images")
        axis.set_ylabel("class")
        return _svg(figure, name, f"Images a class: {', '.join(series)}")


def _histogram(totals: Sequence[int], name: str) -> str:
    with _styled():
        figure, axis = _canvas(WIDTH, 220, LEFT, RIGHT + 8, 38)
        end = max(totals) * 1.05 + 1
        axis.hist(totals, bins=[end * i / 30 for i in range(31)], color=SERIES[1])
        axis.set_xlim(0, end)
        for scale in (axis.xaxis, axis.yaxis):
            _whole_numbers(scale)
        axis.grid(axis="y")
        axis.set_axisbelow(True)
        axis.set_xlabel("images a class")
        axis.set_ylabel("classes")
        return _svg(figure, name, "How many classes have how many images")


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(5, integer=True))


def method_colours(methods: Sequence[str]) -> dict[str, str]:
    """Method -> CSS colour, in the order given; the same in every picture and legend."""
    return {m: CSS[_series(i)] for i, m in enumerate(methods)}


def _series(i: int) -> str:
    return SERIES[i % len(SERIES)]


def curves(training: Mapping[str, Any], name: str = "curves") -> list[tuple[str, str]]:
    """(term, picture) of each loss term, or accuracy kept beside them: a line for each method that has it."""
    methods = list(training)
    terms = dict.fromkeys(t for m in methods for t in training[m].get("curves", {}))
    pictures = []
    for number, term in enumerate(terms):
        lines = {m: training[m]["curves"][term] for m in methods if training[m]["curves"].get(term)}
        if lines:
            pictures.append((term, _curve(lines, methods, f"{name}{number}", term)))
    return pictures


def _curve(lines: Mapping[str, Any], methods: Sequence[str], name: str, term: str) -> str:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    with _styled():
        figure, axis = _canvas(310, 190, 58, 10, 36)
        for method, line in lines.items():
            i = methods.index(method)
            steps, values = zip(*line)
            axis.plot(steps, values, LINE[i % len(LINE)], color=_series(i), lw=1.6)
        low, high = axis.dataLim.y0, axis.dataLim.y1
        if low > 0 and high / low > 30:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axis.grid(axis="y")
        axis.set_axisbelow(True)
        axis.set_xlabel("step")
        axis.set_ylabel("fraction" if term.endswith("accuracy") else "loss")
        return _svg(figure, name, f"Training curve of the loss term {term}: {', '.join(lines)}")
