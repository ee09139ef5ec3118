"""Selection of the student to export: the best on val. The test images are not opened here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.core import artifacts
from pipeline.core.students import BEST
from pipeline.data.prepared import Prepared
from pipeline.evaluate.accuracy import chunks, figures, predict
from pipeline.models import checkpoint

SCHEMA = "cakd.selection/1"
SPLIT = "val"
FIGURES = ("top1", "nll", "n")


def score(
    model: nn.Module, preprocess: dict[str, Any], prepared: Prepared, crop_pct: float = 1.0
) -> dict[str, Any]:
    """Compute top1, nll and n of a model on the clean images of val; `crop_pct`: evaluate.crop_pct."""
    rows = prepared.rows(SPLIT)
    labels = torch.from_numpy(prepared.labels[rows])
    logits = [predict(model, images, preprocess) for _, images in chunks(prepared, rows, crop_pct)]
    result = figures(torch.cat(logits), labels)
    return {key: result[key] for key in FIGURES}


def select(
    prepared: Prepared,
    students: Mapping[str, Path],
    requested: str = BEST,
    crop_pct: float = 1.0,
) -> dict[str, Any]:
    """Evaluate every student on val and select one; returns selection.json without schema and machine.

    `students`: method to checkpoint, cheapest first. `requested`: export.method, `best` or one of the methods.
    """
    scores = {}
    for method, path in students.items():
        model, description = checkpoint.load(path)
        scores[method] = score(model, description["preprocess"], prepared, crop_pct)
    selected, reason = choose(scores, requested)
    provenance = artifacts.provenance(
        {"method": requested, "methods": list(students), "crop_pct": crop_pct}, **students
    )
    return {
        "split": SPLIT,
        "methods": scores,
        "selected": selected,
        "reason": reason,
        "provenance": provenance | prepared.hashes(),
    }


def select_student(
    prepared: Prepared,
    students: Mapping[str, Mapping[str, Path]],
    latency: Mapping[str, Any],
    budgets: Mapping[str, float],
    requested: tuple[str, str],
    crop_pct: float = 1.0,
) -> dict[str, Any]:
    """Select the method of every student, and of the students the one that is exported.

    `students`: name -> method -> checkpoint. `latency`: students.json. `requested`: export.student, export.method.
    Chosen is the best on val of those that keep the budgets of latency, size and parameters; where none does, the
    best of all, which the report then fails.
    """
    student, method = requested
    found = {
        name: select(prepared, methods, method, crop_pct) for name, methods in students.items()
    }
    best = {name: result["methods"][result["selected"]] for name, result in found.items()}
    over = {name: over_budget(name, latency["targets"], budgets) for name in found}
    chosen, reason = choose_student(best, over, student)
    own = found[chosen]
    return {
        **own,
        "reason": f"{own['reason']}; of {len(found)} students: {reason}",
        "student": chosen,
        "students": {
            name: {"method": found[name]["selected"], **best[name], "over_budget": over[name]}
            for name in found
        },
    }


def over_budget(
    name: str, targets: Mapping[str, Sequence[Mapping[str, Any]]], budgets: Mapping[str, float]
) -> list[str]:
    """The budgets that a student does not keep, in words: `wall_ms_max 5 (6.21 ms on ort-fp32)`.

    A budget without a target holds the best target. What was not measured breaks nothing.
    """
    rows = {
        target: row for target, listed in targets.items() for row in listed if row["name"] == name
    }
    broken = []
    for budget, limit in budgets.items():
        wanted, _, quantity = budget.rpartition(".")
        if quantity not in COSTS:
            continue
        costs = [
            (value, target)
            for target, row in rows.items()
            if wanted in ("", target) and (value := COSTS[quantity](row)) is not None
        ]
        if costs and min(costs)[0] > limit:
            value, target = min(costs)
            broken.append(f"{budget} {limit:g} ({value:.4g} on {target})")
    return broken


COSTS: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "wall_ms_max": lambda row: row["wall_ms"]["p50"],
    "size_mb_max": lambda row: row["size_mb"],
    "params_max": lambda row: row["params"],
}


def choose_student(
    best: Mapping[str, Mapping[str, Any]], over: Mapping[str, Sequence[str]], requested: str = BEST
) -> tuple[str, str]:
    """Choose the student and give the reason: within the budgets best top-1, then lower NLL, then order."""
    if requested != BEST:
        return requested, f"{requested}, which export.student names"
    within = [name for name in best if not over[name]]
    chosen = min(within or best, key=lambda name: (-best[name]["top1"], best[name]["nll"]))
    if not within:
        return (
            chosen,
            f"{chosen}, the best of all, as none keeps the budgets: {'; '.join(over[chosen])}",
        )
    out = [name for name in best if over[name]]
    left = f"; over a budget: {', '.join(out)}" if out else ""
    return chosen, f"{chosen}, the best on val within the budgets{left}"


def choose(scores: Mapping[str, Mapping[str, Any]], requested: str = BEST) -> tuple[str, str]:
    """Choose the exported method and give the reason: best top-1, then lower NLL, then order in `scores`."""
    best = min(scores, key=lambda method: (-scores[method]["top1"], scores[method]["nll"]))
    top1 = scores[best]["top1"]
    share = f"{100 * top1:.1f} % of {scores[best]['n']} images"
    if requested != BEST:
        rank = "which is the best" if requested == best else f"where {best} is the best with"
        own = "" if requested == best else f"{100 * scores[requested]['top1']:.1f} % top-1 on val, "
        return requested, f"export.method names it; {own}{rank} top-1 on val, {share}"
    equal = [method for method in scores if method != best and scores[method]["top1"] == top1]
    if not equal:
        return best, f"best top-1 on val, {share}"
    lower = all(scores[method]["nll"] > scores[best]["nll"] for method in equal)
    by = "lower NLL" if lower else "lower NLL or its place in distill.methods"
    return best, f"best top-1 on val, {share}, as {', '.join(equal)}; chosen by {by}"
