"""Which student is exported: the best on the val images. The test images are not opened here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.core import artifacts
from pipeline.data.prepared import Prepared
from pipeline.evaluate.accuracy import figures, predict
from pipeline.models import checkpoint

SCHEMA = "cakd.selection/1"
SPLIT = "val"
BEST = "best"  # of export.method: not a method, the best one
FIGURES = ("top1", "nll", "n")
BATCH, BINS = 100, 15


@torch.no_grad()
def select(prepared: Prepared, students: Mapping[str, Path], asked: str = BEST) -> dict[str, Any]:
    """selection.json without schema and machine: every student on val, and the method that is exported.

    `students`: method to checkpoint, cheapest first. `asked`: export.method, `best` or one of the methods.
    """
    rows = prepared.rows(SPLIT)
    images, labels = prepared.images[rows], torch.from_numpy(prepared.labels[rows])
    judged = {}
    for method, path in students.items():
        model, description = checkpoint.load(path)
        found = figures(predict(model, images, description["preprocess"], BATCH), labels, BINS)
        judged[method] = {key: found[key] for key in FIGURES}
    selected, reason = choose(judged, asked)
    made_by = artifacts.provenance({"method": asked, "methods": list(students)}, **students)
    return {
        "split": SPLIT,
        "methods": judged,
        "selected": selected,
        "reason": reason,
        "provenance": made_by | prepared.made_of(),
    }


def choose(judged: Mapping[str, Mapping[str, Any]], asked: str = BEST) -> tuple[str, str]:
    """The exported method and why: the best top-1; of equal ones the lower NLL, then the earlier in `judged`."""
    best = min(judged, key=lambda method: (-judged[method]["top1"], judged[method]["nll"]))
    top1 = judged[best]["top1"]
    share = f"{100 * top1:.1f} % of {judged[best]['n']} images"
    if asked != BEST:
        rank = "which is the best" if asked == best else f"where {best} is the best with"
        own = "" if asked == best else f"{100 * judged[asked]['top1']:.1f} % top-1 on val, "
        return asked, f"export.method names it; {own}{rank} top-1 on val, {share}"
    equal = [method for method in judged if method != best and judged[method]["top1"] == top1]
    if not equal:
        return best, f"best top-1 on val, {share}"
    lower = all(judged[method]["nll"] > judged[best]["nll"] for method in equal)
    by = "lower NLL" if lower else "lower NLL or its place in distill.methods"
    return best, f"best top-1 on val, {share}, as {', '.join(equal)}; chosen by {by}"
