"""Accuracy of a model on clean images and under noise that the training transforms do not have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.config import STRICT, Seed
from pipeline.data import views
from pipeline.data.prepared import Prepared
from pipeline.evaluate.corruptions import NOISE, Pixels, noisy
from pipeline.training.compute import Device

SCHEMA = "cakd.accuracy/1"
BATCH = 100  # images a call: a whole student's activations stay in the cache of a CPU
Noise = Callable[[Pixels, tuple[str, ...], str, int], Pixels]
BINS = 15  # of the calibration error, as in Guo et al.


@dataclass(frozen=True, config=STRICT)
class Evaluate:
    """`evaluate:` how the models are judged."""

    split: Literal["train", "val", "test"] = "test"
    seed: Seed = 0  # of the noise
    # share of each side that is kept of an image, as timm's: the rest is cropped; 1: the whole
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 1.0
    device: Device = "auto"


@torch.no_grad()
def predict(
    model: nn.Module, images: Pixels, preprocess: dict[str, Any], batch: int = BATCH
) -> Tensor:
    """Compute logits (n, K) for whole images (n, S, S, 3) uint8, on the model's device; returned to the CPU."""
    device = next(model.parameters()).device
    logits = [
        model(views.normalise(views.whole(images[start : start + batch]).to(device), preprocess))
        for start in range(0, len(images), batch)
    ]
    return torch.cat(logits).cpu()


def chunks(
    prepared: Prepared, rows: NDArray[np.int64], crop_pct: float
) -> Iterator[tuple[NDArray[np.int64], Pixels]]:
    """Yield up to BATCH rows at a time with their images (n, S, S, 3), as evaluation sees them."""
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        yield part, prepared.images.squares(part, crop_pct)


def figures(logits: Tensor, labels: Tensor, bins: int = BINS) -> dict[str, float | int]:
    """Compute top1, top5 (of K where K < 5), nll and ece as fractions, and n. logits (n, K), labels (n,).

    ECE: mean |accuracy - confidence| over equal-width bins of the top confidence, weighted by their share
    (Guo et al., ICML 2017).
    """
    ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    confidence, hit = logits.softmax(dim=1).amax(dim=1), ranked[:, 0].float()
    index = (confidence * bins).long().clamp(max=bins - 1)
    # Per bin the sum of hit - confidence is its share times (accuracy - confidence), times n.
    ece = torch.zeros(bins).index_add_(0, index, hit - confidence).abs().sum() / len(labels)
    return {
        "top1": hit.mean().item(),
        "top5": ranked.any(dim=1).float().mean().item(),
        "nll": F.cross_entropy(logits, labels).item(),
        "ece": ece.item(),
        "n": len(labels),
    }


def labelled_rows(prepared: Prepared, config: Evaluate) -> NDArray[np.int64]:
    """Return the labelled rows of the split."""
    rows = prepared.rows(config.split)
    return rows[prepared.labels[rows] >= 0]


def accuracy(
    model: nn.Module,
    preprocess: dict[str, Any],
    prepared: Prepared,
    config: Evaluate,
    noise: Noise = noisy,
) -> tuple[dict[str, Any], Tensor]:
    """Evaluate a model: `clean`, `noisy` (all kinds on all images), `noisy_by_kind`; and clean logits (n, K).

    `noise` makes the noisy images, or reads what it made for another model.
    """
    rows = labelled_rows(prepared, config)
    answers: dict[str, list[Tensor]] = {kind: [] for kind in ("clean", *NOISE)}
    for part, images in chunks(prepared, rows, config.crop_pct):
        ids = tuple(prepared.sha256[r] for r in part)
        answers["clean"].append(predict(model, images, preprocess))
        for kind in NOISE:
            noised = noise(images, ids, kind, config.seed)
            answers[kind].append(predict(model, noised, preprocess))
    by_kind = {kind: torch.cat(logits) for kind, logits in answers.items()}
    clean, labels = by_kind.pop("clean"), torch.from_numpy(prepared.labels[rows])
    all_kinds = torch.cat(list(by_kind.values()))
    result = {
        "clean": figures(clean, labels),
        "noisy": figures(all_kinds, labels.repeat(len(by_kind))),
        "noisy_by_kind": {k: figures(v, labels) for k, v in by_kind.items()},
    }
    return result, clean
