"""Several students of one run: accuracy and latency of each, the front, the budgets, the choice. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.pareto import wilson

Row = dict[str, Any]


def family(
    accuracy: Mapping[str, Any], selection: Mapping[str, Any], students: Mapping[str, Any]
) -> dict[str, Any] | None:
    """`rows` of every student and method with the latency on `target`, the first that was measured; None for one.

    A row: student, method, top1 and its interval, noisy, params, p50 and its interval in ms (untrained: the same
    network costs the same), `selected`: the method chosen on val, `exported`, `over_budget`, `front`.
    """
    listed = selection.get("students")
    if not listed:
        return None
    target, latency = _measured(students["targets"])
    models = {**accuracy.get("students", {})}
    exported = selection["student"]
    models[exported] = {m: f for m, f in accuracy["models"].items() if m != "teacher"}
    rows = [
        _row(name, method, model, listed[name], latency.get(name))
        | {"exported": (name, method) == (exported, selection["selected"])}
        for name in listed
        for method, model in models.get(name, {}).items()
    ]
    best = _front([row for row in rows if row["selected"] and row["p50_ms"] is not None])
    for row in rows:
        row["front"] = row in best
    return {"target": target, "rows": rows}


def _measured(targets: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[str | None, Row]:
    """The first target where a student was measured, and its rows by student."""
    for target, rows in targets.items():
        found = {row["name"]: row for row in rows if row["status"] == "measured"}
        if found:
            return target, found
    return None, {}


def _row(
    name: str,
    method: str,
    model: Mapping[str, Any],
    judged: Mapping[str, Any],
    latency: Mapping[str, Any] | None,
) -> Row:
    clean = model["clean"]
    wall = latency["wall_ms"] if latency else {"p50": None, "p50_ci": None}
    return {
        "student": name,
        "method": method,
        "top1": clean["top1"],
        "top1_ci": list(wilson(clean["top1"], clean["n"])),
        "noisy": model["noisy"]["top1"],
        "params": model["params"],
        "p50_ms": wall["p50"],
        "p50_ci": wall["p50_ci"],
        "selected": judged["method"] == method,
        "over_budget": judged["over_budget"],
    }


def _front(rows: Sequence[Row]) -> list[Row]:
    """Of the students' selected rows those that no faster one equals in accuracy."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda r: (r["p50_ms"], -r["top1"])):
        if not best or row["top1"] > best[-1]["top1"]:
            best.append(row)
    return best
