"""Which candidates fit a budget, and which are on the front of capacity against latency."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.core.errors import UserError

# Two processes of one artefact differ by as much (docs/latency.md): closer candidates are level.
NOISE = 0.05

Row = dict[str, Any]


def rank(rows: Sequence[Row], budget_ms: float | None) -> list[Row]:
    """The rows, fastest first and unmeasured last, with `fits` and `front`.

    fits: yes, no, level (the budget is within the noise of the p50), None without a budget. front: `front` where
    no faster candidate has as much capacity, `level` where that holds but for the noise, else None. Capacity is
    the ImageNet top-1 where every measured row has one, else multiply-accumulates.
    """
    measured = sorted((r for r in rows if r["status"] == "measured"), key=p50)
    capacity = capacity_of(measured)
    ranked = []
    for row in measured:
        better = [
            r for r in measured if r is not row and (r[capacity] or 0) >= (row[capacity] or 0)
        ]
        faster = [r for r in better if p50(r) <= p50(row)]
        clearly = [r for r in faster if p50(r) * (1 + NOISE) < p50(row)]
        front = None if clearly else "level" if faster else "front"
        ranked.append({**row, "fits": _fits(row, budget_ms), "front": front})
    others = [{**r, "fits": None, "front": None} for r in rows if r["status"] != "measured"]
    return ranked + others


def p50(row: Row) -> float:
    """The wall p50 of a measured row, ms."""
    value: float = row["wall_ms"]["p50"]
    return value


def capacity_of(measured: Sequence[Row]) -> str:
    """The key by which rows are compared beside their latency: `imagenet_top1` or `macs`."""
    return "imagenet_top1" if measured and all(r["imagenet_top1"] for r in measured) else "macs"


def _fits(row: Row, budget_ms: float | None) -> str | None:
    if budget_ms is None:
        return None
    if budget_ms / (1 + NOISE) < p50(row) < budget_ms * (1 + NOISE):
        return "level"
    return "yes" if p50(row) <= budget_ms else "no"


def imagenet_top1(path: Path) -> dict[str, float]:
    """timm's results file (`results-imagenet.csv`) -> the best top-1 of each architecture, percent.

    Raises UserError: no such file, no columns `model` and `top1`, a top-1 that is no number.
    """
    best: dict[str, float] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for line in csv.DictReader(file):
                model = line["model"].split(".")[0]
                best[model] = max(best.get(model, 0.0), float(line["top1"]))
    except (OSError, KeyError, ValueError, AttributeError, TypeError, csv.Error) as error:
        raise UserError(
            f"--results {path}: not a CSV with columns model and top1 ({type(error).__name__}: {error}); give "
            "results-imagenet.csv of timm's repository"
        ) from None
    return best
