"""Limits on accuracy, latency, size and parameters, and whether the exported student meets them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.core.errors import UserError, nearest
from pipeline.report.gain import gain
from pipeline.report.verdict import noisy

MAX_BUDGET = 1e15  # of a budget: no file, time or network is larger

BUDGETS = {  # name in `report.budgets` -> how it is read in a sentence
    "top1_min": "clean top-1 (fraction)",
    "gain_min": "clean top-1 less plain's (points)",
    "wall_ms_max": "latency p50 (ms)",
    "size_mb_max": "file size (MB)",
    "params_max": "parameters",
}
OF_TARGET = {"wall_ms_max", "size_mb_max"}
BUDGET_NAME = r"^(([a-z0-9-]+\.)?(wall_ms_max|size_mb_max)|top1_min|gain_min|params_max)$"


def check_targets(budgets: Iterable[str], targets: Sequence[str]) -> None:
    """Raise UserError where a budget names a target that is not measured."""
    for name in budgets:
        target = name.rpartition(".")[0]
        if target and target not in targets:
            raise UserError(
                f"report.budgets: {name!r} names a target that is not in bench.enabled; "
                f"{nearest(target, targets)}"
            )


def judge_budget(summary: Mapping[str, Any], name: str, limit: float) -> dict[str, Any]:
    """A budget and its verdict: PASS, FAIL, NOT MEASURED, or INCONCLUSIVE where noise alone is above the limit."""
    requested, _, quantity = name.rpartition(".")
    what = BUDGETS[quantity]
    best: tuple[float, float] | None = None  # the figure, and the lowest it can be without noise
    if quantity in OF_TARGET:
        figures = [
            (_bounds(t["student"], quantity), t["target"])
            for t in summary["targets"]
            if requested in ("", t["target"]) and t["student"]["status"] == "measured"
        ]
        if figures:
            best, target = min(figures)
            what = f"{what} of {target}"
    elif summary["shipped"] in summary["models"]:
        figure = _figure(summary, quantity)
        best = None if figure is None else (figure, figure)
    verdict = "NOT MEASURED"
    if best is not None:
        met = best[0] >= limit if quantity.endswith("_min") else best[0] <= limit
        noise = quantity == "wall_ms_max" and best[1] <= limit
        verdict = "PASS" if met else "INCONCLUSIVE" if noise else "FAIL"
    return {
        "name": name,
        "what": what,
        "limit": limit,
        "value": best[0] if best else None,
        "verdict": verdict,
    }


def _figure(summary: Mapping[str, Any], quantity: str) -> float | None:
    """A quantity of the exported student that does not depend on the target; None where not measured."""
    shipped = summary["models"][summary["shipped"]]
    if quantity == "gain_min":
        gained = gain(summary)
        return gained.points if gained else None
    figure: float = shipped["clean"]["top1"] if quantity == "top1_min" else shipped["params"]
    return figure


def _bounds(row: Mapping[str, Any], quantity: str) -> tuple[float, float]:
    if quantity == "size_mb_max":
        return row["size_mb"], row["size_mb"]
    wall = row["wall_ms"]
    return wall["p50"], wall["min"] if noisy(row) else wall["p50"]
