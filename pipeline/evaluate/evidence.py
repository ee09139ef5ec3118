"""What the figures are made of: what is taken for what, the surest mistakes, and where the models look."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core import artifacts
from pipeline.data import views
from pipeline.data.prepared import UNLABELLED, Prepared, spread
from pipeline.distill.kernels.reference import heads
from pipeline.distill.methods import cakd
from pipeline.evaluate.accuracy import Evaluate, predict
from pipeline.models import checkpoint, teacher
from pipeline.models.student import Taps

SCHEMA = "cakd.evidence/1"
MISTAKES, PICTURES = 12, 6


def gather(
    config: Evaluate, prepared: Prepared, teacher_path: Path, students: list[Path]
) -> dict[str, Any]:
    """Confusion and surest mistakes of every model on the labelled pictures of the split, and attention maps.

    As evidence.json holds it, without schema and machine. Rows are those of the prepared folder.
    """
    rows = prepared.rows(config.split)
    rows = rows[prepared.labels[rows] != UNLABELLED]
    live = teacher.load(teacher_path)
    judged = {"teacher": errors(live.tail.vit, live.description, prepared, rows, config.batch)}
    chosen = one_a_class(prepared, rows)
    batch = views.whole(prepared.images[chosen])
    taught = live(batch)
    looks = {}
    if taught.qkv is not None:
        looks["teacher"] = received_attention(*heads(taught.qkv)[:2])
    for path in students:
        model, description = checkpoint.load(path)
        judged[description["method"]] = errors(model, description, prepared, rows, config.batch)
        projected = projected_attention(path.parent, model, description, batch)
        if projected is not None:
            looks[description["method"]] = projected
    inputs = {"teacher": teacher_path} | {p.parent.name: p for p in students}
    return {
        "split": config.split,
        "classes": list(prepared.classes),
        "models": judged,
        "attention": {
            "grid": list(live.description["grid"]),
            "rows": chosen.tolist(),
            "received": {name: _rounded(maps) for name, maps in looks.items()},
        },
        "provenance": artifacts.provenance(config.__dict__, **inputs) | prepared.made_of(),
    }


def errors(
    model: torch.nn.Module,
    description: dict[str, Any],
    prepared: Prepared,
    rows: NDArray[np.int64],
    batch: int,
) -> dict[str, Any]:
    """`confusion` as [true, predicted, count], and the `mistakes` with the highest confidence, a fraction."""
    logits = predict(model, prepared.images[rows], description["preprocess"], batch)
    confidence, predicted = (t.numpy() for t in logits.softmax(dim=1).max(dim=1))
    labels = prepared.labels[rows]
    counts = Counter(zip(labels.tolist(), predicted.tolist(), strict=True))
    wrong = np.flatnonzero(predicted != labels)
    surest = wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES]
    return {
        "confusion": [[true, said, n] for (true, said), n in sorted(counts.items())],
        "mistakes": [
            {
                "row": int(rows[i]),
                "label": int(labels[i]),
                "predicted": int(predicted[i]),
                "confidence": round(float(confidence[i]), 4),
            }
            for i in surest
        ],
    }


def one_a_class(prepared: Prepared, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """PICTURES rows spread over the classes, the first picture of each; fewer where there are fewer classes."""
    _, first = np.unique(prepared.labels[rows], return_index=True)
    return spread(rows[first], PICTURES)


def received_attention(q: Tensor, k: Tensor) -> Tensor:
    """Q, K (B, H, N, d) -> (B, N): the attention each patch receives, 1 where it were uniform.

    N times the mean over heads and queries of softmax(Q K^T / sqrt(d)), the weights inside eq. 2, over the N patch
    tokens: prefix tokens cut off, no swap.
    """
    weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)
    return q.shape[2] * weights.mean(dim=(1, 2))


@torch.no_grad()
def projected_attention(
    folder: Path, student: torch.nn.Module, description: dict[str, Any], batch: Tensor
) -> Tensor | None:
    """The same of the student's projected Q_S, K_S (eq. 1) on views (B, 3, S, S); None without projectors.

    `folder` holds the student's projectors.
    """
    projectors = cakd.load_projectors(folder, description)
    if projectors is None:
        return None
    with Taps(student, [projectors.tap.module]) as taps:
        student(views.normalise(batch, description["preprocess"]))
        feature = taps.features[projectors.tap.module]
    return received_attention(*heads(projectors.pca(feature))[:2])


def _rounded(maps: Tensor) -> list[list[float]]:
    return [[round(v, 3) for v in row] for row in maps.tolist()]
