"""Accuracy, clean and under noise disjoint from Trans; how near the projections came to the teacher."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline import data, files, models, teacher, training, views
from pipeline.kernels.reference import attention, heads
from pipeline.students import Taps

SCHEMA = "cakd.accuracy/1"
Pixels = NDArray[np.uint8]  # (S, S, 3)


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
        if self.split not in data.SPLITS:
            raise ValueError(f"split is {self.split!r}; allowed: {', '.join(data.SPLITS)}")


def jpeg(image: Pixels, draw: np.random.Generator) -> Pixels:
    """JPEG at quality 5 to 20."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=int(draw.integers(5, 21)))
    return np.asarray(Image.open(buffer).convert("RGB"))


def contrast(image: Pixels, draw: np.random.Generator) -> Pixels:
    """Contrast about the image's mean brought down to 15 to 40 %."""
    mean = image.mean()
    return _to_bytes(mean + (image - mean) * draw.uniform(0.15, 0.4))


def shot_noise(image: Pixels, draw: np.random.Generator) -> Pixels:
    """Poisson noise of 8 to 25 photons at white."""
    photons = draw.uniform(8, 25)
    return _to_bytes(draw.poisson(image / 255 * photons) * (255 / photons))


def pixelation(image: Pixels, draw: np.random.Generator) -> Pixels:
    """Down to 30 to 50 % of the side by box averaging, and up again by nearest neighbour."""
    size = image.shape[0]
    small = max(2, round(size * draw.uniform(0.3, 0.5)))
    coarse = Image.fromarray(image).resize((small, small), Image.Resampling.BOX)
    return np.asarray(coarse.resize((size, size), Image.Resampling.NEAREST))


def lines(image: Pixels, draw: np.random.Generator) -> Pixels:
    """Two to four straight lines across the image, 1/16 of its side wide, of any grey."""
    canvas = Image.fromarray(image)
    pen, size = ImageDraw.Draw(canvas), image.shape[0]
    for _ in range(draw.integers(2, 5)):
        a, b, grey = draw.uniform(0, size, 2), draw.uniform(0, size, 2), int(draw.integers(0, 256))
        ends = [(a[0], 0), (b[0], size)] if draw.random() < 0.5 else [(0, a[1]), (size, b[1])]
        pen.line(ends, fill=(grey, grey, grey), width=max(1, size // 16))
    return np.asarray(canvas)


def _to_bytes(values: NDArray[np.floating[Any]]) -> Pixels:
    pixels: Pixels = values.clip(0, 255).round().astype(np.uint8)
    return pixels


NOISE: dict[str, Callable[[Pixels, np.random.Generator], Pixels]] = {
    "jpeg": jpeg,
    "contrast": contrast,
    "shot_noise": shot_noise,
    "pixelation": pixelation,
    "lines": lines,
}


def noisy(images: Pixels, ids: tuple[str, ...], kind: str, seed: int) -> Pixels:
    """images (n, S, S, 3) uint8 with one kind of noise; the draw is a function of (seed, kind, image id)."""
    spoiled = []
    for image, name in zip(images, ids, strict=True):
        key = hashlib.blake2b(f"{seed}/{kind}/{name}".encode(), digest_size=16).digest()
        generator = np.random.default_rng(int.from_bytes(key, "little"))
        spoiled.append(NOISE[kind](image, generator))
    return np.stack(spoiled)


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
    model: nn.Module, preprocess: dict[str, Any], prepared: data.Prepared, config: Evaluate
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
    student_path: Path, live: teacher.Teacher, prepared: data.Prepared, config: Evaluate
) -> dict[str, float] | None:
    """Mean cosine between teacher and student in the projected spaces: `attention` (a head's output at a token)

    and `tokens` (h at a token). None where the student has no projectors.
    """
    student, description = models.load(student_path)
    projectors = training.load_projectors(student_path.parent, description)
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
    prepared: data.Prepared,
    teacher_path: Path,
    students: list[Path],
) -> dict[str, Any]:
    """The teacher and every student, as accuracy.json holds them (without schema and machine)."""
    live = teacher.load(teacher_path)
    found = {"teacher": _judge(live.tail.vit, live.description, prepared, config)}
    for path in students:
        model, description = models.load(path)
        judged = _judge(model, description, prepared, config)
        cosine = similarity(path, live, prepared, config)
        found[description["method"]] = judged | ({"cosine": cosine} if cosine else {})
    inputs = {"teacher": teacher_path} | {p.parent.name: p for p in students}
    return {
        "split": config.split,
        "classes": list(prepared.classes),
        "noise": list(NOISE),
        "models": found,
        "provenance": files.provenance(config.__dict__, **inputs) | prepared.made_of(),
    }


def _judge(
    model: nn.Module, description: dict[str, Any], prepared: data.Prepared, config: Evaluate
) -> dict[str, Any]:
    train = prepared.rows("train")
    return {
        **accuracy(model, description["preprocess"], prepared, config),
        **models.count(model, prepared.image_size),
        "model": description["model"],
        "seed": description["seed"],
        "labels_seen": description["labels_seen"],
        "labels_total": int((prepared.labels[train] >= 0).sum()),
        "images_seen": len(train),
    }
