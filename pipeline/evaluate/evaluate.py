"""Evaluation of the teacher and every student in one pass, each loaded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from pipeline.evaluate.accuracy import Evaluate, accuracy, chunks, labelled_rows
from pipeline.evaluate.corruptions import NOISE
from pipeline.evaluate.paired import Hits, against
from pipeline.models import checkpoint, teacher
from pipeline.models.student import Taps
from pipeline.training.compute import pick_device
from pipeline.training.ranks import SINGLE_PROCESS

Document = dict[str, Any]


@torch.no_grad()
def evaluate(
    config: Evaluate,
    prepared: Prepared,
    teacher_path: Path,
    students: Sequence[Path],
    others: Mapping[str, Sequence[Path]] | None = None,
) -> tuple[Document, Document]:
    """Build accuracy.json and evidence.json of the teacher and every student, without schema and machine.

    others: by the name of a student that is not exported its checkpoints, of which only the accuracy is told.
    """
    device = pick_device(config.device, "evaluate.device", SINGLE_PROCESS)
    live = teacher.load(teacher_path).to(device)
    rows = labelled_rows(prepared, config)
    map_rows = evidence.one_per_class(prepared, rows)
    batch = views.whole(prepared.images.squares(map_rows, config.crop_pct)).to(device)
    figures: Document = {}
    errors: Document = {}
    maps: dict[str, Tensor] = {}
    hits: dict[str, Hits] = {}

    def add(name: str, model: nn.Module, description: Document) -> None:
        result, logits = accuracy(model, description["preprocess"], prepared, config)
        figures[name] = result | _facts(model, description, prepared)
        errors[name] = evidence.errors(logits, prepared, rows)
        hits[name] = logits.argmax(dim=1).numpy() == prepared.labels[rows]

    add("teacher", live.tail.vit, live.description)
    outputs = live(batch)
    if outputs.qkv is not None:
        maps["teacher"] = evidence.received_attention(*heads(outputs.qkv)[:2]).cpu()
    for path in students:
        student, description = checkpoint.load(path)
        student.to(device)
        method = description["method"]
        add(method, student, description)
        projectors = load_projectors(path.parent, description)
        if projectors is None:
            continue
        projectors.to(device)
        with Taps(student, [projectors.tap.module]) as taps:
            projected = Projected(student, description["preprocess"], projectors, taps)
            figures[method]["cosine"] = similarity(projected, live, prepared, config)
            maps[method] = projected.received_attention(batch).cpu()
    for name, differences in against(hits).items():
        figures[name]["against"] = differences
    common = {"split": config.split, "classes": list(prepared.classes)}
    inputs = {"teacher": teacher_path} | {p.parent.name: p for p in students}
    provenance = artifacts.provenance(config.__dict__, **inputs) | prepared.hashes()
    in_brief = {name: brief(config, prepared, listed) for name, listed in (others or {}).items()}
    attention_maps = evidence.attention_maps(maps, list(live.description["grid"]), map_rows)
    return (
        {
            **common,
            "noise": list(NOISE),
            "models": figures,
            **({"students": in_brief} if in_brief else {}),
            "provenance": provenance,
        },
        {**common, "models": errors, "attention": attention_maps, "provenance": provenance},
    )


def brief(config: Evaluate, prepared: Prepared, students: Sequence[Path]) -> Document:
    """Map the method of each checkpoint to its accuracy, clean and noisy, parameters and MACs."""
    figures = {}
    for path in students:
        model, description = checkpoint.load(path)
        model.to(pick_device(config.device, "evaluate.device", SINGLE_PROCESS))
        result, _ = accuracy(model, description["preprocess"], prepared, config)
        own = {key: result[key] for key in ("clean", "noisy")}
        figures[description["method"]] = own | checkpoint.count(model, prepared.image_size)
    return figures


def _facts(model: nn.Module, description: Document, prepared: Prepared) -> Document:
    """Describe a model for accuracy.json: size, seed and the labels it has used."""
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
    """A CAKD student with its two projectors; `taps` keeps its feature map."""

    def __init__(
        self, student: nn.Module, preprocess: Document, projectors: Projectors, taps: Taps
    ) -> None:
        self._student, self._preprocess, self._taps = student, preprocess, taps
        self.projectors = projectors

    def feature(self, batch: Tensor) -> Tensor:
        """Compute the tapped map (B, c, h, w) for views (B, 3, S, S)."""
        self._student(views.normalise(batch, self._preprocess))
        return self._taps.features[self.projectors.tap.module]

    def received_attention(self, batch: Tensor) -> Tensor:
        """Compute the attention (B, N) that each patch receives under the projected Q_S, K_S (eq. 1)."""
        return evidence.received_attention(*heads(self.projectors.pca(self.feature(batch)))[:2])


@torch.no_grad()
def similarity(
    projected: Projected, live: teacher.Teacher, prepared: Prepared, config: Evaluate
) -> dict[str, float]:
    """Compute the mean cosine between teacher and student in the projected spaces, over all images of the split.

    `attention`: of a head's output at a token (eq. 2); `tokens`: of h at a token (eq. 5).
    """
    rows = prepared.rows(config.split)
    live.read_at(projected.projectors.config.layer)
    sums = {"attention": 0.0, "tokens": 0.0}
    device = next(live.parameters()).device
    for _, images in chunks(prepared, rows, config.crop_pct):
        batch = views.whole(images).to(device)
        attended, tokens = projected.projectors.projected(projected.feature(batch))
        outputs = live(batch)
        for name, student_values, teacher_values in (
            ("attention", attended, attention(*heads(outputs.attention_inputs))),
            ("tokens", tokens, projected.projectors.target(outputs.tokens)),
        ):
            cosine = F.cosine_similarity(student_values, teacher_values, dim=-1).flatten(1).mean(1)
            sums[name] += cosine.sum().item()
    return {name: total / len(rows) for name, total in sums.items()}
