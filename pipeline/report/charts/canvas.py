"""Common style and axes of the charts; a matplotlib figure as SVG in an HTML page. Torch-free.

Colours leave here as CSS variables (`--ink`, `--rule`, `--s0` ... `--s5`), so that a chart is readable on a
light and on a dark page; ids carry the chart's name, so that several charts share a page.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Sequence
from typing import Any

INK, RULE = "#010101", "#020202"  # stand-ins that matplotlib understands, replaced by CSS variables
SERIES = [f"#0300{i}0" for i in range(6)]
CSS = {INK: "var(--ink)", RULE: "var(--rule)"} | {s: f"var(--s{i})" for i, s in enumerate(SERIES)}
COLOUR = {"student": SERIES[1], "teacher": SERIES[0]}
LIMIT = SERIES[2]  # of budgets
WIDTH, LINE_HEIGHT, LETTER = 360, 15, 5.6  # CSS pixels, at 72 to the inch
LEFT, RIGHT, BELOW = 50, 8, 38
SMALL = 9
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
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


def styled() -> Any:
    """The matplotlib context in which a chart is drawn and written."""
    from matplotlib import style

    return style.context(["default", STYLE])


def axes(
    width: float, height: float, left: float = LEFT, right: float = RIGHT, below: float = BELOW
) -> Any:
    """A figure of width x height pixels and its axes, with that many pixels left free around them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    box = (left / width, below / height, 1 - (left + right) / width, 1 - (below + 8) / height)
    return figure, figure.add_axes(box)


def svg(figure: Any, name: str, label: str) -> str:
    """The figure as an `<svg>` element: same figure, same bytes; no date, no links, ids that begin with `name`."""
    buffer = io.StringIO()
    with warnings.catch_warnings():  # the page's fonts draw the text, not matplotlib's
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(buffer, format="svg", transparent=True)
    drop = r"<!--.*?-->\s*|<metadata>.*?</metadata>\s*|<defs>\s*<style.*?</style>\s*</defs>\s*"
    text = re.sub(drop, "", buffer.getvalue(), flags=re.S)
    text = text[text.index("<svg") :].replace("'DejaVu Sans'", "system-ui")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for stand_in, colour in CSS.items():
        text = text.replace(stand_in, colour)
    role = f' role="img" aria-label="{html.escape(label)}"'
    return re.sub(r' width="\S+" height="\S+"', lambda _: role, text, count=1)


def series(i: int) -> str:
    """The stand-in of the i-th colour; they repeat."""
    return SERIES[i % len(SERIES)]


def series_colours(names: Sequence[str]) -> dict[str, str]:
    """Name -> CSS colour, in the order given; the same in every chart and legend."""
    return {name: CSS[series(i)] for i, name in enumerate(names)}


def logarithmic(axis: Any, low: float, high: float, which: str = "x") -> None:
    """A log axis from `low` to `high` with plain numbers at 1, 2, 5 of each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set(**{f"{which}scale": "log", f"{which}lim": (low, high)})
    scale = axis.xaxis if which == "x" else axis.yaxis
    subs = (1, 2, 5) if high / low < 300 else (1,)
    scale.set_major_locator(LogLocator(subs=subs, numticks=20))
    scale.set_minor_locator(NullLocator())
    scale.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.grid(axis=which)


def whole_numbers(scale: Any) -> None:
    """Ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    scale.set_major_locator(MaxNLocator(5, integer=True))


def named_rows(axis: Any, names: Sequence[str], positions: Sequence[float]) -> None:
    """A name at each height, without a tick."""
    axis.set_yticks(positions, [short(name, 20) for name in names])
    axis.tick_params(axis="y", length=0)


def write(
    axis: Any, position: tuple[float, float], offset: tuple[float, float], text: str, **style: Any
) -> None:
    """Small text at a position in data coordinates, moved by an offset in points."""
    defaults = {"textcoords": "offset points", "va": "center", "fontsize": SMALL}
    axis.annotate(text, position, offset, **defaults, **style)


def room_for(names: Sequence[str]) -> float:
    """Pixels left of the axes that the longest of these names needs."""
    return 14 + LETTER * 1.1 * max(len(short(name, 20)) for name in names)


def short(name: str, letters: int) -> str:
    """The name with that many letters at most."""
    return name if len(name) <= letters else f"{name[: letters - 1]}…"
