"""Teacher and students on held-out images, each loaded once: their accuracy and its evidence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core import artifacts
from pipeline.data import views
from pipeline.data.prepared import Prepared
from pipeline.distill.kernels.reference import attention, heads
from pipeline.distill.methods.cakd import Projectors, load_projectors
from pipeline.evaluate import evidence
from pipeline.evaluate.accuracy import Evaluate, accuracy, judged_rows
from pipeline.evaluate.corruptions import NOISE
from pipeline.evaluate.paired import Hits, against
from pipeline.models import checkpoint, teacher
from pipeline.models.student import Taps

Document = dict[str, Any]


@torch.no_grad()
def evaluate(
    config: Evaluate, prepared: Prepared, teacher_path: Path, students: Sequence[Path]
) -> tuple[Document, Document]:
    """accuracy.json and evidence.json of the teacher and every student, without schema and machine."""
    live = teacher.load(teacher_path)
    rows = judged_rows(prepared, config)
    shown = evidence.one_a_class(prepared, rows)
    batch = views.whole(prepared.images[shown])
    figures: Document = {}
    errors: Document = {}
    maps: dict[str, Tensor] = {}
    hits: dict[str, Hits] = {}

    def judge(name: str, model: nn.Module, description: Document) -> None:
        found, logits = accuracy(model, description["preprocess"], prepared, config)
        figures[name] = found | _facts(model, description, prepared)
        errors[name] = evidence.errors(logits, prepared, rows)
        hits[name] = logits.argmax(dim=1).numpy() == prepared.labels[rows]

    judge("teacher", live.tail.vit, live.description)
    taught = live(batch)
    if taught.qkv is not None:
        maps["teacher"] = evidence.received_attention(*heads(taught.qkv)[:2])
    for path in students:
        student, description = checkpoint.load(path)
        method = description["method"]
        judge(method, student, description)
        projectors = load_projectors(path.parent, description)
        if projectors is None:
            continue
        with Taps(student, [projectors.tap.module]) as taps:
            projected = Projected(student, description["preprocess"], projectors, taps)
            figures[method]["cosine"] = similarity(projected, live, prepared, config)
            maps[method] = projected.received_attention(batch)
    for name, found in against(hits).items():
        figures[name]["against"] = found
    common = {"split": config.split, "classes": list(prepared.classes)}
    inputs = {"teacher": teacher_path} | {p.parent.name: p for p in students}
    made_by = artifacts.provenance(config.__dict__, **inputs) | prepared.made_of()
    looks = evidence.attention_maps(maps, list(live.description["grid"]), shown)
    return (
        {**common, "noise": list(NOISE), "models": figures, "provenance": made_by},
        {**common, "models": errors, "attention": looks, "provenance": made_by},
    )


def _facts(model: nn.Module, description: Document, prepared: Prepared) -> Document:
    """What accuracy.json holds of a model beside its accuracy."""
    train = prepared.rows("train")
    return {
        **checkpoint.count(model, prepared.image_size),
        "model": description["model"],
        "seed": description["seed"],
        "labels_seen": description["labels_seen"],
        "labels_total": int((prepared.labels[train] >= 0).sum()),
        "images_seen": len(train),
    }


class Projected:
    """A CAKD student seen through its two projectors; `taps` keeps its feature map."""

    def __init__(
        self, student: nn.Module, preprocess: Document, projectors: Projectors, taps: Taps
    ) -> None:
        self._student, self._preprocess, self._taps = student, preprocess, taps
        self.projectors = projectors

    def feature(self, batch: Tensor) -> Tensor:
        """Views (B, 3, S, S) -> the tapped map (B, c, h, w)."""
        self._student(views.normalise(batch, self._preprocess))
        return self._taps.features[self.projectors.tap.module]

    def received_attention(self, batch: Tensor) -> Tensor:
        """(B, N): the attention each patch receives under the projected Q_S, K_S (eq. 1)."""
        return evidence.received_attention(*heads(self.projectors.pca(self.feature(batch)))[:2])


@torch.no_grad()
def similarity(
    projected: Projected, live: teacher.Teacher, prepared: Prepared, config: Evaluate
) -> dict[str, float]:
    """Mean cosine between teacher and student in the projected spaces, over all images of the split.

    `attention`: a head's output at a token; `tokens`: h at a token.
    """
    rows = prepared.rows(config.split)
    live.tail.read_at(projected.projectors.config.layer)
    sums = {"attention": 0.0, "tokens": 0.0}
    for at in range(0, len(rows), config.batch):
        batch = views.whole(prepared.images[rows[at : at + config.batch]])
        attended, tokens = projected.projectors.projected(projected.feature(batch))
        taught = live(batch)
        for name, mine, theirs in (
            ("attention", attended, attention(*heads(taught.attention_inputs))),
            ("tokens", tokens, projected.projectors.target(taught.h)),
        ):
            cosine = F.cosine_similarity(mine, theirs, dim=-1).flatten(1).mean(1)
            sums[name] += cosine.sum().item()
    return {name: total / len(rows) for name, total in sums.items()}
