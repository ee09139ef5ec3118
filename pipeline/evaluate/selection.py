"""Selection of the student to export: the best on val. The test images are not opened here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.core import artifacts
from pipeline.data.prepared import Prepared
from pipeline.evaluate.accuracy import chunks, figures, predict
from pipeline.models import checkpoint

SCHEMA = "cakd.selection/1"
SPLIT = "val"
BEST = "best"  # a value of export.method beside the methods: select on val
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
