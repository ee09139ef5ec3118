"""The candidates as a table, and the sentences below it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from exporters.candidates.ranking import NOISE, Row, capacity_of, p50

WIDTH = 160  # of the table where the output is no terminal
HEADS = (
    *("candidate", "p50 (ms)", "95 %", "fits", "front", "MACs (M)", "params (M)", "MB", "RSS (MB)"),
    *("top-1 (%)", "tap", ""),
)
LEFT = (0, 3, 4, 10, 11)  # columns of text
BY = {"macs": "multiply-accumulates (capacity, not accuracy)", "imagenet_top1": "ImageNet top-1"}


def print_table(rows: Sequence[Row]) -> None:
    """Print the ranked rows; a row that was not measured ends with its reason, a noisy one with NOISY."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, head in enumerate(HEADS):
        justify: Any = "left" if i in LEFT else "right"
        table.add_column(head, justify=justify, overflow="fold", no_wrap=i == 0)
    for row in rows:
        table.add_row(*_cells(row))
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=WIDTH)
    console.print(table)


def _cells(row: Row) -> list[str]:
    """A row as text, a cell each of HEADS."""
    wall = row["wall_ms"]
    interval = "–".join(f"{bound:.3g}" for bound in wall["p50_ci"] or [])
    millions = [_number(row[key], 1e-6) for key in ("macs", "params")]
    sizes = [_number(row[key]) for key in ("size_mb", "rss_mb", "imagenet_top1")]
    tap = row["tap"] or ("none" if row["no_tap"] else "")
    remark = row["reason"] or "".join(row["flags"][:1])
    marks = [row["fits"] or "", row["front"] or ""]
    return [row["name"], _number(wall["p50"]), interval, *marks, *millions, *sizes, tap, remark]


def _number(value: float | None, scale: float = 1.0) -> str:
    return "" if value is None else f"{value * scale:.3g}"


def sentences(rows: Sequence[Row], budget_ms: float | None) -> list[str]:
    """What the table says: how many fit, the front, who cannot be tapped."""
    measured = [row for row in rows if row["status"] == "measured"]
    lines = []
    if budget_ms is not None:
        fitting = [row for row in measured if row["fits"] != "no"]
        lines.append(f"{len(fitting)} of {len(measured)} measured fit {budget_ms:g} ms")
        if fitting:
            largest = max(fitting, key=lambda row: row[capacity_of(measured)] or 0)
            lines[-1] += (
                f"; most {BY[capacity_of(measured)].split(' (')[0]}: {largest['name']}, {p50(largest):.3g} ms; "
                "train it as distill.student, or several as distill.students (docs/choose.md, 3)"
            )
    front = [row["name"] for row in measured if row["front"] == "front"]
    level = [row["name"] for row in measured if row["front"] == "level"]
    lines.append(
        f"front by {BY[capacity_of(measured)]}: {', '.join(front)}"
        + (f"; level within {100 * NOISE:.0f} %: {', '.join(level)}" if level else "")
    )
    if noise := sorted({flag for row in measured for flag in row["flags"][1:]}):
        lines.append(f"NOISY: {', '.join(noise)}")
    lines += [f"{row['name']}: no tap for CAKD: {row['no_tap']}" for row in rows if row["no_tap"]]
    return lines


def impossible(rows: Sequence[Row], budget_ms: float | None) -> str | None:
    """Why no candidate fits the budget, in a line; None where one does, or without a budget."""
    measured = [row for row in rows if row["status"] == "measured"]
    if budget_ms is None or any(row["fits"] != "no" for row in measured):
        return None
    fastest: Any = min(measured, key=p50)
    return (
        f"--budget-ms: got {budget_ms:g}; expected {p50(fastest):.3g} or more, the p50 of {fastest['name']}, the "
        "fastest candidate; raise the budget, lower --image-size, or name smaller --students"
    )
