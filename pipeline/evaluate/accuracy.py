"""Accuracy, clean and under noise disjoint from Trans; how near the projections came to the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core import artifacts
from pipeline.data import views
from pipeline.data.prepared import SPLITS, Prepared
from pipeline.distill.kernels.reference import attention, heads
from pipeline.distill.methods import cakd
from pipeline.evaluate.corruptions import NOISE, Pixels, noisy
from pipeline.models import checkpoint, teacher
from pipeline.models.student import Taps

SCHEMA = "cakd.accuracy/1"


@dataclass(frozen=True)
class Evaluate:
    """`evaluate:` how the models are judged."""

    split: str = "test"
    batch: int = 100
    ece_bins: int = 15
    seed: int = 0  # of the noise

    def __post_init__(self) -> None:
        for name in ("batch", "ece_bins"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 1 or more")
        if self.split not in SPLITS:
            raise ValueError(f"split is {self.split!r}; allowed: {', '.join(SPLITS)}")


@torch.no_grad()
def predict(model: nn.Module, images: Pixels, preprocess: dict[str, Any], batch: int) -> Tensor:
    """Logits (n, K) of whole images (n, S, S, 3)."""
    parts = [
        model(views.normalise(views.whole(images[at : at + batch]), preprocess))
        for at in range(0, len(images), batch)
    ]
    return torch.cat(parts)


def figures(logits: Tensor, labels: Tensor, bins: int) -> dict[str, float | int]:
    """top1, top5 (of K where K < 5), nll, ece as fractions, and n. logits (n, K), labels (n,).

    ECE: mean |accuracy - confidence| over equal-width bins of the top confidence, weighted by their share
    (Guo et al., ICML 2017).
    """
    ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    confidence, hit = logits.softmax(dim=1).amax(dim=1), ranked[:, 0].float()
    which = (confidence * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins).index_add_(0, which, hit - confidence).abs().sum() / len(labels)
    return {
        "top1": hit.mean().item(),
        "top5": ranked.any(dim=1).float().mean().item(),
        "nll": F.cross_entropy(logits, labels).item(),
        "ece": gap.item(),
        "n": len(labels),
    }


def accuracy(
    model: nn.Module, preprocess: dict[str, Any], prepared: Prepared, config: Evaluate
) -> dict[str, Any]:
    """`clean`, `noisy` (every kind of noise on every image) and `noisy_by_kind` of a model."""
    rows = prepared.rows(config.split)
    rows = rows[prepared.labels[rows] >= 0]
    images, labels = prepared.images[rows], torch.from_numpy(prepared.labels[rows])
    ids = tuple(prepared.sha256[r] for r in rows)
    by_kind = {
        kind: predict(model, noisy(images, ids, kind, config.seed), preprocess, config.batch)
        for kind in NOISE
    }
    clean = predict(model, images, preprocess, config.batch)
    every = torch.cat(list(by_kind.values()))
    return {
        "clean": figures(clean, labels, config.ece_bins),
        "noisy": figures(every, labels.repeat(len(by_kind)), config.ece_bins),
        "noisy_by_kind": {k: figures(v, labels, config.ece_bins) for k, v in by_kind.items()},
    }


@torch.no_grad()
def similarity(
    student_path: Path, live: teacher.Teacher, prepared: Prepared, config: Evaluate
) -> dict[str, float] | None:
    """Mean cosine between teacher and student in the projected spaces: `attention` (a head's output at a token)

    and `tokens` (h at a token). None where the student has no projectors.
    """
    student, description = checkpoint.load(student_path)
    projectors = cakd.load_projectors(student_path.parent, description)
    if projectors is None:
        return None
    rows = prepared.rows(config.split)
    sums = {"attention": 0.0, "tokens": 0.0}
    with Taps(student, [projectors.tap.module]) as taps:
        for at in range(0, len(rows), config.batch):
            batch = views.whole(prepared.images[rows[at : at + config.batch]])
            student(views.normalise(batch, description["preprocess"]))
            attended, tokens = projectors.projected(taps.features[projectors.tap.module])
            taught = live(batch)
            for name, mine, theirs in (
                ("attention", attended, attention(*heads(taught.attention_inputs))),
                ("tokens", tokens, projectors.target(taught.h)),
            ):
                cosine = F.cosine_similarity(mine, theirs, dim=-1).flatten(1).mean(1)
                sums[name] += cosine.sum().item()
    return {name: total / len(rows) for name, total in sums.items()}


def evaluate(
    config: Evaluate,
    prepared: Prepared,
    teacher_path: Path,
    students: list[Path],
) -> dict[str, Any]:
    """The teacher and every student, as accuracy.json holds them (without schema and machine)."""
    live = teacher.load(teacher_path)
    found = {"teacher": _judge(live.tail.vit, live.description, prepared, config)}
    for path in students:
        model, description = checkpoint.load(path)
        judged = _judge(model, description, prepared, config)
        cosine = similarity(path, live, prepared, config)
        found[description["method"]] = judged | ({"cosine": cosine} if cosine else {})
    inputs = {"teacher": teacher_path} | {p.parent.name: p for p in students}
    return {
        "split": config.split,
        "classes": list(prepared.classes),
        "noise": list(NOISE),
        "models": found,
        "provenance": artifacts.provenance(config.__dict__, **inputs) | prepared.made_of(),
    }


def _judge(
    model: nn.Module, description: dict[str, Any], prepared: Prepared, config: Evaluate
) -> dict[str, Any]:
    train = prepared.rows("train")
    return {
        **accuracy(model, description["preprocess"], prepared, config),
        **checkpoint.count(model, prepared.image_size),
        "model": description["model"],
        "seed": description["seed"],
        "labels_seen": description["labels_seen"],
        "labels_total": int((prepared.labels[train] >= 0).sum()),
        "images_seen": len(train),
    }
